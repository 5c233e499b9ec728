"""From a configuration to rows on disk: ``prepare`` writes them once and finds them again."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from memdlm_jax import storage
from memdlm_jax.data import sources
from memdlm_jax.data.builder import RowReader, write_rows
from memdlm_jax.data.example import Example
from memdlm_jax.data.needles import NeedleConfig, NeedleTask, wording
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.text import SPLITS, Split, check_at_least, check_choice
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer

_FORMAT = 1
"""Goes up when the same configuration gives other rows, so that old files are not reused."""

_KIND_FORMATS = {"jsonl": 2}
"""As ``_FORMAT``, for the rows of one kind alone."""

_TOKENIZER_EPISODES = 4000

Kind = Literal["chitchat", "jsonl", "text", "needles"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of examples.

    Attributes:
        kind: ``chitchat`` dialogues, own ``jsonl``, a folder of ``text``, or ``needles``.
        path: the JSON-lines file or the folder of text. For needles, a folder of text for the
            haystack; empty takes sentences of the chitchat corpus.
        continuation: text only: the first half of a row is the prompt.
        needles: the retrieval task; its ``split`` is set for each split in turn.
        episodes: needle episodes for training, validation and test.
    """

    kind: Kind = "chitchat"
    path: str = ""
    continuation: bool = False
    needles: NeedleConfig | None = None
    episodes: tuple[int, int, int] = (10_000, 500, 500)

    def __post_init__(self):
        check_choice("kind", self.kind, get_args(Kind))
        if self.kind in ("jsonl", "text") and not self.path:
            raise ValueError(f"path='' must name a file or folder for kind={self.kind!r}")
        if self.kind == "needles" and self.needles is None:
            raise ValueError("needles=None must be a NeedleConfig for kind='needles'")
        for count in self.episodes:
            check_at_least("episodes", count, 0)
        if len(self.episodes) != len(SPLITS):
            raise ValueError(f"episodes={self.episodes} must have one number for each of {SPLITS}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What rows are made of.

    Attributes:
        directory: where tokenizers and rows are kept; safe to share between configurations.
        sources: mixed by taking the rows of all of them.
        encode: the longest row, and what happens to longer examples.
        tokenizer: path of a ``tokenizer.json``; empty trains one on the training split.
        tokenizer_digest: refuses any other tokenizer; empty accepts all.
        vocab_size: of a tokenizer trained here.
        seed: of the needle episodes.
    """

    directory: str
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    encode: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)
    tokenizer: str = ""
    tokenizer_digest: str = ""
    vocab_size: int = 4096
    seed: int = 0

    def __post_init__(self):
        if not self.directory:
            raise ValueError("directory='' must name a folder")
        if not self.sources:
            raise ValueError("sources=() must name at least one source")
        check_at_least("vocab_size", self.vocab_size, 1)
        check_at_least("seed", self.seed, 0)
        for source in self.sources:
            if source.needles and source.needles.length > self.encode.max_length:
                raise ValueError(
                    f"needles.length={source.needles.length} must be at most "
                    f"encode.max_length={self.encode.max_length}"
                )


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Rows on disk and the tokenizer that made them.

    Attributes:
        directory: holds the rows, ``tokenizer.json`` and ``summary.json``.
        tokenizer: the tokenizer of the rows.
        summary: the content of ``summary.json``: see ``builder.write_rows``, for each split.
    """

    directory: Path
    tokenizer: Tokenizer
    summary: dict[str, Any]

    def rows(self, split: Split) -> RowReader:
        """Random access to the rows of a split.

        Raises:
            ValueError: the split has no rows.
        """
        return RowReader(self.directory, split)

    def lengths(self, split: Split) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows"]]:
        """(ids of each row, ids of its prompt), both [rows] int32, in the order of ``rows``."""
        self.rows(split)
        with np.load(self.directory / f"lengths-{split}.npz") as stored:
            return stored["total"], stored["prompt"]

    def describe(self) -> str:
        """The summary for people, one line for each split and reason."""
        lines = [f"{self.directory} (tokenizer {self.tokenizer.digest()[:12]})"]
        for split in SPLITS:
            found = self.summary["splits"][split]
            lines.append(
                f"{split}: {found['rows']} rows, {found['tokens']} tokens, "
                f"{found['response_tokens']} of them response, "
                f"lengths {found['length_percentiles']}"
            )
            lines += [f"  dropped {n}: {reason}" for reason, n in found["dropped"].items()]
        return "\n".join(lines)


def prepare(config: DataConfig) -> PreparedData:
    """Write the rows of a configuration, or find them if they are there already.

    Rows live in a folder named after a digest of everything that shapes them (sources and their
    content, encoding, tokenizer, seed), so another setting never reads them. The folder appears
    only when it is complete.

    Raises:
        ValueError: a wrong tokenizer, bad input, or no row at all.
        FileNotFoundError: a file of the configuration is not there.
        ImportError: a corpus package is not installed.
    """
    prints = [_fingerprint(source) for source in config.sources]
    tokenizer = _tokenizer(config, prints)
    content = [dataclasses.asdict(config.encode), tokenizer.digest(), config.seed, prints]
    final = storage.path(config.directory) / f"rows-{_digest(content)}"
    if storage.is_remote(final):
        _prepare_in_bucket(config, tokenizer, final)
    elif not final.exists():
        unfinished = final.with_name(f".{final.name}-{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _write(config, tokenizer, unfinished)
            _publish(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return load_prepared(final, config.tokenizer_digest)


def _prepare_in_bucket(config: DataConfig, tokenizer: Tokenizer, final: Path) -> None:
    """Write rows on a disk and copy them, the summary last: rows with it are complete."""
    if (final / "summary.json").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(config, tokenizer, Path(folder) / final.name)
        storage.copy_folder(Path(folder) / final.name, final, last="summary.json")


def load_prepared(directory: str | Path, tokenizer_digest: str = "") -> PreparedData:
    """Open rows that ``prepare`` has written.

    Args:
        directory: ``PreparedData.directory``; in a bucket it is copied to a temporary folder of
            this process, since rows are read at random.
        tokenizer_digest: what the tokenizer's digest has to be; empty accepts any.

    Raises:
        FileNotFoundError: there are no rows.
        ValueError: the tokenizer is not the one that made the rows, or not the one asked for.
    """
    directory = storage.path(directory)
    if not (directory / "summary.json").is_file():
        raise FileNotFoundError(f"no prepared data in {directory}")
    directory = storage.fetched(directory)
    summary = json.loads((directory / "summary.json").read_text())
    if tokenizer_digest not in ("", summary["tokenizer_digest"]):
        raise ValueError(
            f"tokenizer_digest={tokenizer_digest} was asked for, but the rows in {directory} were "
            f"made with {summary['tokenizer_digest']}"
        )
    tokenizer = Tokenizer.load(directory / "tokenizer.json", digest=summary["tokenizer_digest"])
    return PreparedData(directory, tokenizer, summary)


def examples(config: DataConfig, split: Split, tokenizer: Tokenizer) -> Iterator[Example]:
    """Examples of all sources of a configuration, one source after the other.

    Raises:
        ValueError: bad input; names file and field.
        FileNotFoundError: a file of the configuration is not there.
        ImportError: a corpus package is not installed.
    """
    for place, source in enumerate(config.sources):
        yield from _examples(source, split, tokenizer, config.encode, config.seed + place)


def _examples(
    source: SourceConfig, split: Split, tokenizer: Tokenizer, encode: EncodeConfig, seed: int
) -> Iterator[Example]:
    """Examples of one source."""
    if source.kind == "chitchat":
        return sources.chitchat_examples(split)
    if source.kind == "jsonl":
        return sources.jsonl_examples(source.path, split)
    if source.kind == "text":
        budget = encode.max_length - 1
        return sources.text_examples(source.path, split, tokenizer, budget, source.continuation)
    assert source.needles is not None
    count = source.episodes[SPLITS.index(split)]
    if not count:
        return iter(())
    config = dataclasses.replace(source.needles, split=split)
    task = NeedleTask(config, tokenizer, _haystack(source, split))
    return sources.needle_examples(task, seed, count)


def _haystack(source: SourceConfig, split: Split) -> list[str]:
    """Filler of a needle source."""
    if not source.path:
        return sources.chitchat_sentences(split)
    found = sources.text_sentences(source.path, split)
    if not found:
        raise ValueError(
            f"the haystack in {source.path!r} has no text in the split {split!r}: give more text "
            f"(sections of {sources.SECTION_SENTENCES} sentences are divided), or 0 episodes"
        )
    return found


def _write(config: DataConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Write rows, lengths, tokenizer and summary."""
    streams = {split: functools.partial(examples, config, split, tokenizer) for split in SPLITS}
    found = write_rows(directory, streams, Encoder(tokenizer, config.encode))
    for split in SPLITS:
        if found[split]["rows"]:
            total, prompt = RowReader(directory, split).lengths()
            np.savez(directory / f"lengths-{split}.npz", total=total, prompt=prompt)
    tokenizer.save(directory / "tokenizer.json")
    summary = {
        "config": dataclasses.asdict(config),
        "tokenizer_digest": tokenizer.digest(),
        "vocab_size": tokenizer.vocab_size,
        "splits": found,
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _publish(unfinished: Path, final: Path) -> None:
    """Give a finished folder its name; a neighbour that was faster has written the same."""
    try:
        unfinished.rename(final)
    except OSError:
        if not (final / "summary.json").is_file():
            raise


def _tokenizer(config: DataConfig, prints: list[Any]) -> Tokenizer:
    """The tokenizer of a configuration: given, trained before, or trained now."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer, digest=config.tokenizer_digest)
    name = f"tokenizer-{_digest([config.vocab_size, prints])}.json"
    path = storage.path(config.directory) / name
    if not path.is_file():
        trained = train_tokenizer(
            itertools.chain.from_iterable(map(_training_text, config.sources)), config.vocab_size
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as unfinished:
            trained.save(unfinished)
    return Tokenizer.load(path, digest=config.tokenizer_digest)


def _training_text(source: SourceConfig) -> Iterable[str]:
    """Text of a source's training split, each piece once."""
    if source.kind == "jsonl":
        found = sources.jsonl_examples(source.path, "train")
        return (text for e in found for text in (*(t for _, t in e.messages[-1:]), e.response))
    if source.kind == "text":
        return sources.text_sentences(source.path, "train")
    if source.kind == "needles":
        return itertools.chain(wording(_TOKENIZER_EPISODES), _haystack(source, "train"))
    turns = (t for g, t in sources.chitchat_turns() if sources.split_of(g) == "train")
    return (text for said in turns for _, text in said)


def _fingerprint(source: SourceConfig) -> list[Any]:
    """What a source's rows depend on: its settings and the content behind them, not its place."""
    if source.path:
        content = _content(storage.path(source.path))
    else:
        content = [
            f"{name} {installed_version(name)}" for name in ("chitchat-dataset", "wonderwords")
        ]
    settings = dataclasses.asdict(dataclasses.replace(source, path="-" if source.path else ""))
    kind_format = _KIND_FORMATS.get(source.kind)
    return [settings, content, *([kind_format] if kind_format else [])]


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


def _digest(content: Any) -> str:
    """Short digest of anything that JSON can hold, with the format of the rows."""
    text = json.dumps([_FORMAT, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
