"""The benchmark tasks under one roof: which are asked, how long, how often, and how scored."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.filler import Filler
from memdlm_jax.data.text import Split, check_at_least, check_choice
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.evaluation import babi, babilong
from memdlm_jax.evaluation.babilong import BabilongConfig, BabilongTask
from memdlm_jax.evaluation.ruler import (
    TASKS,
    QuestionSet,
    RulerConfig,
    RulerTask,
    TokenCounter,
    read_hotpot,
    read_squad,
)
from memdlm_jax.evaluation.ruler.config import STANDARD
from memdlm_jax.evaluation.ruler.floors import chance_floor

BABILONG: tuple[str, ...] = tuple(f"babilong_{task}" for task in babi.TASKS)
NAMES: tuple[str, ...] = (*TASKS, *BABILONG)

_SAMPLES_OF_LEAST_LENGTH = 131_072


@dataclasses.dataclass(frozen=True)
class Variant:
    """Changes to the definitions, for small models; ``None`` is the definition's value.

    A change holds for the tasks that have the setting; results of a changed task are labelled
    (``Cell.is_standard``) and say which (``Cell.changes``).

    Attributes:
        max_new_tokens: tokens that an answer may have, of every task.
        key_split: RULER: words of the keys from one split of ``data.needles``.
        value_digits: RULER: digits of values that are numbers.
        num_keys: RULER: keys of ``niah_multikey_1`` and ``niah_multiquery``.
        num_values: RULER: values of ``niah_multivalue``.
        num_hops: RULER: hops of ``ruler_vt``.
        num_common: RULER: words of ``ruler_cwe``.
        with_example: RULER: the solved example of ``ruler_vt`` and ``ruler_cwe``.
        template: BABILong: ``short`` leaves out instruction and examples.
        short_stories: BABILong: half as many sentences in qa3.
    """

    max_new_tokens: int | None = None
    key_split: Split | None = None
    value_digits: int | None = None
    num_keys: int | None = None
    num_values: int | None = None
    num_hops: int | None = None
    num_common: int | None = None
    with_example: bool | None = None
    template: babi.Template | None = None
    short_stories: bool | None = None

    def of(self, task: str) -> dict[str, Any]:
        """The changes that a task has."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if task in BABILONG:
            known = {"max_new_tokens", "template"}
            known |= {"short_stories"} if task == "babilong_qa3" else set()
        else:
            known = set(STANDARD[task])
        return {name: value for name, value in given.items() if name in known}


@dataclasses.dataclass(frozen=True)
class TaskSuite:
    """Cells of a comparison: every task at every length with every seed.

    Attributes:
        names: tasks, of ``NAMES``.
        lengths: tokens of the whole canvas, chat template and answer included; 0 is without
            filler: BABILong's "0k", RULER's least length.
        samples: questions of each cell, at least 2.
        seeds: of the questions, one cell each; also of memory and noise while they are answered.
        depths: needles of RULER: where they stand, in % of the context, in turn; empty draws.
        variant: changes to the definitions.
        babilong: folder of the original BABILong; empty generates. Its file of length 4096 is
            ``4k``, and chat template and answer come on top.
        squad: SQuAD 2.0 file of ``ruler_qa_squad``; empty generates.
        hotpot: HotpotQA file of ``ruler_qa_hotpot``; empty generates.
    """

    names: tuple[str, ...] = ("niah_multivalue", "ruler_vt", "ruler_cwe", "babilong_qa1")
    lengths: tuple[int, ...] = (4096, 8192)
    samples: int = 100
    seeds: tuple[int, ...] = (0,)
    depths: tuple[float, ...] = ()
    variant: Variant = dataclasses.field(default_factory=Variant)
    babilong: str = ""
    squad: str = ""
    hotpot: str = ""

    def __post_init__(self):
        for field in ("names", "lengths", "seeds"):
            values = getattr(self, field)
            if not values:
                raise ValueError(f"tasks.{field} is empty: at least one value is needed")
            if len(set(values)) < len(values):
                raise ValueError(f"tasks.{field}={values} must not repeat a value")
        for name in self.names:
            check_choice("tasks.names", name, NAMES)
        for field, least in (("lengths", 0), ("seeds", 0)):
            for value in getattr(self, field):
                check_at_least(f"tasks.{field}", value, least)
        check_at_least("tasks.samples", self.samples, 2)
        if self.depths and not any(name.startswith("niah") for name in self.names):
            raise ValueError(f"tasks.depths={self.depths} must be empty: no task has needles")
        for field, tasks in (
            ("babilong", BABILONG),
            ("squad", ("ruler_qa_squad",)),
            ("hotpot", ("ruler_qa_hotpot",)),
        ):
            if getattr(self, field) and not set(tasks) & set(self.names):
                raise ValueError(
                    f"tasks.{field}={getattr(self, field)!r} must be empty: none of its tasks "
                    "is asked"
                )


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt, and what a right reply holds.

    Attributes:
        index: its number in the cell.
        example: the prompt; the start of the answer, if there is one, opens the response.
        references: what the score looks for.
        depth: where what is asked for stands in the context, in [0, 1]; ``None`` if that is not one
            place.
        same: what it asks: equal for questions of several cells that differ in their filler alone,
            or that come from one line of a file.
    """

    index: int
    example: Example
    references: tuple[str, ...]
    depth: float | None
    same: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """The questions of one task at one length with one seed.

    Attributes:
        task: its name.
        length: tokens of the canvas; 0 without filler.
        seed: of the questions.
        questions: all of them.
        answer_tokens: tokens that an answer may have.
        floors: score -> what an answer scores that has understood nothing: naming things of the
            context at random, or always saying the same; without those that nobody knows.
        is_standard: whether it is the definition's task with the given text, not a variant.
        changes: the settings that make it one.
        score: (index, reply) -> scores of a reply to a question, each in [0, 1]; the first one is
            the task's own.
    """

    task: str
    length: int
    seed: int
    questions: tuple[Question, ...]
    answer_tokens: int
    floors: dict[str, float]
    is_standard: bool
    changes: dict[str, Any]
    score: Callable[[int, str], dict[str, float]] = dataclasses.field(repr=False)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores, the task's own first."""
        return ("contains", "strict") if self.task in BABILONG else ("score",)


def cells(suite: TaskSuite, tokenizer: Tokenizer, sentences: Sequence[str]) -> Iterator[Cell]:
    """The questions of every cell: a pure function of suite, tokenizer and text.

    Args:
        suite: which ones.
        tokenizer: measures lengths.
        sentences: text of the haystacks, of the tasks that have text.

    Raises:
        ValueError: a length is too short for a task, or an answer too long for its tokens; before
            the first cell is given out where it does not take the sample itself to know.
        FileNotFoundError: a file of questions is not there.
    """
    counter, filler = TokenCounter(tokenizer), None
    if not suite.babilong and set(BABILONG) & set(suite.names) and max(suite.lengths) > 0:
        filler = Filler(sentences, tokenizer)
    files = {
        "ruler_qa_squad": read_squad(suite.squad) if suite.squad else None,
        "ruler_qa_hotpot": read_hotpot(suite.hotpot) if suite.hotpot else None,
    }
    for name in suite.names:
        for length in suite.lengths:
            for seed in suite.seeds:
                if name in BABILONG:
                    yield _babilong_cell(suite, name, length, seed, tokenizer, filler)
                else:
                    documents = files.get(name)
                    yield _ruler_cell(
                        suite, name, length, seed, tokenizer, counter, sentences, documents
                    )


def _ruler_cell(
    suite: TaskSuite,
    name: Any,
    length: int,
    seed: int,
    tokenizer: Tokenizer,
    counter: TokenCounter,
    sentences: Sequence[str],
    documents: QuestionSet | None,
) -> Cell:
    reserved = tokenizer.turn_tokens
    changes: dict[str, Any] = {**suite.variant.of(name), "seed": seed, "reserved_tokens": reserved}
    depths: Sequence[float | None] = suite.depths if name.startswith("niah") else ()

    def task(tokens: int, depth: float | None = None) -> RulerTask:
        given = changes if depth is None else changes | {"depth": depth}
        config = RulerConfig(name, length=tokens, **given)
        return RulerTask(config, counter, sentences=sentences, documents=documents)

    tokens = length or task(_SAMPLES_OF_LEAST_LENGTH).least_length
    tasks = [task(tokens, depth) for depth in depths or (None,)]
    if tasks[0].size is not None and tasks[0].size < suite.samples:
        raise ValueError(
            f"tasks.samples={suite.samples} must be at most {tasks[0].size} for {name} at length "
            f"{length}: so many questions of the file fit"
        )
    samples = [tasks[i % len(tasks)].sample(i) for i in range(suite.samples)]
    longest = max(sample.response_tokens for sample in samples)
    if longest > tasks[0].max_new_tokens:
        raise ValueError(
            f"tasks.variant.max_new_tokens={tasks[0].max_new_tokens} must be at least {longest} "
            f"for {name} at length {length}: so many tokens has the longest answer"
        )
    found = [chance_floor(sample) for sample in samples]
    floors = [floor for floor in found if floor is not None]
    return Cell(
        task=name,
        length=length,
        seed=seed,
        questions=tuple(
            Question(
                sample.index,
                sample.example(f"{name} {length} {seed} {sample.index}"),
                sample.references,
                sample.depths[0] if name.startswith("niah") and len(sample.depths) == 1 else None,
                # Questions of a file come again at other lengths and seeds.
                f"{name} {sample.prompt.rsplit('Question:', 1)[-1]}"
                if documents is not None
                else f"{name} {length} {seed} {sample.index}",
            )
            for sample in samples
        ),
        answer_tokens=tasks[0].max_new_tokens,
        floors={"score": float(np.mean(floors))} if floors else {},
        # A fixed depth changes where, not what is asked.
        is_standard=task(tokens).is_standard and all(s.is_standard for s in samples if not depths),
        changes=suite.variant.of(name),
        score=lambda index, reply: {"score": tasks[0].score(samples[index], reply)},
    )


def _babilong_cell(
    suite: TaskSuite,
    name: str,
    length: int,
    seed: int,
    tokenizer: Tokenizer,
    filler: Filler | None,
) -> Cell:
    question: Any = name.removeprefix("babilong_")
    changes = suite.variant.of(name)
    config = BabilongConfig(question, length=0, seed=seed, **changes)
    if suite.babilong:
        if length % 1024:
            raise ValueError(
                f"tasks.lengths has {length}: with tasks.babilong it must be 0 or a multiple of "
                "1024, whose files are named 0k, 1k, 2k .."
            )
        label = f"{length // 1024}k"
        rows = babilong.load_folder(suite.babilong, question, label, config.template)
        if len(rows) < suite.samples:
            raise ValueError(
                f"tasks.samples={suite.samples} must be at most {len(rows)}: so many samples has "
                f"{name} at {label} in {suite.babilong}"
            )
        order = np.random.default_rng(seed).permutation(len(rows))[: suite.samples]
        samples, asked = [rows[i] for i in order], [f"{name} line {i}" for i in order]
    else:
        if length:
            room = max(length - tokenizer.turn_tokens, 1)
            config = dataclasses.replace(config, length=room)
        task = BabilongTask(config, tokenizer, filler or ())
        samples = [task.sample(index) for index in range(suite.samples)]
        # One story at every length, unless it was too long for it.
        asked = [f"{name} {seed} {sample.facts} {sample.question}" for sample in samples]
    floor = babilong.majority_floor(samples)[1]
    return Cell(
        task=name,
        length=length,
        seed=seed,
        questions=tuple(
            Question(i, sample.example(f"{name} {length} {seed} {i}"), (sample.target,), None, same)
            for i, (sample, same) in enumerate(zip(samples, asked, strict=True))
        ),
        answer_tokens=config.max_new_tokens,
        floors=dict.fromkeys(("contains", "strict"), floor),
        is_standard=config.is_standard,
        changes=changes,
        score=lambda index, reply: babilong.score(samples[index], reply),
    )
