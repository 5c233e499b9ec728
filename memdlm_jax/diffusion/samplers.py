"""Settings of the decode loop, those of the published samplers by name, and the plan of a block."""

import dataclasses
import itertools
import math
import typing
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Quotas = Literal["even", "scheduler", "timesteps"]
Order = Literal["confidence", "margin", "entropy", "random", "independent"]


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How a window of masks is turned into text.

    The defaults are LLaDA's sampler (Nie et al., arXiv 2502.09992); ``SAMPLERS`` has the others.

    Attributes:
        length: tokens to generate.
        block_length: tokens of a block, blocks being filled one after the other; 0 for one block.
        steps: denoising steps in all, the same number for every block; 0 for as many as tokens.
            With a threshold or ``stop``, and with quotas that are zero, fewer are taken.
        quotas: commits of each step of a block. ``even`` shares them evenly, the first steps
            taking the remainder (LLaDA); ``scheduler`` rounds the expected number under the linear
            schedule, half to even (dLLM); ``timesteps`` rounds it down, on times from 1 to 0.001,
            and leaves the rest to the last step (Dream). The latter two may leave out steps.
        order: which proposals are committed first. ``confidence``: the most probable (LLaDA's
            low-confidence remasking, Dream's ``maskgit_plus``); ``margin``: the largest distance
            between the two most probable tokens; ``entropy``: the least uncertain; ``random``;
            ``independent``: each position by its own coin, no fixed number (Dream's ``origin``).
        order_temperature: 0 takes the best, more draws positions by softmax(score / temperature)
            (Dream's ``alg_temp``).
        threshold: commit all proposals more probable than this, or the step's quota if they are
            fewer; ``None`` for quotas alone.
        editing_threshold: overwrite tokens committed in the current block when another is argmax
            and more probable than this (LLaDA2.1); 0 overwrites every one that changed, ``None``
            none.
        post_steps: steps for editing alone after a block's last mask, until one changes nothing.
        temperature: of the sampling; 0 takes the most probable token.
        noise: precision of the Gumbel noise; ``float64`` needs JAX's 64-bit mode.
        top_k: sample among so many most probable tokens; 0 for all.
        top_p: sample among the most probable tokens that together reach this; 1 for all.
        scores: the distribution that probabilities and scores are read from: the ``model``'s own
            (LLaDA), or the ``sampled`` one, tempered and truncated (Dream).
        guidance: classifier-free guidance; logits are u + (guidance + 1) (c - u), with u of the
            canvas whose prompt is masked (memory stays, as in the public code). 0 for none.
        guidance_keep: prompt tokens that u still sees.
        suppress: tokens that are never generated.
        defer: tokens that are proposed, but count as least confident (LLaDA's
            ``confidence_eos_eot_inf``).
        stop: a row that has generated one of these is finished at the end of the block; answers in
            text also stop at the tokenizer's ends.
        attention: ``full``, or ``block_causal``: a token sees its own block and those before it.
        alignment: blocks begin at the end of the ``prompt``, or are counted from the ``row``'s
            first token (LLaDA2), so that the first block may hold the prompt's end.
        cache: what is kept from step to step. ``none``; ``prefix``: keys and values of all that
            stands before the block, exact under block-causal attention; ``dual``: of what stands
            behind it, too (Fast-dLLM, arXiv 2505.22618). Full attention makes both approximations,
            refreshed when a block begins.
    """

    length: int = 128
    block_length: int = 32
    steps: int = 0
    quotas: Quotas = "even"
    order: Order = "confidence"
    order_temperature: float = 0.0
    threshold: float | None = None
    editing_threshold: float | None = None
    post_steps: int = 16
    temperature: float = 0.0
    noise: Literal["float32", "float64"] = "float32"
    top_k: int = 0
    top_p: float = 1.0
    scores: Literal["model", "sampled"] = "model"
    guidance: float = 0.0
    guidance_keep: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    defer: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    attention: Literal["full", "block_causal"] = "full"
    alignment: Literal["prompt", "row"] = "prompt"
    cache: Literal["none", "prefix", "dual"] = "none"

    def __post_init__(self):
        for field, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, field)
            if typing.get_origin(hint) is Literal:
                listed = ", ".join(map(repr, typing.get_args(hint)))
                self._require(field, value in typing.get_args(hint), f"one of {listed}")
            elif hint is int:
                self._require(field, type(value) is int, "a whole number")
            elif typing.get_origin(hint) is tuple:
                whole = isinstance(value, tuple) and all(type(token) is int for token in value)
                self._require(field, whole, "a tuple of whole numbers")
            else:
                number = type(value) in (int, float) or (value is None and hint is not float)
                self._require(field, number, "a number")
        self._require("length", self.length >= 1, "at least 1")
        for field in ("temperature", "order_temperature", "guidance"):
            self._require(field, 0 <= getattr(self, field) < math.inf, "at least 0 and finite")
        for field in ("block_length", "steps", "top_k", "post_steps"):
            self._require(field, getattr(self, field) >= 0, "at least 0")
        for field in ("temperature", "order_temperature"):
            value = getattr(self, field)
            self._require(field, not 0 < value < 1e-4, "0, or at least 1e-4: logits would overflow")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        for field in ("threshold", "editing_threshold"):
            value = getattr(self, field)
            self._require(field, value is None or 0 <= value <= 1, "in [0, 1], or None")
        for field in ("guidance_keep", "suppress", "defer", "stop"):
            tokens = getattr(self, field)
            self._require(field, all(token >= 0 for token in tokens), "token ids")
        self._check_blocks()
        self._check_pairs()

    def _check_blocks(self) -> None:
        if self.alignment == "prompt" and self.length % self.block_size:
            raise ValueError(
                f"decode.block_length={self.block_length} must divide length={self.length}"
            )
        blocks = -(-self.length // self.block_size)
        if self.steps % blocks and self.quotas != "scheduler":
            raise ValueError(f"decode.steps={self.steps} must be a multiple of the {blocks} blocks")
        if self.quotas == "even" and self.steps_per_block > self.block_size:
            raise ValueError(
                f"decode.steps={self.steps} must be at most length={self.length} with "
                "quotas='even': every step commits a token"
            )

    def _check_pairs(self) -> None:
        sequential = self.threshold is None and self.editing_threshold is None
        if self.order == "independent" and not (sequential and self.order_temperature == 0):
            raise ValueError(
                "decode.order='independent' knows no threshold, no editing and no order_temperature"
            )
        if self.attention == "block_causal" and self.cache == "dual":
            raise ValueError(
                "decode.cache='dual' with attention='block_causal': nothing behind a block is "
                "seen, 'prefix' holds all there is"
            )

    def _require(self, field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ValueError(f"decode.{field}={getattr(self, field)!r} must be {right}")

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.block_length or self.length

    @property
    def num_blocks(self) -> int:
        """Blocks that a window can take: one more where a prompt's end may stand in the first."""
        most = self.length + (self.block_size - 1) * (self.alignment == "row")
        return -(-most // self.block_size)

    @property
    def steps_per_block(self) -> int:
        """Denoising steps of a block, editing after its last mask not counted."""
        if not self.steps:
            return self.block_size
        # dLLM rounds up where blocks do not divide steps; the other rules ask that they do.
        return -(-self.steps // -(-self.length // self.block_size))


SAMPLERS: dict[str, DecodeConfig] = {
    "llada": DecodeConfig(),
    "dllm": DecodeConfig(quotas="scheduler"),
    "llada2": DecodeConfig(
        threshold=0.95, attention="block_causal", alignment="row", cache="prefix"
    ),
    "llada2_1_quality": DecodeConfig(
        threshold=0.7, editing_threshold=0.5, attention="block_causal", alignment="row",
        cache="prefix",
    ),
    "llada2_1_speed": DecodeConfig(
        threshold=0.5, editing_threshold=0.0, attention="block_causal", alignment="row",
        cache="prefix",
    ),
    "dream": DecodeConfig(
        length=512, block_length=0, quotas="timesteps", order="entropy",
        temperature=0.2, top_p=0.95, scores="sampled",
    ),
    "fast": DecodeConfig(threshold=0.9, cache="dual"),
}  # fmt: skip
"""Published samplers with their published settings (lengths are yours to set): LLaDA, dLLM's
``MDLMSampler``, LLaDA2.0, the two modes of LLaDA2.1, Dream, and Fast-dLLM on LLaDA. LLaDA2's
stop at the end of a block that holds an eos needs ``stop``."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the steps of one block commit.

    Attributes:
        quota: [s] int32, commits of each step.
        share: [s] float32, probability with which a masked position commits; of ``independent``.
    """

    quota: Int[np.ndarray, "s"]
    share: Float[np.ndarray, "s"]


def plan(config: DecodeConfig) -> Plan:
    """The plan of a block that begins with masks alone; steps without a commit are left out."""
    count, steps = config.block_size, config.steps_per_block
    if config.quotas == "even":
        quotas = even_quotas(count, steps)
        share = np.array(quotas, np.float32) / np.cumsum(quotas[::-1])[::-1]
        return Plan(np.array(quotas, np.int32), share.astype(np.float32))
    if config.quotas == "scheduler":
        times = [(steps - i) / steps for i in range(steps + 1)]
    else:
        times = list(np.linspace(1, 1e-3, steps + 1, dtype=np.float32))
    share = np.array([1 - s / t for t, s in itertools.pairwise(times)], np.float32)
    share[-1] = 1
    round_off = round if config.quotas == "scheduler" else math.floor
    quotas = []
    for now, then in itertools.pairwise(times):
        left = count - sum(quotas)
        last = len(quotas) == steps - 1
        quotas.append(left if last else min(left, round_off(left * (1 - then / now))))
    kept = [step for step in range(steps) if quotas[step] or config.order == "independent"]
    return Plan(np.array(quotas, np.int32)[kept], share[kept])


def most_steps(config: DecodeConfig) -> int:
    """Steps that a block can take."""
    edits = 0 if config.editing_threshold is None else config.post_steps
    return len(plan(config).quota) + edits


def even_quotas(count: int, steps: int) -> list[int]:
    """Commits of each step when ``count`` positions are shared evenly over ``steps``.

    The first ``count % steps`` steps commit one more, as LLaDA's sampler does (Nie et al.,
    arXiv 2502.09992, low-confidence remasking).

    Raises:
        ValueError: a step would commit nothing.
    """
    if not 1 <= steps <= count:
        raise ValueError(f"steps={steps} must lie in [1, {count}]: every step commits a token")
    base, more = divmod(count, steps)
    return [base + (step < more) for step in range(steps)]
