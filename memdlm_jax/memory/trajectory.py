"""The anchor and the denoising states that the inner loop walks through.

Everything random of one step is drawn here, so that what follows is a deterministic function: a
replay puts a recorded ``Trajectory`` in the place of ``draw``.
"""

import dataclasses
import fractions

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memdlm_jax.diffusion import masking, objective, schedule
from memdlm_jax.diffusion.objective import Targets
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.typing import Batch, Key, Mask, Tokens

PROGRESSIVE_START = 0.8
"""First mask ratio of ``progressive_memory``, the public code's."""


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
    """States in the order of the inner steps, and what distillation teachers read.

    Attributes:
        states: one per inner step of an epoch.
        ends_at_anchor: the last state's tokens and targets are those of the anchor, so what is
            computed on them before phi is read is shared with the outer loss.
        after: [b, l] int32, what follows the last state: the clean tokens; ``None`` is the anchor.
            Read by teachers only.
        dropout: keys of the inputs' dropout, [inner steps + 1, groups], the last ones for the
            outer loss; ``None`` without dropout.
        teachers: which state the teacher of each state reads, ``len(states)`` being ``after``;
            ``None`` is the next one.
        epochs: times the states are walked.
    """

    states: tuple[State, ...]
    ends_at_anchor: bool = flax.struct.field(pytree_node=False)
    after: Tokens | None = None
    dropout: Key | None = None
    teachers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    epochs: int = flax.struct.field(pytree_node=False, default=1)


def draw_anchor(
    key: Key, batch: Batch, linear: schedule.LinearSchedule
) -> tuple[Mask, Float[Array, "b"]]:
    """Draw the outer loss's mask [b, l] and times t [b] (paper, section 2)."""
    time_key, mask_key = jax.random.split(key)
    t = linear.sample_times(time_key, batch.tokens.shape[0])
    return masking.bernoulli_mask(mask_key, batch.maskable, t), t


def anchor_state(batch: Batch, mask: Mask, weight, mask_token_id: int, capacity) -> State:
    """Build x_t with its targets: all masked positions."""
    return _state(batch, mask, mask, weight, mask_token_id, capacity)


def _state(batch: Batch, mask: Mask, supervised: Mask, weight, mask_token_id, capacity) -> State:
    tokens = masking.apply_mask(batch.tokens, mask, mask_token_id)
    return State(tokens, objective.gather_targets(batch.tokens, supervised, capacity), weight)


def without_padding(batch: Batch) -> Batch:
    """The batch with its supervised padding visible to all and learnt by none."""
    if batch.padding is None:
        return batch
    return dataclasses.replace(batch, maskable=batch.maskable & ~batch.padding)


def draw(
    key: Key,
    config: MemoryConfig,
    batch: Batch,
    anchor: Mask,
    weight: Float[Array, "b"],
    mask_token_id: int,
    groups: int,
    *,
    capacity: int | None = None,
    axis_name: str | None = None,
    dropout_key: Key | None = None,
) -> Trajectory:
    """Draw the states of the inner loop under any masking strategy.

    Args:
        key: PRNG key.
        config: strategy, steps, supervised positions, weights, normalisation, padding policy.
        batch: clean rows; positions to be masked are among ``maskable``.
        anchor: [b, l] bool, the outer mask, a subset of ``maskable``.
        weight: [b] loss weight of the anchor, which ``no_progressive`` takes over.
        mask_token_id: id of the mask token.
        groups: memories; the rows of each are consecutive and as many.
        capacity: target slots of a row, see ``objective.gather_targets``.
        axis_name: device axis over which one memory is shared, if any.
        dropout_key: PRNG key of the inputs' dropout; ``None`` drops nothing.
    """
    inner = batch if config.padding == "none" else without_padding(batch)
    shared_anchor = inner is batch or config.padding == "both"
    end = anchor if shared_anchor else anchor & inner.maskable
    masks, weights = draw_masks(key, config, inner.maskable, end, weight)
    follows = [*masks[1:], end if config.masking == "pre_only" else None]
    states = []
    for mask, following, row_weight in zip(masks, follows, weights, strict=True):
        supervised = mask
        if config.supervise == "newly_revealed" and following is not None:
            supervised = mask & ~following
        if config.weighting == "uniform":
            row_weight = jnp.ones_like(row_weight)
        row_weight = normalised(
            row_weight, supervised.sum(-1), groups, config.normalisation, axis_name
        )
        states.append(_state(batch, mask, supervised, row_weight, mask_token_id, capacity))
    at_anchor = config.masking == "no_progressive" or (config.masking == "pmc" and config.steps > 1)
    after: Tokens | None = batch.tokens
    if config.masking == "pre_only":
        after = None if shared_anchor else masking.apply_mask(batch.tokens, end, mask_token_id)
    dropout = None
    if config.dropout and dropout_key is not None:
        dropout = jax.random.split(dropout_key, (len(states) * config.epochs + 1, groups))
    return Trajectory(
        tuple(states),
        ends_at_anchor=at_anchor and shared_anchor,
        after=after if config.distils else None,
        dropout=dropout,
        epochs=config.epochs,
    )


def draw_masks(
    key: Key, config: MemoryConfig, maskable: Mask, anchor: Mask, weight: Float[Array, "b"]
) -> tuple[list[Mask], list[Float[Array, "b"]]]:
    """Masks [b, l] of the inner states, and the schedule's weight [b] of each (paper, section 4.2).

    ``pmc`` and ``pre_only`` weigh by the actual mask ratio, ``progressive_memory`` by the nominal
    one, ``no_progressive`` takes ``weight``, the anchor's.
    """
    if config.masking == "no_progressive":
        return [anchor], [weight]
    if config.masking == "progressive_memory":
        return _independent_masks(key, config, maskable)
    masks = anchor_consistent_masks(key, maskable, anchor, config.states, config.pre_anchor_scale)
    available = jnp.maximum(maskable.sum(-1), 1)
    ratios = [mask.sum(-1).astype(jnp.float32) / available for mask in masks]
    return masks, [schedule.loss_weight(ratio) for ratio in ratios]


def anchor_consistent_masks(
    key: Key, maskable: Mask, anchor: Mask, steps: int, scale: float
) -> list[Mask]:
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
    ranks = masking.random_ranks(key, maskable & ~anchor)
    masks, left = [], extra
    for transitions in range(steps - 1, -1, -1):
        masks.append(anchor | (maskable & (ranks < left[:, None])))
        left = left - -(-left // max(transitions, 1))
    return masks


def _independent_masks(
    key: Key, config: MemoryConfig, maskable: Mask
) -> tuple[list[Mask], list[Float[Array, "b"]]]:
    """``progressive_memory``: Bernoulli at the first ratio, then revealed down to each ratio.

    The ratios fall linearly from 0.8 to ``prompt_mask_ratio``; one state has the latter. After the
    first a state masks min(as many as before, floor(ratio M)) of M maskable positions.
    """
    mask_key, order_key = jax.random.split(key)
    last, steps = config.prompt_mask_ratio, config.steps
    first = PROGRESSIVE_START if steps > 1 else last
    ratios = [first + (last - first) * k / max(steps - 1, 1) for k in range(steps)]
    rows = maskable.shape[0]
    mask = masking.bernoulli_mask(mask_key, maskable, jnp.full((rows,), first))
    ranks = masking.random_ranks(order_key, mask)
    masks = [mask]
    for ratio in ratios[1:]:
        exact = fractions.Fraction(ratio).limit_denominator(1000)
        wanted = maskable.sum(-1) * exact.numerator // exact.denominator
        masks.append(mask & (ranks < wanted[:, None]))
    return masks, [schedule.loss_weight(jnp.full((rows,), ratio)) for ratio in ratios]


def normalised(
    weight: Float[Array, "b"],
    counts: Int[Array, "b"],
    groups: int,
    normalisation: str = "token",
    axis_name: str | None = None,
) -> Float[Array, "b"]:
    """Put the normaliser of a group's loss into its rows' weights.

    Args:
        weight: [b] weight of each row.
        counts: [b] supervised tokens of each row.
        groups: memories.
        normalisation: divide by the group's supervised tokens (``token``) or its rows (``batch``);
            ``sequence`` divides by the row's supervised tokens and multiplies by the rows.
        axis_name: device axis over which one memory is shared, if any.
    """
    per_group = weight.shape[0] // groups
    total = counts.reshape(groups, -1).sum(-1)
    rows = jnp.asarray(per_group)
    if axis_name is not None:
        total, rows = jax.lax.psum((total, rows), axis_name)
    # As wide as enabled: float64 parity would be lost in a float32 quotient.
    weight = weight.astype(jnp.result_type(float))
    if normalisation == "token":
        return weight / jnp.repeat(jnp.maximum(total, 1), per_group)
    if normalisation == "batch":
        return weight / rows
    return weight / jnp.maximum(counts, 1) * rows
