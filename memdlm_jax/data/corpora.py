"""Corpora: what a source of examples can be made of, one class and one registry entry each.

A new corpus needs two methods:

    class Recipes(Corpus):
        def examples(self, source, split, encoder, seed):
            for dish, steps in read(source.path):
                if split_of(dish) == split:
                    yield Example(f"How do I cook {dish}?", steps, dish, "recipes")

        def documents(self, source, split):
            return ((("text", steps),) for dish, steps in read(source.path)
                    if split_of(dish) == split)

    recipes = Recipes()

A config names it as ``kind="my_module:recipes"``. ``CORPORA.register("recipes")(recipes)`` gives it
a short name for programs that import ``my_module``.
"""

import abc
import dataclasses
import hashlib
import importlib.metadata
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from memdlm_jax import storage
from memdlm_jax.data import sources
from memdlm_jax.data.example import Example, Message, Role
from memdlm_jax.data.needles import NeedleConfig, NeedleTask, wording
from memdlm_jax.data.sft import Encoder
from memdlm_jax.data.text import SPLITS, Split, check_at_least, split_sentences
from memdlm_jax.registry import CORPORA

_TOKENIZER_EPISODES = 4000

Document = tuple[Message, ...]
"""A conversation, oldest turn first, or one message of role ``text``."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of examples.

    Attributes:
        kind: name of a corpus: ``chitchat`` dialogues, own ``jsonl``, a folder of ``text``,
            ``needles``, or ``MODULE:NAME`` of your own ``Corpus``.
        path: the JSON-lines file or the folder of text. For needles, a folder of text for the
            haystack; empty takes sentences of the chitchat corpus.
        continuation: text only: the first half of a row is the prompt.
        needles: the retrieval task; its ``split`` is set for each split in turn.
        episodes: needle episodes for training, validation and test.
    """

    kind: str = "chitchat"
    path: str = ""
    continuation: bool = False
    needles: NeedleConfig | None = None
    episodes: tuple[int, int, int] = (10_000, 500, 500)

    def __post_init__(self):
        for count in self.episodes:
            check_at_least("episodes", count, 0)
        if len(self.episodes) != len(SPLITS):
            raise ValueError(f"episodes={self.episodes} must have one number for each of {SPLITS}")
        self.corpus.check(self)

    @property
    def corpus(self) -> "Corpus":
        """The corpus called ``kind``."""
        return corpus_of(self.kind, "kind")


class Corpus(abc.ABC):
    """One kind of training material.

    Attributes:
        packages: installed packages that hold the material of a source without a path.
    """

    packages: tuple[str, ...] = ()

    @property
    def version(self) -> Any:
        """Changes when the same source gives other examples, so that old rows are not reused.

        By default a digest of the file that defines the class; any JSON value will do.
        """
        file = getattr(sys.modules[type(self).__module__], "__file__", None)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None

    def check(self, source: SourceConfig) -> None:  # noqa: B027 (most corpora take any source)
        """Raise ValueError, naming the field, if a source lacks what this corpus needs."""

    @abc.abstractmethod
    def examples(
        self, source: SourceConfig, split: Split, encoder: Encoder, seed: int
    ) -> Iterator[Example]:
        """Examples of a split, the same ones for the same arguments.

        Args:
            source: says where the material is.
            split: only examples whose ``group`` belongs to it, see ``sources.split_of``.
            encoder: its tokenizer and longest row, for examples that are fitted to a length.
            seed: for examples that are drawn.
        """

    @abc.abstractmethod
    def documents(self, source: SourceConfig, split: Split) -> Iterable[Document]:
        """The material of a split, each text once: for tokenizers, haystacks and pretraining."""

    def sentences(self, source: SourceConfig, split: Split) -> list[str]:
        """Sentences of a split, for haystacks."""
        texts = (text for document in self.documents(source, split) for _, text in document)
        return [sentence for text in texts for sentence in split_sentences(text)]

    def fingerprint(self, source: SourceConfig) -> list[Any]:
        """JSON value of all that the examples depend on: settings, content, version.

        A file that only moves keeps its fingerprint.
        """
        if source.path:
            content = _content(storage.path(source.path))
        else:
            content = [f"{name} {installed_version(name)}" for name in self.packages]
        settings = dataclasses.asdict(source) | {"path": "-" if source.path else ""}
        return [settings, content, *([self.version] if self.version else [])]


def corpus_of(name: str, field: str) -> Corpus:
    """The corpus of a registered name or of ``MODULE:NAME``.

    Args:
        name: of the corpus.
        field: config field that holds the name, for messages.

    Raises:
        ValueError: there is none, or it is not a ``Corpus``.
    """
    found = CORPORA(name, field)
    if not isinstance(found, Corpus):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise ValueError(f"{field}={name!r} is {what}, must be an instance of a Corpus class")
    return found


class Chitchat(Corpus):
    """Conversations of the package ``chitchat_dataset``."""

    packages = ("chitchat-dataset", "wonderwords")
    version = None

    def examples(self, source, split, encoder, seed) -> Iterator[Example]:
        """Conversation so far -> next turn."""
        return sources.chitchat_examples(split)

    def documents(self, source, split) -> Iterator[Document]:
        """Conversations; the speaker of the last turn is the assistant."""
        for group, turns in sources.chitchat_turns():
            if sources.split_of(group) == split:
                roles: dict[bool, Role] = {True: "assistant", False: "user"}
                yield tuple((roles[who == turns[-1][0]], text) for who, text in turns)

    def sentences(self, source, split) -> list[str]:
        """Sentences of at least four words."""
        return sources.chitchat_sentences(split)


class ChitchatAndTopics(Chitchat):
    """The same with Python's own reference documentation in the training documents."""

    def documents(self, source, split) -> Iterator[Document]:
        """Conversations, then reference topics."""
        yield from super().documents(source, split)
        if split == "train":
            from pydoc_data.topics import topics

            yield from ((("text", text),) for text in topics.values())


class Jsonl(Corpus):
    """A file of one JSON object a line, see ``sources.jsonl_examples``."""

    version = 2

    def check(self, source) -> None:
        """Raise ValueError without a path."""
        _require_path(source)

    def examples(self, source, split, encoder, seed) -> Iterator[Example]:
        """One example for each response."""
        return sources.jsonl_examples(source.path, split)

    def documents(self, source, split) -> Iterator[Document]:
        """Responses, each after the message that it answers."""
        for example in sources.jsonl_examples(source.path, split):
            yield (*example.messages[-1:], ("assistant", example.response))


class Text(Corpus):
    """A folder of text files, see ``sources.text_sections``."""

    version = None

    def check(self, source) -> None:
        """Raise ValueError without a path."""
        _require_path(source)

    def examples(self, source, split, encoder, seed) -> Iterator[Example]:
        """Whole sentences, packed into rows."""
        budget = encoder.config.max_length - 1
        return sources.text_examples(
            source.path, split, encoder.tokenizer, budget, source.continuation
        )

    def documents(self, source, split) -> Iterator[Document]:
        """Sentences."""
        return ((("text", sentence),) for sentence in self.sentences(source, split))

    def sentences(self, source, split) -> list[str]:
        """Sentences of all files."""
        return sources.text_sentences(source.path, split)


class Needles(Corpus):
    """Retrieval episodes, see ``needles``."""

    packages = Chitchat.packages
    version = None

    def check(self, source) -> None:
        """Raise ValueError without a task."""
        if source.needles is None:
            raise ValueError("needles=None must be a NeedleConfig for kind='needles'")

    def examples(self, source, split, encoder, seed) -> Iterator[Example]:
        """As many episodes as ``source.episodes`` says."""
        count = source.episodes[SPLITS.index(split)]
        if not count:
            return iter(())
        config = dataclasses.replace(source.needles, split=split)
        task = NeedleTask(config, encoder.tokenizer, self.sentences(source, split))
        return sources.needle_examples(task, seed, count)

    def documents(self, source, split) -> Iterator[Document]:
        """Needles and questions in training, and the haystack."""
        asked = wording(_TOKENIZER_EPISODES) if split == "train" else ()
        texts = itertools.chain(asked, self.sentences(source, split))
        return ((("text", text),) for text in texts)

    def sentences(self, source, split) -> list[str]:
        """The haystack."""
        if not source.path:
            return sources.chitchat_sentences(split)
        found = sources.text_sentences(source.path, split)
        if not found:
            raise ValueError(
                f"the haystack in {source.path!r} has no text in the split {split!r}: give more "
                f"text (sections of {sources.SECTION_SENTENCES} sentences are divided), or 0 "
                "episodes"
            )
        return found


CORPORA.register("chitchat")(Chitchat())
CORPORA.register("chitchat_and_topics")(ChitchatAndTopics())
CORPORA.register("jsonl")(Jsonl())
CORPORA.register("text")(Text())
CORPORA.register("needles")(Needles())


def _require_path(source: SourceConfig) -> None:
    if not source.path:
        raise ValueError(f"path='' must name a file or folder for kind={source.kind!r}")


def _content(path: Path) -> list[str]:
    """Names and digests of a file, or of all files of a folder."""
    if path.is_file():
        files, root = [path], path.parent
    elif path.is_dir():
        files, root = storage.files_below(path), path
    else:
        raise FileNotFoundError(f"path={str(path)!r} of a data source is not there")
    return [f"{f.relative_to(root)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files]


def installed_version(package: str) -> str:
    """Version of an installed package; empty if it is missing, which its reader reports."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
