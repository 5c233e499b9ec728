"""RULER's variable tracking: a chain of assignments in noise, all of whose names are asked for."""

import dataclasses
import itertools
import re
import string
from collections.abc import Sequence

import numpy as np

from memdlm_jax.data.needles import REPEATED
from memdlm_jax.evaluation.ruler.config import RulerConfig
from memdlm_jax.evaluation.ruler.fitting import Draft, TokenCounter, shares

_QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
# "assgined" is RULER's spelling.
_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assgined the value {value}, they are:"
)
_LINE = REPEATED + "\n"
_EXAMPLE_LINES = 10
_EXAMPLE_LETTERS, _LETTERS = 3, 5


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Names in the order of their assignment, and the value of them all."""

    names: tuple[str, ...]
    value: str

    @property
    def statements(self) -> list[str]:
        """The assignments; RULER ends all but the first with a space."""
        hops = [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(self.names)]
        return [f"VAR {self.names[0]} = {self.value}", *hops]


class Tracking:
    """Prompts of ``ruler_vt``.

    A line of noise stands behind every statement or, where there are no more lines than
    statements, a sentence of it, as in RULER. Ours differs from the stock generator where that one
    breaks: noise is cut to a word to fill the length; a chain is never shortened, statements stand
    side by side where noise is short; and the solved example has ten lines whatever the tokenizer
    (the stock generator gives it what keeps it under 500 tokens, ten for the usual tokenizers).
    """

    size: int | None = None

    def __init__(self, config: RulerConfig, counter: TokenCounter):
        """Keep the settings of a ``ruler_vt`` task."""
        self._settings = config.settings
        self._counter = counter

    def draw(self, rng: np.random.Generator, index: int) -> tuple[str, _Chain]:
        """The solved example, empty for none, and the chain that is asked about."""
        del index  # There is no end of chains.
        count = self._settings["num_hops"] + 1
        chain = _chain(rng, count, _LETTERS, "")
        if not self._settings["with_example"]:
            return "", chain
        example = _chain(rng, count, _EXAMPLE_LETTERS, chain.value)
        draft = self._draft(rng, "", example, [_LINE] * _EXAMPLE_LINES)
        # The two spaces and the four line breaks are RULER's.
        return f"{draft.prompt}  {' '.join(example.names)}\n\n\n\n", chain

    def build(self, drawn: tuple[str, _Chain], rng: np.random.Generator, room: int) -> Draft:
        """The chain in ``room`` tokens of noise."""
        example, chain = drawn
        lines, rest = self._counter.take(itertools.repeat(_LINE), room, " ")
        return self._draft(rng, example, chain, [*lines, rest + "\n"] if rest else lines)

    def _draft(
        self, rng: np.random.Generator, example: str, chain: _Chain, noise: Sequence[str]
    ) -> Draft:
        """Statements in order between pieces of noise."""
        statements = chain.statements
        if len(noise) <= len(statements):
            noise = [s for line in noise for s in re.split(r"(?<=\.) (?=[A-Z])", line)]
        places = range(len(noise)) if noise else [0]
        chosen = np.sort(rng.choice(places, len(statements), len(noise) < len(statements)))
        pieces = [(text, False) for text in noise]
        for place, statement in reversed(list(zip(chosen, statements, strict=True))):
            pieces.insert(int(place), (statement, True))
        before = shares([self._counter.piece(" " + text) for text, _ in pieces])
        context = " ".join(text for text, _ in pieces)
        return Draft(
            question=example + _QUESTION.format(context=context, value=chain.value),
            separator=" ",
            prefix=_PREFIX.format(count=len(chain.names), value=chain.value),
            response=" " + " ".join(chain.names),
            references=chain.names,
            depths=tuple(before[i] for i, (_, hidden) in enumerate(pieces) if hidden),
        )


def _chain(rng: np.random.Generator, count: int, letters: int, other: str) -> _Chain:
    """A chain of ``count`` names whose value is not ``other``."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = "".join(rng.choice(list(string.ascii_uppercase), letters))
        # The example's names are of three letters, as is the word of an assignment.
        if name != "VAR":
            names[name] = None
    # RULER draws below 99999, and so does this.
    value = other
    while value == other:
        value = str(rng.integers(10_000, 99_999))
    return _Chain(tuple(names), value)
