"""Write a prompt into memory before decoding (paper, section 4.5: Train & Inference)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from memdlm_jax import partitioning
from memdlm_jax.diffusion import masking
from memdlm_jax.memory import fast_weights, inner_loop, learned, losses, meta_gradient, walk
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
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Adapt fast weights to each row's own prompt, every row alone.

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
        phi: fast weights that have been written before, one group per row; ``None`` starts afresh.

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
    if phi is None:
        phi = learned.started(inner, fast_weights.init(phi_key, denoiser, config, rows))
    return adapt_to(denoiser, config, theta, phi, trajectory, valid, position_ids, inner)


def write_prompts(
    keys: Key,
    denoiser: Denoiser,
    config: MemoryConfig,
    theta: Theta,
    tokens: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Write each row's prompt into fast weights of its own, with a key of its own.

    With ``config.prompt_chunk`` a prompt is cut into as many pieces of about one size as it takes
    for each to have at most so many tokens, and they are written one after the other, each read
    alone, from position 0 on.

    Args:
        keys: [b] one PRNG key per row.
        denoiser: the backbone.
        config: memory settings.
        theta: base parameters.
        tokens: [b, p] int32, beginning in column 0.
        valid: [b, p] bool, False on what is not prompt.
        inner: the learned inner loop's parameters.
        phi: fast weights that have been written before, one group per row; ``None`` starts afresh.

    Returns:
        (phi with one group per row, record of the inner steps [steps, rows]; with pieces
        [pieces, steps, rows], NaN for the pieces that a shorter prompt does not have).
    """

    def write(key, tokens, valid, phi):
        rows = tokens[None], valid[None]
        phi = None if phi is None else jax.tree.map(lambda leaf: leaf[None], phi)
        if config.prompt_chunk:
            phi, record = _write_pieces(key, denoiser, config, theta, *rows, inner, phi)
        else:
            phi, record = write_prompt(key, denoiser, config, theta, *rows, inner=inner, phi=phi)
        return jax.tree.map(lambda leaf: leaf[0], phi), jax.tree.map(lambda x: x[..., 0], record)

    mapped = partitioning.map_groups(write, len(tokens), out_axes=(0, -1))
    return mapped(keys, tokens, valid, phi)


def _write_pieces(key, denoiser, config, theta, tokens, valid, inner, phi):
    """``write_prompt`` of one row's pieces, in order."""
    width = min(config.prompt_chunk, tokens.shape[1])
    count = jnp.sum(valid)
    size = -(-count // jnp.maximum(-(-count // width), 1))
    phi_key, key = jax.random.split(key)
    if phi is None:
        phi = learned.started(inner, fast_weights.init(phi_key, denoiser, config, 1))

    def write(phi, number):
        own = jnp.arange(width)
        at = number * size + own
        present = (own < size) & (at < count)
        piece = jnp.where(present, tokens[0, jnp.minimum(at, tokens.shape[1] - 1)], 0)
        new, record = write_prompt(
            jax.random.fold_in(key, number), denoiser, config, theta, piece[None], present[None],
            inner=inner, phi=phi,
        )  # fmt: skip
        there = jnp.any(present)
        new = jax.tree.map(lambda a, b: jnp.where(there, a, b), new, phi)
        none = dataclasses.replace(
            record,
            loss=jnp.where(there, record.loss, jnp.nan),
            gradient_norm=jnp.where(there, record.gradient_norm, jnp.nan),
            skipped=record.skipped & there,
        )
        return new, none

    return jax.lax.scan(write, phi, jnp.arange(-(-tokens.shape[1] // width)))


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
        phi: where the inner loop starts, leaves [groups, ...]; a learned start is not put into it.
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
    reader = walk.Reader(denoiser, config, theta, valid, position_ids, groups)
    steps = walk.head_states(reader, trajectory)
    loss = losses.build(denoiser, config) if inner_loss is None else inner_loss
    return inner_loop.adapt(
        inner_loop.constant_gradient(loss), theta, phi, steps,
        meta_gradient.optimizer_of(config, inner, inner_optimizer),
    )  # fmt: skip
