"""RULER-style needles in a haystack (Hsieh et al., arXiv 2404.06654), fitted to exact lengths.

Wording and scoring are RULER's to the character; what is ours: whole sentences fill the length to
the token, and the words of keys are divided between training, validation and test.
"""

import dataclasses
import functools
import importlib.resources
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.filler import Filler, Piece
from memdlm_jax.data.text import (
    SPLITS,
    Split,
    check_at_least,
    check_choice,
    one_space,
    stable_split,
)
from memdlm_jax.data.tokenizer import Tokenizer

REPEATED = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
_HEAD = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n"
)
_QUESTION = "What are all the special magic {type} for {key} mentioned in the provided text?"
_PREFIX = "The special magic {type} for {key} mentioned in the provided text are"
_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)

Haystack = Literal["text", "repeat"]
Template = Literal["ruler", "short"]


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """One retrieval task.

    Attributes:
        length: tokens of the encoded row: prompt, answer and the four special tokens of a turn.
        num_keys: keys in the haystack, one of which is asked for.
        num_values: values of each key, all of which are asked for; each is a needle of its own.
        value_digits: digits of a value; 3 or fewer are one token of our tokenizer.
        key_words: 1 takes a noun or an adjective, 2 is RULER's adjective-noun.
        haystack: ``text`` is the given filler, ``repeat`` RULER's sentence about the grass.
        template: ``ruler`` is the full wording, about 60 tokens beside the needles; ``short``
            leaves out the instruction and the question and keeps the start of the answer.
        split: whose words the keys are made of; 80 % of the words are for training, 10 % each
            for validation and test.
    """

    length: int = 256
    num_keys: int = 1
    num_values: int = 1
    value_digits: int = 3
    key_words: int = 1
    haystack: Haystack = "text"
    template: Template = "ruler"
    split: Split = "train"

    def __post_init__(self):
        for name in ("length", "num_keys", "num_values", "value_digits"):
            check_at_least(name, getattr(self, name), 1)
        if self.key_words not in (1, 2):
            raise ValueError(f"key_words={self.key_words!r} must be 1 or 2")
        check_choice("haystack", self.haystack, get_args(Haystack))
        check_choice("template", self.template, get_args(Template))
        check_choice("split", self.split, SPLITS)
        needles, numbers = self.num_keys * self.num_values, 9 * 10 ** (self.value_digits - 1)
        if needles > min(len(_DEPTHS), numbers):
            raise ValueError(
                f"num_keys={self.num_keys} times num_values={self.num_values} must be at most "
                f"{len(_DEPTHS)} (RULER's depths) and {numbers} (numbers of {self.value_digits} "
                "digits)"
            )


@dataclasses.dataclass(frozen=True)
class Episode:
    """A question about a haystack.

    Attributes:
        prompt: instruction, context, question and the start of the answer.
        prefix: the start of the answer, with which ``prompt`` ends.
        response: what a right answer goes on with, leading space included.
        key: the key asked for.
        values: its values, in the order of the context; they are the references of the score.
        all_values: the values of every needle, in the order of the context.
        depth: share of the context's tokens that stand before the first asked needle, in [0, 1].
        prompt_ids: ids of ``prompt``.
    """

    prompt: str
    prefix: str
    response: str
    key: str
    values: tuple[str, ...]
    all_values: tuple[str, ...]
    depth: float
    prompt_ids: list[int] = dataclasses.field(repr=False)

    @property
    def value(self) -> str:
        """The first value asked for (the only one when ``num_values`` is 1)."""
        return self.values[0]

    def example(self, group: str) -> Example:
        """The episode as a row: RULER's start of the answer opens the response's turn.

        The white space between question and start of the answer becomes the change of turns.
        """
        question = self.prompt.removesuffix(self.prefix).rstrip()
        return Example(question, self.response, group, "needles", prefix=f" {self.prefix}")


def chance_floor(config: NeedleConfig) -> float:
    """Chance of all asked values being right, if as many of the context's are drawn at random.

    In (0, 1]. The order does not matter, as it does not to ``string_match_all``.
    """
    return 1.0 / math.comb(config.num_keys * config.num_values, config.num_values)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER's score: share of the references that occur in the prediction, in [0, 1].

    Both are compared in lower case; control characters of the prediction are line breaks.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("references is empty: there is nothing to match")
    found = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return sum(reference.lower() in found for reference in references) / len(references)


@functools.cache
def key_parts(key_words: int, split: Split) -> tuple[tuple[str, ...], ...]:
    """Words that keys of a split are made of, one sorted tuple for each word of the key.

    Raises:
        ImportError: the word lists are not installed.
    """
    nouns, adjectives = _word_list("nounlist.txt"), _word_list("adjectivelist.txt")
    parts = [nouns | adjectives] if key_words == 1 else [adjectives, nouns]
    return tuple(
        tuple(sorted(w for w in words if stable_split(f"key:{w.lower()}", 0.8, 0.1) == split))
        for words in parts
    )


def _word_list(name: str) -> set[str]:
    """Words of one list of ``wonderwords``, as RULER uses it."""
    try:
        text = (importlib.resources.files("wonderwords.assets") / name).read_text()
    except ModuleNotFoundError as error:
        raise ImportError(
            "needle tasks need the words of wonderwords: pip install memdlm_jax[corpus]"
        ) from error
    return {one_space(line) for line in text.splitlines() if line.strip()}


def _singular(template: str) -> str:
    """RULER's wording for one value: its own replacements, in its own order."""
    template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return template.replace("{type}", "number")


def wording(count: int, seed: int = 0) -> Iterator[str]:
    """Needles and questions about training keys, to train a tokenizer on; needs no tokenizer."""
    rng = np.random.default_rng(seed)
    words = key_parts(1, "train")[0]
    for index in range(count):
        key = "-".join(rng.choice(words, 1 + index % 2))
        value = rng.integers(100, 1000)
        head, question = _HEAD, f"{_QUESTION} {_PREFIX}"
        if index % 4 == 0:
            head, question = _singular(head), _singular(question)
        text = "\n".join((head, NEEDLE.format(key=key, value=value), question))
        yield text.replace("{type}", "numbers").replace("{key}", key)


class NeedleTask:
    """Episodes of one task: ``episode(seed, index)`` is a pure function, in any order."""

    def __init__(
        self, config: NeedleConfig, tokenizer: Tokenizer, filler: Sequence[str] | Filler = ()
    ):
        """Tokenise the filler and check that the longest keys fit.

        Args:
            config: the task.
            tokenizer: counts the length; with ours every length is exact.
            filler: sentences of the haystack ``text``, from the split of the episodes; a
                ``Filler`` can be shared by several tasks.

        Raises:
            ValueError: ``length`` is too short, or ``filler`` is empty where it is needed.
            ImportError: the word lists are not installed.
        """
        self.config = config
        self.tokenizer = tokenizer
        if config.haystack == "repeat":
            filler = Filler([REPEATED], tokenizer, "\n")
        self._filler = filler if isinstance(filler, Filler) else Filler(filler, tokenizer)
        self._parts = key_parts(config.key_words, config.split)
        self._check_length()
        first = self._build(0, 0, piecewise=True)
        # Ids put together from pieces are those of the text unless the tokenizer merges across
        # pieces, which ours never does.
        self._piecewise = first.prompt_ids == tokenizer.encode(first.prompt)

    def episode(self, seed: int, index: int) -> Episode:
        """Episode ``index`` of the stream ``seed``; both at least 0.

        The encoded row has at most ``length`` tokens and, unless a word of the filler alone has
        more than that share, at least 95 % of it.
        """
        return self._build(seed, index, self._piecewise)

    def _build(self, seed: int, index: int, piecewise: bool) -> Episode:
        """Draw keys, values and places; put the context together."""
        rng = np.random.default_rng([seed, SPLITS.index(self.config.split), index])
        keys, values = self._keys(rng), self._values(rng)
        needles = [(k, v) for k, row in zip(keys, values, strict=True) for v in row]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        asked = tuple(value for key, value in needles if key == keys[0])
        frame = (*self._frame(keys[0]), " " + ", ".join(asked))
        head, tail, response = frame
        fixed = [self.tokenizer.encode(text) for text in frame]
        budget = self.config.length - self.tokenizer.turn_tokens - sum(map(len, fixed))
        pieces = self._context(rng, needles, budget)
        prompt = head + self._filler.separator.join(piece.text for piece in pieces) + tail
        return Episode(
            prompt=prompt,
            prefix=tail[tail.rindex("The special") :],
            response=response,
            key=keys[0],
            values=asked,
            all_values=tuple(value for _, value in needles),
            depth=_depth(pieces, NEEDLE.format(key=keys[0], value=asked[0])),
            prompt_ids=self._join(fixed[0], pieces, fixed[1])
            if piecewise
            else self.tokenizer.encode(prompt),
        )

    def _keys(self, rng: np.random.Generator) -> list[str]:
        """Distinct keys; the first is the one asked for."""
        sizes = [len(words) for words in self._parts]
        drawn = rng.choice(int(np.prod(sizes)), self.config.num_keys, replace=False)
        places = np.unravel_index(drawn, sizes)
        columns = ([w[i] for i in p] for w, p in zip(self._parts, places, strict=True))
        return ["-".join(words) for words in zip(*columns, strict=True)]

    def _values(self, rng: np.random.Generator) -> list[list[str]]:
        """Distinct values, ``num_values`` for each key."""
        c = self.config
        least = 10 ** (c.value_digits - 1)
        drawn = least + rng.choice(9 * least, c.num_keys * c.num_values, replace=False)
        return [[str(v) for v in row] for row in drawn.reshape(c.num_keys, c.num_values)]

    def _frame(self, key: str) -> tuple[str, str]:
        """What stands before and after the context."""
        c = self.config
        parts = (
            [_HEAD, f"\n{_QUESTION} {_PREFIX}"] if c.template == "ruler" else ["", f"\n{_PREFIX}"]
        )
        parts = [_singular(p) for p in parts] if c.num_values == 1 else parts
        head, tail = (p.replace("{type}", "numbers").replace("{key}", key) for p in parts)
        return head, tail

    def _context(
        self, rng: np.random.Generator, needles: list[tuple[str, str]], budget: int
    ) -> list[Piece]:
        """Needles among sentences, of at most ``budget`` tokens.

        Depths are RULER's, to the nearest gap between sentences; RULER rounds down, which in a
        context of few sentences puts half of all needles first.
        """
        pieces = [self._filler.piece(NEEDLE.format(key=k, value=v)) for k, v in needles]
        start = int(rng.integers(len(self._filler)))
        openings = (pieces[0], self._filler.sentence(start))
        budget -= max(0, *(self._filler.extra_at_start(piece) for piece in openings))
        context = self._filler.take(start, budget - sum(len(piece.ids) for piece in pieces))
        depths = np.sort(rng.choice(_DEPTHS, len(pieces), replace=False))
        places = [round(len(context) * depth / 100) for depth in depths]
        # From the back, so that every place still counts sentences alone.
        for place, piece in reversed(list(zip(places, pieces, strict=True))):
            context.insert(place, piece)
        return context

    def _join(self, head: list[int], pieces: list[Piece], tail: list[int]) -> list[int]:
        """Ids of the prompt; the first piece has no separator before it."""
        opening = self.tokenizer.encode(pieces[0].text)
        return [*head, *opening, *(i for piece in pieces[1:] for i in piece.ids), *tail]

    def _check_length(self) -> None:
        """Raise unless the longest keys of the split leave the needles and the question whole."""
        c = self.config
        longest = [
            max(words, key=lambda w: len(self.tokenizer.encode(" " + w))) for words in self._parts
        ]
        key, value = "-".join(longest), "9" * c.value_digits
        needle = len(self.tokenizer.encode(" " + NEEDLE.format(key=key, value=value)))
        frame = [*self._frame(key), f" {value}" + f", {value}" * (c.num_values - 1)]
        frame_tokens = sum(len(self.tokenizer.encode(text)) for text in frame)
        # One token more: a word that opens the context may be split where " word" is not.
        least = self.tokenizer.turn_tokens + frame_tokens + c.num_keys * c.num_values * needle + 1
        if least > c.length:
            raise ValueError(
                f"length={c.length} must be at least {least}: that many tokens take "
                f"{c.num_keys * c.num_values} needles and the question with the longest keys; "
                "raise it, ask for fewer keys, or take template='short'"
            )


def _depth(pieces: list[Piece], needle: str) -> float:
    """Share of the context's tokens before a needle."""
    place = next(i for i, piece in enumerate(pieces) if piece.text == needle)
    total = sum(len(piece.ids) for piece in pieces)
    return sum(len(piece.ids) for piece in pieces[:place]) / total
