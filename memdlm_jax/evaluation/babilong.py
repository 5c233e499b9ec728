"""BABILong qa1 .. qa5 (Kuratov et al., arXiv 2406.10149): facts hidden in real text.

The prompt is that of the public lm-evaluation-harness to the character (tasks babilong_qa1 ..
babilong_qa5). Stories and text are local (``babi.draw_story``, any sentences), so results are
"BABILong-style (local)" and not comparable with published ones; ``load_folder`` reads the original
samples.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from memdlm_jax import storage
from memdlm_jax.data.example import Example
from memdlm_jax.data.filler import Filler, Piece
from memdlm_jax.data.needles import string_match_all
from memdlm_jax.data.text import check_at_least, check_choice
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.evaluation.babi import (
    LABELS,
    TASKS,
    Story,
    Task,
    Template,
    check_short,
    draw_story,
    format_prompt,
)

MAX_NEW_TOKENS = 16
"""Tokens of an answer in the harness; too few for a tokenizer of bytes."""

LEAST_FILLED = 0.95
"""Share of the length that a sample fills at least, unless it has no filler."""

_TRIAL_STORIES = 64
_DRAWS = 1000
_STARTS = 100


@dataclasses.dataclass(frozen=True)
class BabilongConfig:
    """One task at one length.

    Attributes:
        task: ``qa1`` .. ``qa5``.
        length: tokens of the whole prompt and ``max_new_tokens`` together, at most; 0 is BABILong's
            "0k", facts without filler. The original's "4k" is about 4000 tokens of GPT-2, with 300
            for the instruction. The tokens of a chat template are not in it: where they count,
            take ``tokenizer.turn_tokens`` off the model's window first.
        max_new_tokens: tokens left for the answer; the harness's 16 is too short for tokenizers
            that are close to bytes.
        template: ``public`` or, for small models, ``short`` (see ``format_prompt``).
        short_stories: for small models, half as many sentences in the stories of qa3.
        seed: of the stream of samples.
    """

    task: Task = "qa1"
    length: int = 1024
    max_new_tokens: int = MAX_NEW_TOKENS
    template: Template = "public"
    short_stories: bool = False
    seed: int = 0

    def __post_init__(self):
        check_choice("task", self.task, TASKS)
        check_choice("template", self.template, get_args(Template))
        check_at_least("length", self.length, 0)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("seed", self.seed, 0)
        check_short("short_stories", self.short_stories, self.task)

    @property
    def is_standard(self) -> bool:
        """Whether prompt, stories and answers are those of the definition, not a variant."""
        return (
            self.template == "public"
            and not self.short_stories
            and self.max_new_tokens == MAX_NEW_TOKENS
        )


@dataclasses.dataclass(frozen=True)
class BabilongSample:
    """A question about a text, and its answer.

    Attributes:
        task: which one.
        prompt: what the model reads.
        question: the last line of the prompt.
        target: the right answer, one word.
        facts: the sentences among the filler, in order; empty for samples of a file, whose facts
            are not marked.
        positions: for each fact, how many pieces of filler stand before it; never falling.
        num_filler: pieces of filler, sentences but for the last two, which may be cut.
        length: tokens of the prompt and the answer's budget; ``None`` for samples of a file.
        passed_over: stories drawn before this one that were too long.
    """

    task: Task
    prompt: str
    question: str
    target: str
    facts: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    num_filler: int = 0
    length: int | None = None
    passed_over: int = 0

    def example(self, group: str) -> Example:
        """The sample as a row: the prompt is the user's turn, the target the response."""
        return Example(self.prompt, self.target, group, "babilong")


class BabilongTask:
    """Samples of one task: ``sample(index)`` is a pure function of settings and text.

    As in BABILong, sample ``index`` tells the same story at every length: what differs is the
    filler. A story too long for the length is passed over for the next of the same index, as
    BABILong drops samples of too many facts; so short lengths have shorter stories, and
    ``BabilongSample.passed_over`` counts.

    The construction is BABILong's: filler in the order of its source from a random sentence on,
    facts in their order at gaps between its sentences drawn uniformly with replacement. What is
    ours: a space joins sentences, and the length is exact in the given tokenizer and counts all of
    the prompt.
    """

    def __init__(
        self, config: BabilongConfig, tokenizer: Tokenizer, filler: Sequence[str] | Filler = ()
    ):
        """Tokenise the filler and check that there are stories that fit.

        Args:
            config: the task.
            tokenizer: counts the length.
            filler: sentences of real text, those with a digit are left out; counting goes round,
                so a text shorter than the length comes more than once. A ``Filler`` can be shared
                by several tasks. Not read at length 0.

        Raises:
            ValueError: of 64 stories none fits ``length``, or there is no filler where it is
                needed.
        """
        self.config = config
        self._tokenizer = tokenizer
        if config.length == 0:
            return
        self._filler = filler if isinstance(filler, Filler) else Filler(filler, tokenizer)
        stories = (self._story(self._rng(index, 0)) for index in range(_TRIAL_STORIES))
        needed = [self._count(self._bare(story)) for story in stories]
        if min(needed) > config.length:
            raise ValueError(
                f"length={config.length} must be at least {min(needed)}: so many tokens take the "
                f"prompt and max_new_tokens={config.max_new_tokens} of the shortest of "
                f"{_TRIAL_STORIES} stories of {config.task}"
            )

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer."""
        return self.config.max_new_tokens

    def score(self, sample: BabilongSample, reply: str) -> dict[str, float]:
        """The function ``score``."""
        return score(sample, reply)

    def sample(self, index: int) -> BabilongSample:
        """Sample ``index``, at least 0.

        Unless ``length`` is 0, its tokens are at most ``length`` and at least 95 % of it.

        Raises:
            ValueError: none of 1000 stories fits, or the filler cannot be cut to the length.
        """
        check_at_least("index", index, 0)
        length = self.config.length
        for draw in range(_DRAWS):
            rng = self._rng(index, draw)
            story = self._story(rng)
            tokens = self._count(self._bare(story))
            if length == 0:
                return self._sample(story, self._bare(story), tokens)
            if tokens <= length:
                return self._fill(story, length - tokens, rng, draw)
        raise ValueError(
            f"length={length} must be greater: {_DRAWS} stories of {self.config.task} at index "
            f"{index} do not fit"
        )

    def _rng(self, index: int, draw: int) -> np.random.Generator:
        c = self.config
        return np.random.default_rng([c.seed, TASKS.index(c.task), index, draw])

    def _story(self, rng: np.random.Generator) -> Story:
        return draw_story(self.config.task, rng, self.config.short_stories)

    def _bare(self, story: Story) -> str:
        """The prompt without filler."""
        return self._prompt(story, story.facts)

    def _prompt(self, story: Story, sentences: Sequence[str]) -> str:
        return format_prompt(
            self.config.task, " ".join(sentences), story.question, self.config.template
        )

    def _count(self, prompt: str) -> int:
        """Tokens of a prompt and its answer."""
        return len(self._tokenizer.encode(prompt)) + self.config.max_new_tokens

    def _fill(
        self, story: Story, room: int, rng: np.random.Generator, passed_over: int
    ) -> BabilongSample:
        """Put a story into about ``room`` tokens of filler."""
        length = self.config.length
        for _ in range(_STARTS):
            start, budget, tokens = int(rng.integers(len(self._filler))), room, length + 1
            # Counts of pieces add up unless a tokenizer merges across them, or the first piece
            # costs more without the space before it: then once more with less.
            while tokens > length:
                filler = self._filler.take(start, budget)
                positions = np.sort(rng.integers(0, len(filler) + 1, len(story.facts))).tolist()
                prompt = self._prompt(story, _insert(filler, story.facts, positions))
                tokens = self._count(prompt)
                budget -= max(tokens - length, 0)
            if tokens >= LEAST_FILLED * length:
                return self._sample(story, prompt, tokens, positions, len(filler), passed_over)
        raise ValueError(
            f"filler: cut before a word at {_STARTS} places, it left more than "
            f"{1 - LEAST_FILLED:.0%} of length={length} empty; take text of shorter words, or a "
            "tokenizer that marks the start of a word with a space"
        )

    def _sample(
        self,
        story: Story,
        prompt: str,
        tokens: int,
        positions: Sequence[int] = (),
        num_filler: int = 0,
        passed_over: int = 0,
    ) -> BabilongSample:
        return BabilongSample(
            task=self.config.task,
            prompt=prompt,
            question=story.question,
            target=story.answer,
            facts=story.facts,
            positions=tuple(positions) or (0,) * len(story.facts),
            num_filler=num_filler,
            length=tokens,
            passed_over=passed_over,
        )


def _insert(filler: Sequence[Piece], facts: Sequence[str], positions: Sequence[int]) -> list[str]:
    """Filler with each fact before the piece of its position."""
    sentences = [piece.text for piece in filler]
    # From the back, so that every position still counts filler alone.
    for position, fact in reversed(list(zip(positions, facts, strict=True))):
        sentences.insert(position, fact)
    return sentences


def score(sample: BabilongSample, reply: str) -> dict[str, float]:
    """Both scores of a reply, each 0 or 1.

    ``contains`` is the harness's accuracy: the target occurs in the reply, in any case. A reply
    that lists every label has it right. ``strict`` is BABILong's own (babilong/metrics.py): in what
    stands before the first full stop, and before a context or example that the model goes on with,
    the target is the only label of the task that is not already in the question.
    """
    asked, said = sample.question.lower(), reply.lower()
    for end in (".", "<context>", "<example>"):
        said = said.split(end)[0]
    labels = {label.lower() for label in LABELS[sample.task]}
    named = {label for label in labels if label in said and label not in asked}
    return {
        "contains": string_match_all(reply, [sample.target]),
        "strict": float(named == {sample.target.lower()}),
    }


def majority_floor(samples: Sequence[BabilongSample]) -> tuple[str, float]:
    """The best constant answer to the samples, and the share in (0, 1] that it has right.

    Of equally good answers it is the first in the alphabet.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to answer")
    counts = Counter(sample.target for sample in samples)
    best = min(counts, key=lambda answer: (-counts[answer], answer))
    return best, counts[best] / len(samples)


def load_folder(
    path: str | Path, task: Task, length: str, template: Template = "public"
) -> list[BabilongSample]:
    """Original samples of one task and length, in the order of the file.

    Args:
        path: a copy of the data set RMT-team/babilong: ``data/qa1/4k.json`` or ``qa1/4k.json``
            in it is a JSON list of objects with the fields ``input``, ``question``, ``target``;
            ``.jsonl`` with one such object a line is read as well.
        task: which one.
        length: the name that the file has, such as ``0k`` or ``4k``.
        template: of the prompts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there are several such files, or one is not of this form; names file, sample
            and field.
    """
    check_choice("task", task, TASKS)
    check_choice("template", template, get_args(Template))
    file = _find(storage.path(path), task, length)
    return [_loaded(fields, place, task, template) for place, fields in _rows(file)]


def _find(path: Path, task: Task, length: str) -> Path:
    """The one file of a task and length."""
    folders = (path / "data" / task, path / task)
    asked = [folder / f"{length}{suffix}" for folder in folders for suffix in (".json", ".jsonl")]
    found = [file for file in asked if file.is_file()]
    if not found:
        raise FileNotFoundError(f"no BABILong file at any of {', '.join(map(str, asked))}")
    if len(found) > 1:
        raise ValueError(f"one file of {task} at {length} is needed: {', '.join(map(str, found))}")
    return found[0]


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Samples of a file, each with the words for its place."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{file}:{number}", _parsed(line, f"{file}:{number}")
        return
    rows = _parsed(text, str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must be a JSON list of samples, not {type(rows).__name__}")
    yield from ((f"{file}, sample {number}", fields) for number, fields in enumerate(rows))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error


def _loaded(fields: Any, place: str, task: Task, template: Template) -> BabilongSample:
    """A sample of its JSON object."""
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: must be a JSON object, not {type(fields).__name__}")
    for name in ("input", "question", "target"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            found = f"is {fields[name]!r}" if name in fields else "is missing"
            raise ValueError(f"{place}: field {name!r} {found}, must be a non-empty string")
    target, question = fields["target"].strip(), fields["question"].strip()
    if target not in LABELS[task]:
        raise ValueError(
            f"{place}: field 'target' is {target!r}, must be one of {', '.join(LABELS[task])}"
        )
    return BabilongSample(
        task=task,
        prompt=format_prompt(task, fields["input"], question, template),
        question=question,
        target=target,
    )
