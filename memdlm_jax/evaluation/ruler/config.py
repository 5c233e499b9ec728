"""Settings of the thirteen RULER tasks: which a task has, and which values are the standard."""

import dataclasses
from typing import Any, Literal, get_args

from memdlm_jax.data.text import SPLITS, Split, check_at_least, check_choice

TaskName = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
"""The tasks, by their names in the evaluation harness."""

NUM_DEPTHS = 40
"""Depths that RULER draws from: 0 % to 100 % of the text in equal steps."""

Haystack = Literal["noise", "text", "needles"]
Kind = Literal["words", "numbers", "uuids"]


@dataclasses.dataclass(frozen=True)
class NeedleKind:
    """What a needle task hides, and where.

    Attributes:
        haystack: ``noise`` repeats RULER's sentences about the grass, ``text`` is given text
            (RULER's is essays), ``needles`` is more needles that nobody asks for.
        keys: what the keys are.
        values: what the values are.
        asks_all: whether all keys are asked for, not the first alone.
    """

    haystack: Haystack
    keys: Kind = "words"
    values: Kind = "numbers"
    asks_all: bool = False


NEEDLE_KINDS: dict[str, NeedleKind] = {
    "niah_single_1": NeedleKind("noise"),
    "niah_single_2": NeedleKind("text"),
    "niah_single_3": NeedleKind("text", values="uuids"),
    "niah_multikey_1": NeedleKind("text"),
    "niah_multikey_2": NeedleKind("needles"),
    "niah_multikey_3": NeedleKind("needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleKind("text"),
    "niah_multiquery": NeedleKind("text", asks_all=True),
}


def _standard(task: str) -> dict[str, Any]:
    """The settings that a task has, with their standard values."""
    if task == "ruler_vt":
        return {"max_new_tokens": 30, "num_hops": 4, "with_example": True}
    if task == "ruler_cwe":
        return {"max_new_tokens": 120, "num_common": 10, "with_example": True}
    if task not in NEEDLE_KINDS:
        return {"max_new_tokens": 50 if task == "ruler_fwe" else 32}
    kind = NEEDLE_KINDS[task]
    found: dict[str, Any] = {"max_new_tokens": 128, "depth": None}
    if kind.keys == "words":
        found["key_split"] = None
    if kind.values == "numbers":
        found["value_digits"] = 7
    if task in ("niah_multikey_1", "niah_multiquery"):
        found["num_keys"] = 4
    if task == "niah_multivalue":
        found["num_values"] = 4
    return found


STANDARD: dict[str, dict[str, Any]] = {task: _standard(task) for task in TASKS}
"""Task -> its settings beside length and seed, with the values of the definition."""


@dataclasses.dataclass(frozen=True)
class RulerConfig:
    """One task at one length.

    ``None`` is the definition's value for every setting after ``reserved_tokens``. A setting that
    the task does not have may not be given, and any value but the definition's makes the task a
    variant (``is_standard``).

    Attributes:
        task: name of the task in the evaluation harness, one of ``TASKS``.
        length: tokens of the prompt, the start of the answer that ends it included, and
            ``max_new_tokens`` and ``reserved_tokens`` together: RULER's ``max_seq_length``.
        seed: of the samples, at least 0.
        reserved_tokens: tokens of ``length`` left free, for what a chat template adds.
        max_new_tokens: tokens of the answer's budget. The definition: needles 128, variable
            tracking 30, common words 120, frequent words 50, questions 32.
        depth: needles only: where the asked needles stand, in % of the context's tokens, for maps
            of depth and length. The definition draws: in text from 40 depths, elsewhere any.
        key_split: keys that are words: draw them from the held-out words of one split of
            ``data.needles`` instead of all.
        value_digits: values that are numbers: their digits (7).
        num_keys: keys of ``niah_multikey_1`` and ``niah_multiquery`` (4).
        num_values: values of the key of ``niah_multivalue`` (4).
        num_hops: hops of the chain of ``ruler_vt`` (4): one variable less than there are.
        num_common: words that ``ruler_cwe`` asks for (10).
        with_example: whether ``ruler_vt`` and ``ruler_cwe`` show a solved example first (yes).
    """

    task: TaskName
    length: int = 4096
    seed: int = 0
    reserved_tokens: int = 0
    max_new_tokens: int | None = None
    depth: float | None = None
    key_split: Split | None = None
    value_digits: int | None = None
    num_keys: int | None = None
    num_values: int | None = None
    num_hops: int | None = None
    num_common: int | None = None
    with_example: bool | None = None

    def __post_init__(self):
        check_choice("task", self.task, TASKS)
        check_at_least("length", self.length, 1)
        check_at_least("seed", self.seed, 0)
        check_at_least("reserved_tokens", self.reserved_tokens, 0)
        self._check_known()
        for name, value in self._given().items():
            if name.startswith("num_") or name in ("max_new_tokens", "value_digits"):
                check_at_least(name, value, 1)
        if self.with_example not in (None, True, False):
            raise ValueError(f"with_example={self.with_example!r} must be True or False")
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ValueError(f"depth={self.depth!r} must lie in [0, 100]: it is in %")
        if self.key_split is not None:
            check_choice("key_split", self.key_split, SPLITS)
        if self.task in NEEDLE_KINDS:
            self._check_needles()

    @property
    def settings(self) -> dict[str, Any]:
        """The task's settings beside length, seed and reserve, definition's values filled in."""
        found = STANDARD[self.task] | self._given()
        if self.depth is not None:  # 50 and 50.0 are one depth, and must draw the same.
            found["depth"] = float(self.depth)
        return found

    @property
    def is_standard(self) -> bool:
        """Whether every setting has the definition's value."""
        return self.settings == STANDARD[self.task]

    @property
    def answer_tokens(self) -> int:
        """Tokens that the answer may have."""
        return int(self.settings["max_new_tokens"])

    @property
    def num_needles(self) -> int:
        """Needles with a key of their own or an asked one; 0 where the task has none."""
        if self.task not in NEEDLE_KINDS:
            return 0
        return self.settings.get("num_keys", 1) * self.settings.get("num_values", 1)

    def _given(self) -> dict[str, Any]:
        """The optional settings that are not ``None``."""
        fixed = ("task", "length", "seed", "reserved_tokens")
        names = [f.name for f in dataclasses.fields(self) if f.name not in fixed]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _check_known(self) -> None:
        """Raise if a setting is given that the task does not have."""
        known = STANDARD[self.task]
        for name, value in self._given().items():
            if name not in known:
                raise ValueError(
                    f"{name}={value!r} is no setting of {self.task}, which has {', '.join(known)}"
                )

    def _check_needles(self) -> None:
        """Raise if there are not enough depths or numbers for the needles."""
        digits = self.settings.get("value_digits")
        numbers = NUM_DEPTHS if digits is None else 9 * 10 ** (digits - 1)
        # One more: needles that nobody asks for need a value of their own.
        others = NEEDLE_KINDS[self.task].haystack == "needles"
        if self.num_needles > NUM_DEPTHS or self.num_needles + others > numbers:
            raise ValueError(
                f"num_keys and num_values make {self.num_needles} needles: at most {NUM_DEPTHS} "
                f"(RULER's depths) have a place and value_digits={digits} gives {numbers} numbers"
            )
