"""All that changes from one training step to the next."""

import flax.struct
import jax
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
    """State before the first step.

    Raises:
        ValueError: if a parameter is narrower than float32, naming it. AdamW's updates are smaller
            than what bfloat16 resolves and would be lost; let the activations be narrow instead.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        if jnp.finfo(leaf.dtype).bits < 32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"theta/{name} is {leaf.dtype}, must be float32 or wider: narrower parameters lose "
                "the optimiser's updates to rounding (the model's activations may be narrower)"
            )
    return TrainState(jnp.zeros((), jnp.int32), theta, optimizer.build(config).init(theta))
