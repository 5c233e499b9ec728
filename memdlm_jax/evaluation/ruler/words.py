"""RULER's two counting tasks: the commonest words of a list, the most frequent of a coded text."""

import dataclasses
import functools
import importlib.resources
import itertools
import math
import string
from collections.abc import Iterator, Sequence

import numpy as np

from memdlm_jax.data.text import one_space
from memdlm_jax.evaluation.ruler.config import RulerConfig
from memdlm_jax.evaluation.ruler.fitting import Draft, TokenCounter

_COMMON_QUESTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the {count} most common words in the above list?"
)
_COMMON_PREFIX = "Answer: The top {count} words that appear most often in the list are:"
_LONG = 4096
_TRIED_WORDS = 40

_CODED_QUESTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
_CODED_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
_CODED_LETTERS = 6
_ZETA_2 = math.pi**2 / 6


@functools.cache
def _words(*names: str) -> tuple[str, ...]:
    """The words of lists of ``wonderwords``, sorted."""
    try:
        folder = importlib.resources.files("wonderwords.assets")
    except ModuleNotFoundError as error:
        raise ImportError(
            "ruler_cwe needs the words of wonderwords: pip install memdlm_jax[corpus]"
        ) from error
    lines = (line for name in names for line in (folder / name).read_text().splitlines())
    return tuple(sorted({one_space(line) for line in lines if line.strip()}))


class CommonWords:
    """Prompts of ``ruler_cwe``.

    Below 4,096 tokens common words stand six times and the others once, from there on 30 and three
    times. As in RULER a solved example, worded as the question is, stands before the list and
    counts in the length; the harness counts one that it never shows (``with_example=False`` is its
    prompt, at its full length). Where the words of the lists run out, adjective-noun compounds go
    on as uncommon words and the sample is a variant; RULER goes on with another list.
    """

    size: int | None = None

    def __init__(self, config: RulerConfig, counter: TokenCounter):
        """Read the words.

        Raises:
            ValueError: more words are asked for than there are.
            ImportError: the word lists are not installed.
        """
        self._words = _words("nounlist.txt", "adjectivelist.txt", "verblist.txt")
        self._count: int = config.settings["num_common"]
        if 4 * self._count > len(self._words):
            raise ValueError(
                f"num_common={self._count} must be at most {len(self._words) // 4}: a fourth of "
                "the words"
            )
        self._with_example: bool = config.settings["with_example"]
        self._long = config.length >= _LONG
        self._repeats = (30, 3) if self._long else (6, 1)
        self._counter = counter

    def draw(self, rng: np.random.Generator, index: int) -> tuple[str, list[str]]:
        """The solved example, empty for none, and all words, the common ones first."""
        del index  # There is no end of lists.
        words = [self._words[i] for i in rng.permutation(len(self._words))]
        if not self._with_example:
            return "", words
        k = self._count
        chosen = rng.permutation(len(self._words))[: (4 if self._long else 2) * k]
        shown = [self._words[i] for i in chosen]
        often, seldom = (10, 3) if self._long else (3, 1)
        draft = self._draft(rng, "", shown[:k], shown[:k] * often + shown[k:] * seldom)
        return f"{draft.prompt}{draft.response}\n", words

    def build(self, drawn: tuple[str, list[str]], rng: np.random.Generator, room: int) -> Draft:
        """The list, with ``room`` tokens of uncommon words."""
        example, words = drawn
        common, rest = words[: self._count], words[self._count :]
        often, seldom = self._repeats
        entries = common * often
        uncommon = self._uncommon(rng, rest, len(entries), room)
        draft = self._draft(rng, example, common, entries + uncommon * seldom)
        return dataclasses.replace(draft, is_standard=set(uncommon) <= set(rest))

    def _uncommon(
        self, rng: np.random.Generator, words: Sequence[str], start: int, room: int
    ) -> list[str]:
        """Words that fill ``room`` with their numbers, which go on from ``start``."""
        found: list[str] = []
        seldom, missed = self._repeats[1], 0
        for word in itertools.chain(words, self._compounds(rng)):
            first = start + seldom * len(found) + 1
            numbers = (self._counter.piece(f" {i}.") for i in range(first, first + seldom))
            cost = seldom * self._counter.piece(" " + word) + sum(numbers)
            if cost <= room:
                found.append(word)
                room -= cost
            elif (missed := missed + 1) > _TRIED_WORDS:
                break
        return found

    def _compounds(self, rng: np.random.Generator) -> Iterator[str]:
        """Endless adjective-nouns, none twice."""
        lists, seen = (_words("adjectivelist.txt"), _words("nounlist.txt")), set(self._words)
        while True:
            word = "-".join(words[rng.integers(len(words))] for words in lists)
            if word not in seen:
                seen.add(word)
                yield word

    def _draft(
        self, rng: np.random.Generator, example: str, common: list[str], entries: list[str]
    ) -> Draft:
        """The prompt about a shuffled list."""
        shuffled = (entries[i] for i in rng.permutation(len(entries)))
        return Draft(
            question=example
            + _COMMON_QUESTION.format(context=_numbered(shuffled), count=self._count),
            separator="\n\n",
            prefix=_COMMON_PREFIX.format(count=self._count),
            response=f" {_numbered(iter(common))}",
            references=tuple(common),
        )


def _numbered(words: Iterator[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


class FrequentWords:
    """Prompts of ``ruler_fwe``.

    The word of rank k stands floor(n / (zeta(2) k^2)) times, rank 1 as dots. Ours differs from the
    stock generator, whose prompts may exceed the length: n is the largest that fits with its
    answer, that gives rank 4 a place and that leaves it ahead of rank 5, so the answer is never a
    tie; what is then left over is dots; and there are at least five words.
    """

    size: int | None = None

    def __init__(self, config: RulerConfig, counter: TokenCounter):
        """Set the size of the vocabulary: a 50th of the length."""
        self._vocabulary = max(5, config.length // 50)
        self._counter = counter
        self._least = next(n for n in itertools.count(1) if self._is_clear(n))

    def draw(self, rng: np.random.Generator, index: int) -> list[str]:
        """The words by rank; the first is the dots."""
        del index  # There is no end of coded texts.
        words: dict[str, None] = {"...": None}
        letters = np.asarray(list(string.ascii_lowercase))
        while len(words) < self._vocabulary:
            drawn = letters[rng.integers(26, size=(self._vocabulary, _CODED_LETTERS))]
            words |= dict.fromkeys("".join(word) for word in drawn)
        return list(words)[: self._vocabulary]

    def build(self, drawn: list[str], rng: np.random.Generator, room: int) -> Draft:
        """The coded text with ``room`` tokens more than the shortest."""
        room += self._cost(drawn, self._least)
        n, above = self._least, 2 * self._least
        while self._cost(drawn, above) <= room:
            n, above = above, 2 * above
        while above - n > 1:
            middle = (n + above) // 2
            n, above = (middle, above) if self._cost(drawn, middle) <= room else (n, middle)
        while not self._is_clear(n):
            n -= 1
        counts = self._counts(n)
        counts[0] += (room - self._cost(drawn, n)) // self._counter.piece(f" {drawn[0]}")
        text = [word for word, count in zip(drawn, counts, strict=True) for _ in range(count)]
        return Draft(
            question=_CODED_QUESTION.format(
                context=" ".join(text[i] for i in rng.permutation(len(text)))
            ),
            separator=" ",
            prefix=_CODED_PREFIX,
            response=" " + ", ".join(drawn[1:4]),
            references=tuple(drawn[1:4]),
        )

    def _cost(self, words: list[str], n: int) -> int:
        """Tokens of the coded text."""
        counts = self._counts(n)
        shown = zip(words, counts[: np.count_nonzero(counts)], strict=False)
        return sum(int(count) * self._counter.piece(f" {word}") for word, count in shown)

    def _counts(self, n: int) -> np.ndarray:
        """How often each rank stands in the text: [vocabulary] int."""
        ranks = np.arange(1, self._vocabulary + 1)
        return (n / (_ZETA_2 * ranks.astype(float) ** 2)).astype(int)

    def _is_clear(self, n: int) -> bool:
        """Whether ranks 2 to 4 alone are the most frequent words."""
        counts = self._counts(n)
        return bool(counts[3] > counts[4])
