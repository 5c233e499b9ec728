"""All settings of the Parametric Memory in one validated place."""

import dataclasses
import math
from typing import Literal

FFN_MODULES = ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Settings of fast weights, trajectory, inner loop and meta-gradient (paper, section 4).

    Attributes:
        steps: K, inner steps; 1 stops after pre-anchor alignment, 2 is the paper's default, more
            put K - 2 intermediate states between pre-anchor and anchor.
        learning_rate: eta of the inner SGD.
        clip_norm: bound on the norm of each gradient matrix, ``None`` for no clipping.
        pre_anchor_scale: s >= 1; the pre-anchor state masks min(M, floor(s n)) of M maskable
            positions where the anchor masks n.
        adapter: ``lora`` (A random, B = 0) or ``full`` (one dense matrix, zero at the start).
        rank: r of a LoRA fast weight.
        alpha: a LoRA fast weight is scaled by alpha / rank.
        layer_fraction: in (0, 1]; the layers from ``int(n_layers * (1 - fraction))`` on adapt.
        target_modules: paths of the adapted matrices inside a layer.
        scope: who shares fast weights: ``example`` (every row has its own) or ``global`` (one for
            the whole batch, whatever the devices).
        meta_gradient: ``first_order`` (the paper: the fast weights are constants of the outer
            loss), ``trunk_stopped`` (exact through fast weights and head layers) or ``exact``.
        prompt_mask_ratio: anchor mask ratio when a prompt is written into memory, in (0, 1].
    """

    steps: int = 2
    learning_rate: float = 0.1
    clip_norm: float | None = 1.0
    pre_anchor_scale: float = 1.5
    adapter: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: float = 64.0
    layer_fraction: float = 0.1
    target_modules: tuple[str, ...] = FFN_MODULES
    scope: Literal["example", "global"] = "example"
    meta_gradient: Literal["first_order", "trunk_stopped", "exact"] = "first_order"
    prompt_mask_ratio: float = 0.2

    def __post_init__(self):
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        clip_ok = self.clip_norm is None or self.clip_norm > 0
        _require(clip_ok, "clip_norm", self.clip_norm, "positive, or None for no clipping")
        scale = self.pre_anchor_scale
        _require(1 <= scale < math.inf, "pre_anchor_scale", scale, "finite and at least 1")
        _one_of("adapter", self.adapter, ("lora", "full"))
        _require(self.rank >= 1, "rank", self.rank, "at least 1")
        _require(self.alpha > 0, "alpha", self.alpha, "positive")
        _require(0 < self.layer_fraction <= 1, "layer_fraction", self.layer_fraction, "in (0, 1]")
        _require(bool(self.target_modules), "target_modules", self.target_modules, "non-empty")
        _one_of("scope", self.scope, ("example", "global"))
        _one_of("meta_gradient", self.meta_gradient, ("first_order", "trunk_stopped", "exact"))
        ratio = self.prompt_mask_ratio
        _require(0 < ratio <= 1, "prompt_mask_ratio", ratio, "in (0, 1]")


def _require(ok: bool, field: str, value: object, right: str) -> None:
    if not ok:
        raise ValueError(f"memory.{field}={value!r} must be {right}")


def _one_of(field: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, field, value, "one of " + ", ".join(map(repr, choices)))
