"""Prompts of an exact length for any tokenizer: counts of pieces are added, the sum is checked."""

import bisect
import dataclasses
import re
from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol

import numpy as np

_CACHED = 200_000
_TRIES = 6
# Before white space, and after the hyphens of a uuid or a compound.
_CUTS = re.compile(r"(?<=\S)(?=\s)|(?<=-)(?=\w)")
_ANCHOR = "."


class Encodes(Protocol):
    """A tokenizer: ours, or a public one."""

    def encode(self, text: str, /) -> Sized:
        """The tokens of a text."""


TokenizerLike = Encodes | Callable[[str], Sized]
"""An object with ``encode`` (such as those of ``transformers``), or the function itself.

Only the number of tokens is used.
"""


class TokenCounter:
    """Counts tokens; counts of pieces are remembered.

    One counter can serve any number of tasks and lengths.
    """

    def __init__(self, tokenizer: TokenizerLike):
        """Wrap ``tokenizer``; tokens that it adds by itself to a text are counted once a prompt.

        Raises:
            TypeError: it has no ``encode`` and is no function.
            ValueError: a longer text has no more tokens for it than a short one.
        """
        encode = getattr(tokenizer, "encode", tokenizer)
        # A string has an ``encode`` of another kind.
        if isinstance(tokenizer, str) or not callable(encode):
            raise TypeError(
                f"tokenizer={tokenizer!r} must have encode(text) or be a function of a text"
            )
        self._encode: Callable[[str], Sized] = encode
        self._pieces: dict[str, int] = {}
        self._anchor = self.count(_ANCHOR)
        once, often = (self.count("The grass is green. " * times) for times in (1, 20))
        if once < 1 or often <= once:
            raise ValueError(
                f"tokenizer={tokenizer!r} gives {once} tokens for a sentence and {often} for 20 of "
                "them: lengths cannot be measured; it must give the tokens of the text, one each"
            )

    def count(self, text: str) -> int:
        """Tokens of a whole text."""
        return len(self._encode(text))

    def piece(self, text: str) -> int:
        """Tokens that ``text`` adds where other text stands before it, at least 1.

        Measured behind a full stop, so that neither a token for the start of a text nor a space
        that a tokenizer puts there counts.
        """
        if text not in self._pieces:
            if len(self._pieces) >= _CACHED:
                self._pieces.clear()
            self._pieces[text] = max(1, self.count(_ANCHOR + text) - self._anchor)
        return self._pieces[text]

    def first_words(self, text: str, room: int, lead: str = "") -> str:
        """The longest start of ``text``, not all of it, that ends a word and fits.

        Args:
            text: what to cut; a word with hyphens may be cut behind one.
            room: tokens for ``lead`` and the start together.
            lead: what stands before it.

        Returns:
            The start; empty if not even the first word fits.
        """
        cuts = [match.start() for match in _CUTS.finditer(text)]
        found = bisect.bisect_right(cuts, room, key=lambda cut: self.piece(lead + text[:cut]))
        return text[: cuts[found - 1]] if found else ""

    def take(self, texts: Iterable[str], room: int, lead: str) -> tuple[list[str], str]:
        """As many texts as fit, in order, and the first words of the next.

        Args:
            texts: may be endless.
            room: tokens for all, each with ``lead`` before it.
            lead: what stands between two texts.

        Returns:
            (whole texts, start of the next; empty if no word of it fits).
        """
        taken: list[str] = []
        for text in texts:
            cost = self.piece(lead + text)
            if cost > room:
                return taken, self.first_words(text, room, lead)
            taken.append(text)
            room -= cost
        return taken, ""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt before its length is known.

    Attributes:
        question: all but the start of the answer.
        separator: what stands between the two.
        prefix: the start of the answer.
        response: what a right answer goes on with, leading space included.
        references: what the score looks for.
        depths: share of the context's tokens before each thing to find, in [0, 1].
        is_standard: False where the definition's material ran out.
    """

    question: str
    separator: str
    prefix: str
    response: str
    references: tuple[str, ...]
    depths: tuple[float, ...] = ()
    is_standard: bool = True

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.question + self.separator + self.prefix


class Builder(Protocol):
    """How one kind of task makes its prompts.

    Attributes:
        size: number of questions; ``None`` for no end.
    """

    size: int | None

    def draw(self, rng: np.random.Generator, index: int) -> Any:
        """What is asked in sample ``index``: the parts that no length changes."""

    def build(self, drawn: Any, rng: np.random.Generator, room: int) -> Draft:
        """The prompt with about ``room`` tokens more than its fixed parts; 0 is those alone."""


def fit(
    build: Callable[[int], Draft], counter: TokenCounter, limit: int
) -> tuple[Draft, int] | None:
    """The draft that fills ``limit`` tokens best, without exceeding it.

    The sum of the pieces' tokens is not that of the text where a tokenizer merges across pieces.
    So the text is counted, and built again with more or less room if it misses by over 1 %.

    Args:
        build: room in tokens -> draft.
        counter: counts the text.
        limit: tokens of the prompt.

    Returns:
        (draft, its tokens); ``None`` if the fixed parts alone are too long.
    """
    best = build(0)
    least = most = counter.count(best.prompt)
    if least > limit:
        return None
    room = limit - least
    for _ in range(_TRIES):
        draft = build(room)
        tokens = counter.count(draft.prompt)
        if most < tokens <= limit:
            best, most = draft, tokens
        if 0.99 * limit <= tokens <= limit or tokens <= least:
            break
        # The pieces' sum and the text's tokens grow in proportion.
        room = room * (limit - least) // (tokens - least)
    return best, most


def shares(counts: list[int]) -> list[float]:
    """Share of the tokens before each piece and, last, before the end: [pieces + 1], 0 to 1."""
    ends = np.cumsum([0, *counts])
    return (ends / max(1, int(ends[-1]))).tolist()
