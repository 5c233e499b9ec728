"""All that changes from one training step to the next."""

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from memdlm_jax.training import optimizer
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.typing import Theta


@flax.struct.dataclass
class TrainState:
    """State between two optimiser steps.

    Attributes:
        step: int32, optimiser steps taken.
        theta: base parameters.
        optimizer_state: optax's state for them.
    """

    step: Int[Array, ""]
    theta: Theta
    optimizer_state: optax.OptState


def create(theta: Theta, config: OptimizerConfig) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), theta, optimizer.build(config).init(theta))
