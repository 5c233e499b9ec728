"""The anchor and the denoising states that the inner loop walks through.

Everything random of one step is drawn here, so that what follows is a deterministic function: a
replay puts recorded masks in the place of ``draw_anchor`` and ``draw_masks``.
"""

import fractions

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memdlm_jax.diffusion import masking, objective, schedule
from memdlm_jax.diffusion.objective import Targets
from memdlm_jax.typing import Batch, Key, Mask, Tokens


@flax.struct.dataclass
class State:
    """One noisy state of every row with what is supervised on it.

    Attributes:
        tokens: [b, l] int32, x with masks in it.
        targets: clean tokens at the supervised positions.
        weight: [b] weight of each row's summed loss. Inner losses carry their normaliser in it.
    """

    tokens: Tokens
    targets: Targets
    weight: Float[Array, "b"]


@flax.struct.dataclass
class Trajectory:
    """States in the order of the inner steps.

    Attributes:
        states: one per inner step.
        ends_at_anchor: the last state's tokens are those of the anchor, so its trunk is shared
            with the outer loss.
    """

    states: tuple[State, ...]
    ends_at_anchor: bool = flax.struct.field(pytree_node=False)


def draw_anchor(
    key: Key, batch: Batch, linear: schedule.LinearSchedule
) -> tuple[Mask, Float[Array, "b"]]:
    """Draw the outer loss's mask [b, l] and times t [b] (paper, section 2)."""
    time_key, mask_key = jax.random.split(key)
    t = linear.sample_times(time_key, batch.tokens.shape[0])
    return masking.bernoulli_mask(mask_key, batch.maskable, t), t


def anchor_state(batch: Batch, mask: Mask, weight, mask_token_id: int, capacity) -> State:
    """Build x_t with its targets: all masked positions."""
    tokens = masking.apply_mask(batch.tokens, mask, mask_token_id)
    return State(tokens, objective.gather_targets(batch.tokens, mask, capacity), weight)


def draw_masks(key: Key, maskable: Mask, anchor: Mask, steps: int, scale: float) -> list[Mask]:
    """Draw the masks of an anchor-consistent trajectory (``pmc``; paper, section 4.2).

    Args:
        key: PRNG key.
        maskable: [b, l] bool.
        anchor: [b, l] bool, the outer mask, a subset of ``maskable``.
        steps: K. State 0 is the pre-anchor state; for K >= 2 the last state is the anchor.
        scale: s; the pre-anchor state masks clip(floor(s n), n, M) positions of M maskable ones,
            n of them masked in the anchor. The extra ones are uniform over the visible maskable.

    Returns:
        ``steps`` masks [b, l], each a superset of the next. K > 2 reveals ceil(left / steps left)
        of the extra positions per transition, in one uniformly drawn order.
    """
    exact = fractions.Fraction(scale).limit_denominator(1000)
    masked, available = anchor.sum(-1), maskable.sum(-1)
    wanted = masked * exact.numerator // exact.denominator
    extra = jnp.clip(wanted, masked, available) - masked
    scores = jnp.where(maskable & ~anchor, jax.random.uniform(key, anchor.shape), jnp.inf)
    ranks = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
    masks, left = [], extra
    for transitions in range(steps - 1, -1, -1):
        masks.append(anchor | (maskable & (ranks < left[:, None])))
        left = left - -(-left // max(transitions, 1))
    return masks


def inner_states(
    batch: Batch,
    masks: list[Mask],
    mask_token_id: int,
    capacity: int | None,
    groups: int,
    *,
    uniform_weights: bool = False,
    axis_name: str | None = None,
) -> tuple[State, ...]:
    """Turn masks into inner states whose targets are the clean tokens at all masked positions.

    Args:
        batch: clean rows.
        masks: [b, l] bool for every inner step.
        mask_token_id: id of the mask token.
        capacity: target slots of a row, see ``objective.gather_targets``.
        groups: rows are averaged within their group: the loss of a group is divided by its number
            of supervised tokens (the public code's ``token`` normalisation).
        uniform_weights: weigh all rows alike (prompts) instead of by w(actual mask ratio).
        axis_name: sum the token count over this device axis (``global`` scope under ``pmap``).
    """
    available = jnp.maximum(batch.maskable.sum(-1), 1)
    states = []
    for mask in masks:
        ratio = mask.sum(-1).astype(jnp.float32) / available
        weight = jnp.ones_like(ratio) if uniform_weights else schedule.loss_weight(ratio)
        weight = normalised(weight, mask.sum(-1), groups, axis_name)
        states.append(anchor_state(batch, mask, weight, mask_token_id, capacity))
    return tuple(states)


def normalised(weight, counts, groups: int, axis_name: str | None = None) -> Float[Array, "b"]:
    """Divide each row's weight by the number of supervised tokens of its group."""
    total = counts.reshape(groups, -1).sum(-1)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    # As wide as enabled: float64 parity would be lost in a float32 quotient.
    weight = weight.astype(jnp.result_type(float))
    return weight / jnp.repeat(jnp.maximum(total, 1), weight.shape[0] // groups)
