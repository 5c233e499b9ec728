"""Write a prompt into memory before decoding (paper, section 4.5: Train & Inference)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from memdlm_jax.diffusion import masking
from memdlm_jax.memory import fast_weights, inner_loop, learned, losses, meta_gradient
from memdlm_jax.memory import trajectory as trajectories
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerStep
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.memory.losses import InnerLoss
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.typing import Batch, Denoiser, Key, Mask, Phi, Theta, Tokens


def write_prompt(
    key: Key,
    denoiser: Denoiser,
    config: MemoryConfig,
    theta: Theta,
    tokens: Tokens,
    valid: Mask,
    position_ids: Tokens | None = None,
    inner: InnerParameters | None = None,
) -> tuple[Phi, InnerStep]:
    """Adapt fresh fast weights to each row's own prompt, every row alone.

    Every valid prompt token is maskable and its own target; the anchor masks each with probability
    ``prompt_mask_ratio``, the states before it as in training, and all rows weigh the same (the
    public code's inference path). Nothing is dropped.

    Args:
        key: PRNG key.
        denoiser: the backbone.
        config: memory settings; the scope is always ``example`` here, the weighting ``uniform``.
        theta: base parameters.
        tokens: [b, l] int32 prompts, padded on either side.
        valid: [b, l] bool, False on padding.
        position_ids: [b, l] int32, or ``None`` for 0 .. l-1.
        inner: the learned inner loop's parameters.

    Returns:
        (phi with one group per row, record of the inner steps).
    """
    phi_key, anchor_key, mask_key = jax.random.split(key, 3)
    rows = tokens.shape[0]
    anchor = masking.bernoulli_mask(anchor_key, valid, jnp.full((rows,), config.prompt_mask_ratio))
    uniform = dataclasses.replace(config, weighting="uniform")
    trajectory = trajectories.draw(
        mask_key, uniform, Batch(tokens, valid, valid), anchor, jnp.ones((rows,)),
        denoiser.mask_token_id, rows,
    )  # fmt: skip
    if config.distils and trajectory.after is None:
        anchor_tokens = masking.apply_mask(tokens, anchor, denoiser.mask_token_id)
        trajectory = dataclasses.replace(trajectory, after=anchor_tokens)
    phi = fast_weights.init(phi_key, denoiser, config, rows)
    return adapt_to(denoiser, config, theta, phi, trajectory, valid, position_ids, inner)


def adapt_to(
    denoiser: Denoiser,
    config: MemoryConfig,
    theta: Theta,
    phi: Phi,
    trajectory: Trajectory,
    valid: Mask,
    position_ids: Tokens | None = None,
    inner: InnerParameters | None = None,
    *,
    inner_loss: InnerLoss | None = None,
    inner_optimizer: optax.GradientTransformation | None = None,
) -> tuple[Phi, InnerStep]:
    """Run the inner loop over given states; no gradient flows to theta.

    Args:
        denoiser: the backbone.
        config: memory settings.
        theta: base parameters.
        phi: phi_0, leaves [groups, ...].
        trajectory: the states; its teachers must read tokens of its own.
        valid: [b, l] bool.
        position_ids: [b, l] int32, or ``None`` for 0 .. l-1.
        inner: the learned inner loop's parameters.
        inner_loss: see ``meta_gradient.outer_loss``.
        inner_optimizer: see ``meta_gradient.outer_loss``.

    Returns:
        (adapted phi, record of the inner steps).
    """
    groups = fast_weights.number_of_groups(phi)
    steps = meta_gradient.head_states(
        denoiser, config, theta, trajectory, valid, position_ids, groups
    )
    loss = losses.build(denoiser, config) if inner_loss is None else inner_loss
    return inner_loop.adapt(
        inner_loop.constant_gradient(loss), theta, learned.started(inner, phi), steps,
        meta_gradient.optimizer_of(config, inner, inner_optimizer),
    )  # fmt: skip
