"""Haystack text, tokenised once: whole sentences cut to an exact number of tokens."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from memdlm_jax.data.text import one_space
from memdlm_jax.data.tokenizer import Tokenizer

_WORD_STARTS = ("Ġ", "▁")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of context.

    Attributes:
        text: the text alone.
        ids: ids of the separator and the text.
    """

    text: str
    ids: list[int]


class Filler:
    """Sentences in the order of their source, joined by a space or a line break.

    Attributes:
        separator: what stands between pieces of context.
    """

    def __init__(self, sentences: Sequence[str], tokenizer: Tokenizer, separator: str = " "):
        """Tokenise the sentences.

        Args:
            sentences: text; sentences with a digit are left out, so that no value of a needle
                stands in the filler by chance.
            tokenizer: any tokenizer.
            separator: put between pieces of context, ``" "`` or a line break.

        Raises:
            ValueError: no sentence is left.
        """
        texts = [one_space(s) for s in sentences if not any(c.isdigit() for c in s)]
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError(f"filler: of {len(sentences)} sentences none is free of digits")
        self._tokenizer = tokenizer
        self.separator = separator
        ids = tokenizer.encode_batch([separator + text for text in texts])
        self._pieces = [Piece(*pair) for pair in zip(texts, ids, strict=True)]
        self._by_length: dict[int, list[int]] = defaultdict(list)
        for index, piece in enumerate(self._pieces):
            self._by_length[len(piece.ids)].append(index)

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self._pieces)

    def piece(self, text: str) -> Piece:
        """Any text as a piece of context."""
        return Piece(text, self._tokenizer.encode(self.separator + text))

    def extra_at_start(self, piece: Piece) -> int:
        """Tokens that a piece costs more (or less) where it opens the context."""
        return len(self._tokenizer.encode(piece.text)) - len(piece.ids)

    def sentence(self, index: int) -> Piece:
        """Sentence ``index``; counting goes round."""
        return self._pieces[index % len(self._pieces)]

    def take(self, start: int, budget: int) -> list[Piece]:
        """Consecutive sentences from ``start`` on, of at most ``budget`` tokens together.

        The rest of the budget goes to a sentence of just that length where there is one, else to
        the first words of the next sentence. So less than a word's tokens are left over.

        Args:
            start: index of the first sentence; counting goes round.
            budget: tokens, separators included; at or below 0 gives no piece.
        """
        taken: list[Piece] = []
        while (piece := self.sentence(start + len(taken))) and len(piece.ids) <= budget:
            taken.append(piece)
            budget -= len(piece.ids)
        for _ in range(2):
            if same := self._by_length.get(budget):
                return [*taken, self._pieces[same[start % len(same)]]]
            piece = self._first_words(self.sentence(start + len(taken)), budget)
            if not piece.ids:
                return taken
            taken.append(piece)
            budget -= len(piece.ids)
        return taken

    def _first_words(self, piece: Piece, budget: int) -> Piece:
        """The longest start of a piece that ends before a word and has at most ``budget`` ids."""
        for cut in range(min(budget, len(piece.ids) - 1), 0, -1):
            if self._tokenizer.token(piece.ids[cut]).startswith(_WORD_STARTS):
                ids = piece.ids[:cut]
                return Piece(self._tokenizer.decode(ids).removeprefix(self.separator), ids)
        return Piece("", [])
