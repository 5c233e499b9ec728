"""Questions about a context, encoded so that the context can be taken away."""

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from memdlm_jax.data.example import Example, Message
from memdlm_jax.data.needles import NEEDLE, Episode
from memdlm_jax.data.sft import EncodeConfig, Encoder, Row
from memdlm_jax.data.tokenizer import Tokenizer

Condition = Literal["full", "removed", "masked", "blind"]
Span = tuple[int, int]
"""First column and the one behind the last."""

_HEAD = re.compile(r"(?:Some|A) special magic numbers? (?:are|is) hidden within [^\n]*\n")
_UNBOUNDED = 2**30


@dataclasses.dataclass(frozen=True)
class Passage:
    """A question about a context, as text; ``before``, ``context`` and ``after`` are one turn.

    Attributes:
        before: what opens the user's turn, such as an instruction; may be empty.
        context: what can be taken away.
        after: the rest of the turn, such as the question; may be empty.
        response: what a right answer goes on with.
        values: parts of the response that have to be retrieved, in its order; the references of
            the score.
        prefix: start of the answer, given to the model.
        needles: sentences of the context, one for each value, that hold it; empty if not known.
        all_values: values of the context, the asked ones among them; what a reply may confuse.
        depth: share of the context before the first needle, in [0, 1].
    """

    before: str
    context: str
    after: str
    response: str
    values: tuple[str, ...]
    prefix: str = ""
    needles: tuple[str, ...] = ()
    all_values: tuple[str, ...] = ()
    depth: float = 0.0

    def __post_init__(self):
        if not self.context.strip():
            raise ValueError("context is empty: there is nothing to take away")
        if not self.values:
            raise ValueError("values is empty: there is nothing to retrieve")
        if self.needles and len(self.needles) != len(self.values):
            raise ValueError(
                f"needles has {len(self.needles)} sentences; one for each of the "
                f"{len(self.values)} values is needed, or none"
            )

    def example(self, context: str) -> Example:
        """The passage as a row, with this context; the turn is there even if it is empty."""
        turn: Message = ("user", self.before + context + self.after)
        return Example((turn,), self.response, "probe", "probe", prefix=self.prefix)


@dataclasses.dataclass(frozen=True)
class Probe:
    """An encoded passage.

    Attributes:
        passage: its text.
        prompt: ids with the context, chat template and start of the answer included.
        context: the context's columns in ``prompt``; a token that is partly context is in.
        bare: ids of the same prompt with an empty context.
        response: ids of the response and the token that ends it.
        scored: places in ``response`` of the tokens that spell the values.
        needles: columns in ``prompt`` of the needles' sentences.
        values: columns in ``prompt`` of the values in them.
    """

    passage: Passage
    prompt: list[int]
    context: Span
    bare: list[int]
    response: list[int]
    scored: tuple[int, ...]
    needles: tuple[Span, ...] = ()
    values: tuple[Span, ...] = ()


def of_episode(episode: Episode) -> Passage:
    """The parts of a needle episode; together they are ``episode.example``, to the character.

    The question is the instruction, what is asked, and the start of the answer. The template
    ``short`` asks in the start of the answer alone: without context its turn is empty.
    """
    opening = _HEAD.match(episode.prompt)
    before = opening.group() if opening else ""
    end = episode.prompt.rindex("\n")
    after = episode.prompt[end:].removesuffix(episode.prefix).rstrip()
    return Passage(
        before=before,
        context=episode.prompt[len(before) : end],
        after=after,
        response=episode.response,
        values=episode.values,
        prefix=f" {episode.prefix}",
        needles=tuple(NEEDLE.format(key=episode.key, value=value) for value in episode.values),
        all_values=episode.all_values,
        depth=episode.depth,
    )


def conflict(asked: Passage, other: Passage) -> bool:
    """Whether an asked value stands in the other passage, so that it is no control for this one."""
    text = (other.before + other.context + other.after + other.prefix).lower()
    return any(value.lower() in text for value in asked.values)


def encode(passage: Passage, tokenizer: Tokenizer) -> Probe:
    """Encode a passage as in training, with its context and without.

    Lengths are not limited here.

    Raises:
        ValueError: the tokenizer does not keep the text, so that a part of it cannot be found
            among the tokens.
    """
    encoder = Encoder(tokenizer, EncodeConfig(_UNBOUNDED))
    with_context, without = (
        encoder.encode(passage.example(text)) for text in (passage.context, "")
    )
    if isinstance(with_context, str) or isinstance(without, str):
        raise AssertionError("nothing is dropped without a limit")
    prompt, response = _parts(with_context)
    bare, _ = _parts(without)
    spelled = tokenizer.decode(prompt, skip_special=False)
    # Templates may trim a turn; the context stands behind what opens it.
    context = passage.context.strip()
    opening = (passage.before + passage.context).strip()
    end = _find(spelled, opening, "before + context") + len(opening)
    start = end - len(context)
    needles, values = [], []
    for sentence, value in zip(passage.needles, passage.values, strict=bool(passage.needles)):
        at = start + _find(context, sentence, "needles")
        number = at + _find_last(sentence, value)
        needles.append(columns(tokenizer, prompt, at, at + len(sentence)))
        values.append(columns(tokenizer, prompt, number, number + len(value)))
    return Probe(
        passage=passage,
        prompt=prompt,
        context=columns(tokenizer, prompt, start, end),
        bare=bare,
        response=response,
        scored=_scored(passage, tokenizer, response[:-1]),
        needles=tuple(needles),
        values=tuple(values),
    )


def _parts(row: Row) -> tuple[list[int], list[int]]:
    return row.tokens[: row.prompt_length].tolist(), row.tokens[row.prompt_length :].tolist()


def _scored(passage: Passage, tokenizer: Tokenizer, response: list[int]) -> tuple[int, ...]:
    """Places of the tokens that spell the values."""
    text, at = tokenizer.decode(response, skip_special=False), 0
    places: set[int] = set()
    for value in passage.values:
        at += _find(text[at:], value, "values in the response,")
        places.update(range(*columns(tokenizer, response, at, at + len(value))))
        at += len(value)
    return tuple(sorted(places))


def _find(text: str, part: str, name: str) -> int:
    place = text.find(part)
    if place < 0:
        raise ValueError(
            f"{name} {part[:60]!r} is not found in {text[:60]!r}..: it must be there word for "
            "word, and the tokenizer must keep it"
        )
    return place


def _find_last(sentence: str, value: str) -> int:
    place = sentence.rfind(value)
    if place < 0:
        raise ValueError(f"needles has {sentence!r}, which must hold its value {value!r}")
    return place


def columns(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int) -> Span:
    """Columns of the tokens that spell characters ``start .. end - 1`` of the decoded ids."""

    def begun(count: int) -> int:
        return len(tokenizer.decode(ids[:count], skip_special=False))

    def complete(count: int) -> int:
        # Of a character whose last bytes are missing stands U+FFFD.
        return len(tokenizer.decode(ids[:count], skip_special=False).rstrip("\ufffd"))

    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, start, key=begun) - 1
    return first, bisect.bisect_left(counts, end, key=complete)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is shown of a probe.

    Attributes:
        tokens: ids of the prompt.
        invisible: columns that keep their place but that nobody attends to.
    """

    tokens: list[int]
    invisible: Span = (0, 0)


def asked(probe: Probe, condition: Condition, mask_token_id: int) -> Question:
    """A probe with its context in view, removed, masked token by token, or hidden from attention.

    ``masked`` and ``blind`` keep every position and the length of the context; ``removed`` tells
    nothing of it.
    """
    first, stop = probe.context
    if condition == "removed":
        return Question(probe.bare)
    if condition == "masked":
        masks = [mask_token_id] * (stop - first)
        return Question([*probe.prompt[:first], *masks, *probe.prompt[stop:]])
    return Question(probe.prompt, (first, stop) if condition == "blind" else (0, 0))


def written(probe: Probe, what: Literal["prompt", "context"]) -> list[int]:
    """The ids that are written into memory: the whole prompt, or the context alone."""
    return probe.prompt if what == "prompt" else probe.prompt[slice(*probe.context)]
