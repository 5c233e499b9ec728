"""Masking schedules: how likely a token is masked at time t, and how its loss is weighed.

A schedule is a small frozen dataclass. A new one needs ``alpha``, ``alpha_derivative`` and one
line in ``SCHEDULES``; a config then names it (``schedule.name``).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memdlm_jax.registry import SCHEDULES
from memdlm_jax.typing import Key


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all schedules share; ``alpha`` falls from 1 at t = 0 to 0 at t = 1.

    Attributes:
        minimum_time: smallest t that is drawn, in (0, 1]; 1e-3 in the paper. The loss weight grows
            without bound at t = 0, so a larger value bounds the variance of the gradient.
        sampling: ``iid`` draws each row's time alone (the paper); ``low_discrepancy`` draws one
            offset for the batch and spreads the rows evenly over [0, 1) (Kingma et al.,
            arXiv 2107.00630, appendix I).
    """

    minimum_time: float = 1e-3
    sampling: Literal["iid", "low_discrepancy"] = "iid"

    def __post_init__(self):
        if not 0.0 < self.minimum_time <= 1.0:
            raise ValueError(f"minimum_time={self.minimum_time} must lie in (0, 1]")
        if self.sampling not in ("iid", "low_discrepancy"):
            raise ValueError(f"sampling={self.sampling!r} must be 'iid' or 'low_discrepancy'")

    def alpha(self, t: jax.Array) -> jax.Array:
        """Probability that a token is still visible at time t."""
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """Derivative of ``alpha`` with respect to t; never positive."""
        raise NotImplementedError(f"{type(self).__name__} must define alpha_derivative(t)")

    def mask_ratio(self, t: jax.Array) -> jax.Array:
        """Probability that a token is masked at time t, 1 - alpha(t)."""
        return 1.0 - self.alpha(t)

    def weight(self, t: jax.Array) -> jax.Array:
        """Weight of a masked token's loss, w(t) = -alpha'(t) / (1 - alpha(t)).

        The denominator is increased by 1e-6, as in the public code, in the dtype of ``t``.
        """
        return -self.alpha_derivative(t) / (self.mask_ratio(t) + 1e-6)

    def time_at(self, ratio: jax.Array) -> jax.Array:
        """Time at which a token is masked with probability ``ratio``: inverse of ``mask_ratio``."""

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            below = self.mask_ratio(middle) < ratio
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        steps = jnp.finfo(jnp.result_type(ratio, jnp.float32)).nmant + 2
        bounds = jnp.zeros_like(ratio), jnp.ones_like(ratio)
        return jax.lax.fori_loop(0, steps, halve, bounds)[1]

    def sample_times(self, key: Key, rows: int) -> Float[Array, "b"]:
        """Draw t = eps + (1 - eps) u for every row; float32 in [minimum_time, 1)."""
        if self.sampling == "iid":
            u = jax.random.uniform(key, (rows,))
        else:
            u = (jax.random.uniform(key, ()) + jnp.arange(rows) / rows) % 1.0
        return self.minimum_time + (1.0 - self.minimum_time) * u


@SCHEDULES.register("linear")
@dataclasses.dataclass(frozen=True)
class LinearSchedule(Schedule):
    """alpha(t) = 1 - t, w(t) = 1 / t: the schedule of the paper."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """1 - t."""
        return 1.0 - t

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """-1."""
        return -jnp.ones_like(t)

    def mask_ratio(self, t: jax.Array) -> jax.Array:
        """Exactly t: 1 - (1 - t) would lose digits of a small t."""
        return t

    def time_at(self, ratio: jax.Array) -> jax.Array:
        """The ratio itself."""
        return ratio


@SCHEDULES.register("cosine")
@dataclasses.dataclass(frozen=True)
class CosineSchedule(Schedule):
    """alpha(t) = 1 - cos(pi / 2 (1 - t)) (Nichol and Dhariwal, arXiv 2102.09672; MDLM, MD4)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """1 - cos(pi / 2 (1 - t))."""
        return 1.0 - jnp.cos(math.pi / 2 * (1.0 - t))

    def alpha_derivative(self, t: jax.Array) -> jax.Array:
        """-pi / 2 sin(pi / 2 (1 - t))."""
        return -math.pi / 2 * jnp.sin(math.pi / 2 * (1.0 - t))
