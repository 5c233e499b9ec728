"""RULER's eight needle tasks: keys and values hidden in noise, in text, or among other needles."""

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from memdlm_jax.data.needles import REPEATED, key_parts
from memdlm_jax.data.text import SPLITS, one_space
from memdlm_jax.evaluation.ruler.config import (
    NEEDLE_KINDS,
    NUM_DEPTHS,
    Kind,
    RulerConfig,
)
from memdlm_jax.evaluation.ruler.fitting import Draft, TokenCounter, shares

_NEEDLE = "One of the special magic {type} for {key} is: {value}."
_QUESTION = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n{context}\n"
    "What are all the special magic {type} for {query} mentioned in the provided text?"
)
_PREFIX = "The special magic {type} for {query} mentioned in the provided text are"
# RULER rounds its depths to whole per cent.
_DEPTHS = np.round(np.linspace(0, 100, NUM_DEPTHS)).astype(int)


@dataclasses.dataclass(frozen=True)
class _Needle:
    text: str
    asked: bool
    share: float


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What one sample hides: needles by depth, the asked keys and their values."""

    needles: tuple[_Needle, ...]
    keys: tuple[str, ...]
    references: tuple[str, ...]
    start: int


class Needles:
    """Prompts of one needle task.

    Ours differs from the stock generators in what fills the length: text starts at a random
    sentence, goes round at its end and is cut to a word, where the stock generator of the harness
    grows by 500 words of one fixed beginning and leaves short lengths without any haystack. A
    needle stands at the gap that is nearest to its depth in tokens, not at the one before it. Keys
    and asked values never occur twice.
    """

    size: int | None = None

    def __init__(self, config: RulerConfig, counter: TokenCounter, sentences: Sequence[str]):
        """Read the words of the keys and the sentences of the haystack.

        Args:
            config: a needle task.
            counter: counts tokens.
            sentences: text of the haystack ``text``; sentences with a digit are left out, so that
                no value stands there by chance.

        Raises:
            ValueError: the task needs text, and none is left.
            ImportError: the word lists are not installed.
        """
        self._kind = NEEDLE_KINDS[config.task]
        self._settings = config.settings
        self._counter = counter
        self._sentences: list[str] = []
        if self._kind.haystack == "text":
            texts = (one_space(s) for s in sentences if not any(c.isdigit() for c in s))
            self._sentences = [text for text in texts if text]
            if not self._sentences:
                raise ValueError(
                    f"sentences: {config.task} hides needles in text, and of {len(sentences)} "
                    "sentences none is free of digits"
                )
        self._words: tuple[list[str], ...] = ()
        if self._kind.keys == "words":
            split = self._settings["key_split"]
            parts = [key_parts(2, name) for name in ([split] if split else SPLITS)]
            self._words = tuple(sorted(set().union(*words)) for words in zip(*parts, strict=True))

    def draw(self, rng: np.random.Generator, index: int) -> _Drawn:
        """Keys, values and depths of a sample."""
        del index  # There is no end of needles.
        per_key = self._settings.get("num_values", 1)
        keys = _distinct(lambda: self._key(rng), self._settings.get("num_keys", 1))
        values = _distinct(lambda: self._value(rng), len(keys) * per_key)
        asked = rng.permutation(len(keys)) if self._kind.asks_all else [0]
        pairs = [(place // per_key, value) for place, value in enumerate(values)]
        needles = [
            _Needle(self._needle(keys[key], value), key in asked, 0.0) for key, value in pairs
        ]
        needles = [needles[i] for i in rng.permutation(len(needles))]
        return _Drawn(
            needles=self._placed(rng, needles),
            keys=tuple(keys[key] for key in asked),
            references=tuple(v for key in asked for place, v in pairs if place == key),
            start=int(rng.integers(max(1, len(self._sentences)))),
        )

    def build(self, drawn: _Drawn, rng: np.random.Generator, room: int) -> Draft:
        """Needles in ``room`` tokens of haystack."""
        lead = " " if self._kind.haystack == "text" else "\n"
        hay, rest = self._counter.take(self._haystack(drawn, rng), room, lead)
        hay = [*hay, rest] if rest else hay
        gaps = shares([self._counter.piece(lead + text) for text in hay])
        pieces: list[tuple[str, bool]] = [(text, False) for text in hay]
        # From the back, so that every gap still counts haystack alone.
        for needle in reversed(drawn.needles):
            place = int(np.argmin(np.abs(np.asarray(gaps) - needle.share)))
            pieces.insert(place, (needle.text, needle.asked))
        before = shares([self._counter.piece(lead + text) for text, _ in pieces])
        single = len(drawn.references) == 1
        question, prefix = (
            self._worded(template, single, drawn.keys) for template in (_QUESTION, _PREFIX)
        )
        return Draft(
            question=question.replace("{context}", lead.join(text for text, _ in pieces)),
            separator=" ",
            prefix=prefix,
            response=" " + ", ".join(drawn.references),
            references=drawn.references,
            depths=tuple(before[i] for i, (_, asked) in enumerate(pieces) if asked),
        )

    def _haystack(self, drawn: _Drawn, rng: np.random.Generator) -> Iterator[str]:
        """Endless haystack."""
        if self._kind.haystack == "noise":
            return itertools.repeat(REPEATED)
        if self._kind.haystack == "text":
            count = len(self._sentences)
            return (self._sentences[i % count] for i in itertools.count(drawn.start))
        return self._unasked(drawn, rng)

    def _unasked(self, drawn: _Drawn, rng: np.random.Generator) -> Iterator[str]:
        """Endless needles with other keys and values than the asked ones."""
        while True:
            key, value = self._key(rng), self._value(rng)
            if key not in drawn.keys and value not in drawn.references:
                yield self._needle(key, value)

    def _placed(self, rng: np.random.Generator, needles: list[_Needle]) -> tuple[_Needle, ...]:
        """The needles with their depths, sorted by them."""
        if self._kind.haystack == "text":
            drawn = np.sort(rng.choice(_DEPTHS, len(needles), replace=False)) / 100
        else:
            drawn = np.sort(rng.random(len(needles)))
        fixed = self._settings["depth"]
        placed = [
            dataclasses.replace(
                needle, share=float(s) if fixed is None or not needle.asked else fixed / 100
            )
            for needle, s in zip(needles, drawn, strict=True)
        ]
        return tuple(sorted(placed, key=lambda needle: needle.share))

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(type=self._kind.values, key=key, value=value)

    def _key(self, rng: np.random.Generator) -> str:
        return self._drawn(rng, self._kind.keys)

    def _value(self, rng: np.random.Generator) -> str:
        return self._drawn(rng, self._kind.values)

    def _drawn(self, rng: np.random.Generator, kind: Kind) -> str:
        """A key or a value."""
        if kind == "uuids":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if kind == "words":
            return "-".join(words[rng.integers(len(words))] for words in self._words)
        least = 10 ** (self._settings["value_digits"] - 1)
        return str(rng.integers(least, 10 * least))

    def _worded(self, template: str, single: bool, keys: Sequence[str]) -> str:
        """A template for the asked keys; RULER's own replacements make it a singular."""
        kind: str = self._kind.values
        if single:
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = kind.removesuffix("s")
        query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
        return template.replace("{type}", kind).replace("{query}", query)


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    """That many different draws."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
