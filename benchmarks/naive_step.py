"""The training step the public way: three whole forward passes, logits at every position.

Pre-anchor state, anchor state and, with the adapted fast weights, the anchor once more, each from
the embedding to logits of the whole vocabulary at the whole row: what every saving is measured
against (``benchmarks.step``). The numbers are those of ``meta_gradient='first_order'`` in
``global`` scope with the same draws (``tests/benchmarks/test_naive_step.py``).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import NoisyState
from memdlm_jax.parameters import Partitioned
from memdlm_jax.training import optimizer as optimizers
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import StepSetup, step_keys
from memdlm_jax.typing import Batch, Context, Denoiser, Key, Phi, Theta


def logits(denoiser: Denoiser, theta: Theta, phi: Phi, tokens: jax.Array, valid: jax.Array):
    """Logits at every position, [b, l, v]; ``phi`` of one group."""
    split = denoiser.num_layers - jax.tree.leaves(phi)[0].shape[0]
    context = Context(valid)
    hidden = denoiser.trunk(theta, tokens, context, split=split)
    last = denoiser.head(theta, phi, hidden, context, split=split)
    return denoiser.readout(theta, last)


def state_loss(
    denoiser: Denoiser, theta: Theta, phi: Phi, batch: Batch, state: NoisyState
) -> jax.Array:
    """Weighted sum of -log p over the masked positions, the labels of all others ignored."""
    log_p = jax.nn.log_softmax(logits(denoiser, theta, phi, state.tokens, batch.valid), axis=-1)
    nll = -jnp.take_along_axis(log_p, batch.tokens[..., None], axis=-1)[..., 0]
    masked = state.tokens != batch.tokens
    return jnp.sum(jnp.where(masked, nll, 0.0) * state.weight[:, None])


def naive_step(
    state: TrainState, batch: Batch, key: Key, setup: StepSetup, frozen: Theta = None
) -> tuple[TrainState, jax.Array]:
    """One optimiser step: (state after it, mean loss with memory).

    Args:
        state: before the step.
        batch: rows [b, l].
        key: PRNG key.
        setup: with a memory in ``global`` scope.
        frozen: what of theta is not trained.
    """
    inner_loop: Any = setup.inner_loop
    phi_key, anchor_key, mask_key, _ = step_keys(key)
    anchor = objective.draw_anchor(
        anchor_key, batch, setup.denoiser.mask_token_id, setup.schedule, capacity=setup.capacity
    )
    keys = phi_key, mask_key, None
    phi, trajectory = inner_loop.draw(keys, batch, anchor, setup.schedule)
    phi = jax.tree.map(lambda leaf: leaf[0], phi)
    optimizer = inner_loop.optimizer()

    def outer(trained):
        theta = trained if frozen is None else Partitioned(trained, frozen)
        fast, opt_state = phi, optimizer.init(phi)
        for at in trajectory.states:
            gradient = jax.grad(state_loss, 2)(setup.denoiser, theta, fast, batch, at)
            gradient = jax.lax.stop_gradient(gradient)
            updates, opt_state = optimizer.update(gradient, opt_state, fast)
            fast = optax.apply_updates(fast, updates)
        total = state_loss(setup.denoiser, theta, fast, batch, anchor.state)
        return total / jnp.maximum(batch.maskable.sum(), 1)

    loss, gradient = jax.value_and_grad(outer)(state.theta)
    updates, optimizer_state = optimizers.build(setup.optimizer).update(
        gradient, state.optimizer_state, state.theta
    )
    theta = optax.apply_updates(state.theta, updates)
    return TrainState(state.step + 1, theta, optimizer_state), loss
