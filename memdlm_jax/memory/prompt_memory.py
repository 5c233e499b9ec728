"""Write a prompt into memory before decoding (paper, section 4.5: Train & Inference)."""

import jax

from memdlm_jax.diffusion import masking
from memdlm_jax.memory import fast_weights, inner_loop, meta_gradient
from memdlm_jax.memory import trajectory as trajectories
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerStep
from memdlm_jax.typing import Batch, Denoiser, Key, Mask, Phi, Theta, Tokens


def write_prompt(
    key: Key,
    denoiser: Denoiser,
    config: MemoryConfig,
    theta: Theta,
    tokens: Tokens,
    valid: Mask,
    position_ids: Tokens | None = None,
) -> tuple[Phi, InnerStep]:
    """Adapt fresh fast weights to each row's own prompt, every row alone.

    Every valid prompt token is maskable and its own target; the anchor masks each with probability
    ``prompt_mask_ratio``, the states before it as in training, and all rows weigh the same (the
    public code's inference path).

    Args:
        key: PRNG key.
        denoiser: the backbone.
        config: memory settings; the scope is always ``example`` here.
        theta: base parameters.
        tokens: [b, l] int32 prompts, padded on either side.
        valid: [b, l] bool, False on padding.
        position_ids: [b, l] int32, or ``None`` for 0 .. l-1.

    Returns:
        (phi with one group per row, record of the inner steps).
    """
    phi_key, anchor_key, mask_key = jax.random.split(key, 3)
    rows = tokens.shape[0]
    ratio = jax.numpy.full((rows,), config.prompt_mask_ratio)
    anchor = masking.bernoulli_mask(anchor_key, valid, ratio)
    masks = trajectories.draw_masks(mask_key, valid, anchor, config.steps, config.pre_anchor_scale)
    states = trajectories.inner_states(
        Batch(tokens, valid, valid), masks, denoiser.mask_token_id, None, rows,
        uniform_weights=True,
    )  # fmt: skip
    phi = fast_weights.init(phi_key, denoiser, config, rows)
    return adapt_to_states(denoiser, config, theta, phi, states, valid, position_ids)


def adapt_to_states(
    denoiser: Denoiser, config: MemoryConfig, theta: Theta, phi: Phi, states, valid: Mask,
    position_ids: Tokens | None = None,
) -> tuple[Phi, InnerStep]:  # fmt: skip
    """Run the inner loop over given states; no gradient flows to theta.

    ``states`` are ``trajectory.State``; the other arguments are those of ``write_prompt``.
    """
    split = fast_weights.split_of(denoiser, config)
    groups = fast_weights.number_of_groups(phi)

    def loss(theta, phi, state):
        return meta_gradient.denoising_loss(denoiser, theta, phi, state, split=split)

    steps = [
        fast_weights.group_rows(
            (
                denoiser.trunk(theta, state.tokens, valid, position_ids, split=split),
                valid, position_ids, state.targets, state.weight,
            ),
            groups,
        )
        for state in states
    ]  # fmt: skip
    optimizer = inner_loop.inner_optimizer(config)
    return inner_loop.adapt(inner_loop.reverse_gradient(loss), theta, phi, steps, optimizer)
