"""AdamW with warm-up and decay, as one validated config and one optax chain."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from memdlm_jax.typing import Theta


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the outer optimiser; the defaults are the paper's (section 5).

    Attributes:
        total_steps: optimiser steps over which the learning rate is scheduled.
        learning_rate: its peak.
        warmup_fraction: in [0, 1); share of ``total_steps`` in which the rate rises linearly.
        schedule: ``cosine`` or ``constant`` after the warm-up.
        end_fraction: in [0, 1]; rate at the end of ``cosine`` as a share of the peak.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment.
        weight_decay: decoupled decay of the matrices, see ``decayed``.
        clip_norm: bound on the global norm of the gradient, ``None`` for no clipping.
        inner_scale: learning rate of learned inner learning rates, in multiples of
            ``learning_rate``: they are logarithms and move little at theta's pace.
        accumulation: micro-batches that a batch is cut into, each with draws of its own.
    """

    total_steps: int
    learning_rate: float = 2e-5
    warmup_fraction: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    end_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    inner_scale: float = 100.0
    accumulation: int = 1

    def __post_init__(self):
        for field in ("total_steps", "accumulation"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        for field in ("learning_rate", "epsilon", "inner_scale"):
            self._require(field, getattr(self, field) > 0, "positive")
        for field in ("beta1", "beta2", "warmup_fraction"):
            self._require(field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        choices = ("cosine", "constant")
        self._require("schedule", self.schedule in choices, "'cosine' or 'constant'")
        self._require("end_fraction", 0 <= self.end_fraction <= 1, "in [0, 1]")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        clip_ok = self.clip_norm is None or self.clip_norm > 0
        self._require("clip_norm", clip_ok, "positive, or None for no clipping")

    def _require(self, field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ValueError(f"optimizer.{field}={getattr(self, field)!r} must be {right}")


def learning_rate_at(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Learning rate of optimiser step ``step`` (from 0), float32.

    The first step already moves: it has 1/warm-up steps of the peak.
    """
    warmup = math.ceil(config.warmup_fraction * config.total_steps)
    rising = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
    if config.schedule == "constant":
        return config.learning_rate * rising
    progress = jnp.clip((step - warmup) / max(config.total_steps - warmup, 1), 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    falling = config.end_fraction + (1.0 - config.end_fraction) * cosine
    return config.learning_rate * rising * falling


def build(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; ``accumulation`` is the train step's business."""
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(lambda step: learning_rate_at(config, step)),
        _scale_rates(config.inner_scale),
    )


def _scale_rates(factor: float) -> optax.GradientTransformation:
    def scale(path, update):
        rate = _of_inner_loop(path) and getattr(path[1], "name", "") == "log_rates"
        return update * factor if rate else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _of_inner_loop(path) -> bool:
    """Whether a parameter is one of ``parameters.WithInner.inner``."""
    return bool(path) and getattr(path[0], "name", "") == "inner"


def decayed(theta: Theta) -> Theta:
    """Tell for every leaf whether weight decay applies to it.

    The rule is by name, as stacked norm scales look like matrices: no decay under ``embedding`` or
    a name ending in ``norm``, nor on a ``scale`` or a name ending in ``bias``, nor on a learned
    inner loop. The unembedding and adapters decay.
    """

    def rule(path, leaf) -> bool:
        del leaf
        parts = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        names = "/".join(parts).split("/")
        spared = any(name == "embedding" or name.endswith("norm") for name in names)
        spared = spared or _of_inner_loop(path)
        return not (spared or names[-1] == "scale" or names[-1].endswith("bias"))

    return jax.tree_util.tree_map_with_path(rule, theta)
