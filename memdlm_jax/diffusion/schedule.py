"""The linear masking schedule: alpha(t) = 1 - t, its loss weight, and how times are drawn."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memdlm_jax.typing import Key


@dataclasses.dataclass(frozen=True)
class LinearSchedule:
    """alpha(t) = 1 - t: at time t each maskable token is masked with probability t.

    Attributes:
        minimum_time: smallest t that is drawn, in (0, 1]; 1e-3 in the paper. The loss weight is
            1/t, so a larger value bounds the variance of the gradient.
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

    def sample_times(self, key: Key, rows: int) -> Float[Array, "b"]:
        """Draw t = eps + (1 - eps) u for every row; float32 in [minimum_time, 1)."""
        if self.sampling == "iid":
            u = jax.random.uniform(key, (rows,))
        else:
            u = (jax.random.uniform(key, ()) + jnp.arange(rows) / rows) % 1.0
        return self.minimum_time + (1.0 - self.minimum_time) * u


def alpha(t: jax.Array) -> jax.Array:
    """Probability that a token is still visible at time t; linear schedule."""
    return 1.0 - t


def loss_weight(t: jax.Array) -> jax.Array:
    """Weight w(t) = -alpha'(t) / (1 - alpha(t)) = 1/t of a masked token's loss.

    The public code adds 1e-6 to the denominator; so do we, in the dtype of ``t``.
    """
    return 1.0 / ((1.0 - alpha(t)) + 1e-6)
