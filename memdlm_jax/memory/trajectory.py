"""The trajectory: the corrupted states that the inner loop learns from.

A masking strategy draws the masks, ``draw`` turns them into states with targets and weights. All
random draws of a trajectory happen here; what follows is deterministic. To replay a step, pass a
recorded ``Trajectory`` instead of calling ``draw``.

A strategy is one function ``(key, config, rows) -> Masks`` with one line in
``MASKING_STRATEGIES``; a config then names it (``memory.masking``).
"""

import dataclasses
import fractions

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memdlm_jax.diffusion import masking, objective
from memdlm_jax.diffusion.objective import Anchor, NoisyState
from memdlm_jax.diffusion.schedule import LinearSchedule, Schedule
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.registry import MASKING_STRATEGIES
from memdlm_jax.typing import Batch, Context, Denoiser, Key, Mask, Texts, Tokens

PROGRESSIVE_START = 0.8
"""First mask ratio of ``progressive_memory``, as in the public code."""


@flax.struct.dataclass
class Trajectory:
    """States in the order of the inner steps, and what distillation teachers read.

    Attributes:
        states: one per inner step of an epoch.
        context: of the rows that are written.
        ends_at_anchor: the last state has the tokens and targets of the outer loss's anchor, so
            both share what is computed before phi is read.
        after: [b, l] int32, tokens that follow the last state, for teachers only; ``None`` is the
            anchor.
        dropout: keys of the inputs' dropout, [inner steps + 1, groups], the last ones for the
            outer loss; ``None`` without dropout.
        teachers: which state the teacher of each state reads, ``len(states)`` meaning ``after``;
            ``None`` is the next one.
        epochs: times the states are walked.
        in_sequence: the arrays have a leading axis of segments, written one after the other.
    """

    states: tuple[NoisyState, ...]
    context: Context
    ends_at_anchor: bool = flax.struct.field(pytree_node=False)
    after: Tokens | None = None
    dropout: Key | None = None
    teachers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    epochs: int = flax.struct.field(pytree_node=False, default=1)
    in_sequence: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Rows:
    """The clean rows that are written into memory.

    Attributes:
        tokens: [b, l] int32.
        maskable: [b, l] bool, positions that states may mask.
        anchor: [b, l] bool, subset of ``maskable``: the mask that a trajectory may lead to.
        weight: [b] loss weight of the anchor.
        context: of the rows.
        mask_token_id: id of the mask token.
        schedule: weighs states by their mask ratio.
        token_weight: [b, l] weight of each token's loss; ``None`` is 1 for all.
        is_outer_anchor: the outer loss has this anchor, too.
        alike: all rows weigh 1, whatever their mask ratio.
        in_sequence: see ``Trajectory``.
    """

    tokens: Tokens
    maskable: Mask
    anchor: Mask
    weight: Float[Array, "b"]
    context: Context
    mask_token_id: int = flax.struct.field(pytree_node=False)
    schedule: Schedule = flax.struct.field(pytree_node=False, default=LinearSchedule())
    token_weight: Float[Array, "b l"] | None = None
    is_outer_anchor: bool = flax.struct.field(pytree_node=False, default=False)
    alike: bool = flax.struct.field(pytree_node=False, default=False)
    in_sequence: bool = flax.struct.field(pytree_node=False, default=False)

    def masked(self, mask: Mask) -> Tokens:
        """The tokens [b, l] with mask tokens where ``mask`` is True."""
        return masking.apply_mask(self.tokens, mask, self.mask_token_id)

    def weight_at(self, ratio: Float[Array, "b"]) -> Float[Array, "b"]:
        """Loss weight of rows with this mask ratio."""
        return self.schedule.weight(self.schedule.time_at(ratio))


@dataclasses.dataclass
class Masks:
    """What a masking strategy draws.

    Attributes:
        masks: [b, l] bool, one per state, in the order of the inner steps.
        weights: [b] loss weight of each state's rows.
        at_anchor: the last mask is the anchor's.
        follows: mask of the state that comes after the last; ``None`` is the clean rows.
        most: no row of any mask has more masked positions; ``None`` if nothing is known.
    """

    masks: list[Mask]
    weights: list[Float[Array, "b"]]
    at_anchor: bool = False
    follows: Mask | None = None
    most: int | None = None


def rows_of_anchor(
    batch: Batch, anchor: Anchor, config: MemoryConfig, mask_token_id: int, schedule: Schedule
) -> Rows:
    """The rows to write in the paper's recipe: those that the outer loss scores."""
    inner = objective.without_padding(batch) if config.padding == "inner" else batch
    same = inner is batch
    mask = anchor.mask if same else anchor.mask & inner.maskable
    return Rows(
        batch.tokens,
        inner.maskable,
        mask,
        anchor.weight,
        anchor.context,
        mask_token_id,
        schedule,
        is_outer_anchor=same,
    )


def rows_of_texts(key: Key, texts: Texts, config: MemoryConfig, denoiser: Denoiser) -> Rows:
    """The rows to write when texts or prompts are written into memory: their segments.

    Every valid token is maskable and its own target, and all rows weigh the same (as in the public
    code's inference). The anchor masks each token with probability ``prompt_mask_ratio``. Models
    that predict a token from the position before it (Dream) never mask the first token of a row:
    nothing precedes it. With ``pieces="sequence"`` the arrays get a leading axis of segments.
    """
    in_sequence = config.pieces == "sequence"

    def arranged(leaf):
        return jnp.moveaxis(leaf, 1, 0) if in_sequence else leaf.reshape(-1, leaf.shape[-1])

    texts = jax.tree.map(arranged, texts)
    maskable = texts.valid
    if lookback := getattr(denoiser, "lookback", 0):
        maskable = maskable & (jnp.cumsum(maskable, axis=-1) > lookback)
    ones = jnp.ones(maskable.shape[:-1])
    anchor = masking.bernoulli_mask(key, maskable, ones * config.prompt_mask_ratio)
    return Rows(
        texts.tokens, maskable, anchor, ones, Context(texts.valid), denoiser.mask_token_id,
        token_weight=texts.weight, alike=True, in_sequence=in_sequence,
    )  # fmt: skip


def draw(
    key: Key,
    config: MemoryConfig,
    rows: Rows,
    groups: int,
    *,
    capacity: int | None = None,
    axis_name: str | None = None,
    dropout_key: Key | None = None,
) -> Trajectory:
    """Draw the states of the inner loop under the config's masking strategy.

    Args:
        key: PRNG key.
        config: strategy, steps, supervised positions, weights, normalisation.
        rows: what is written.
        groups: memories; each has as many consecutive rows as the others.
        capacity: target slots of a row, see ``objective.gather_targets``; ``None`` for as many as
            the strategy may need.
        axis_name: device axis over which one memory is shared, if any.
        dropout_key: PRNG key of the inputs' dropout; ``None`` drops nothing.
    """
    if rows.in_sequence:

        def one(key, rows, dropout_key) -> Trajectory:
            return draw(
                key, config, rows, groups,
                capacity=capacity, axis_name=axis_name, dropout_key=dropout_key,
            )  # fmt: skip

        count = len(rows.tokens)
        apart = None if dropout_key is None else jax.random.split(dropout_key, count)
        rows = dataclasses.replace(rows, in_sequence=False)
        own_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
        found = jax.vmap(one)(own_keys, rows, apart)
        return dataclasses.replace(found, in_sequence=True)
    drawn = MASKING_STRATEGIES(config.masking)(key, config, rows)
    following = [*drawn.masks[1:], drawn.follows]
    capacity = drawn.most if capacity is None else capacity
    states = []
    for mask, next_mask, weight in zip(drawn.masks, following, drawn.weights, strict=True):
        supervised = mask
        if config.supervise == "newly_revealed" and next_mask is not None:
            supervised = mask & ~next_mask
        if config.weighting == "uniform" or rows.alike:
            weight = jnp.ones_like(weight)
        weight = normalised(weight, supervised.sum(-1), groups, config.normalisation, axis_name)
        targets = objective.gather_targets(rows.tokens, supervised, capacity)
        if rows.token_weight is not None:
            own = jnp.take_along_axis(rows.token_weight, targets.positions, axis=1)
            targets = dataclasses.replace(targets, weight=own)
        states.append(NoisyState(rows.masked(mask), targets, weight))
    after = None
    if config.distils:
        # Where the outer loss reads the same anchor, its hidden states serve the teacher.
        at_outer_anchor = drawn.follows is rows.anchor and rows.is_outer_anchor
        if not at_outer_anchor:
            after = rows.tokens if drawn.follows is None else rows.masked(drawn.follows)
    dropout = None
    if config.dropout and dropout_key is not None:
        dropout = jax.random.split(dropout_key, (len(states) * config.epochs + 1, groups))
    return Trajectory(
        tuple(states),
        rows.context,
        ends_at_anchor=drawn.at_anchor and rows.is_outer_anchor,
        after=after,
        dropout=dropout,
        epochs=config.epochs,
    )


@MASKING_STRATEGIES.register("pmc")
def anchor_consistent(key: Key, config: MemoryConfig, rows: Rows) -> Masks:
    """From a pre-anchor state to the anchor, each state a superset of the next (paper, 4.2)."""
    masks = anchor_consistent_masks(
        key, rows.maskable, rows.anchor, config.steps, config.pre_anchor_scale
    )
    return Masks(masks, _actual_weights(rows, masks), at_anchor=config.steps > 1)


@MASKING_STRATEGIES.register("pre_only")
def pre_anchor_only(key: Key, config: MemoryConfig, rows: Rows) -> Masks:
    """The pre-anchor state alone."""
    masks = anchor_consistent_masks(key, rows.maskable, rows.anchor, 1, config.pre_anchor_scale)
    return Masks(masks, _actual_weights(rows, masks), follows=rows.anchor)


@MASKING_STRATEGIES.register("no_progressive")
def anchor_only(key: Key, config: MemoryConfig, rows: Rows) -> Masks:
    """The anchor alone, with the weight it has in the outer loss."""
    del key, config
    return Masks([rows.anchor], [rows.weight], at_anchor=True)


@MASKING_STRATEGIES.register("progressive_memory")
def independent(key: Key, config: MemoryConfig, rows: Rows) -> Masks:
    """States independent of the anchor, from mask ratio 0.8 down to ``prompt_mask_ratio``.

    The ratios fall linearly; a single state has the last one. The first state masks each position
    with probability 0.8. A later one masks min(as many as before, floor(ratio M)) of M maskable
    positions, a subset of those before. Weights are those of the nominal ratios.
    """
    mask_key, order_key = jax.random.split(key)
    last, steps = config.prompt_mask_ratio, config.steps
    first = PROGRESSIVE_START if steps > 1 else last
    ratios = [first + (last - first) * k / max(steps - 1, 1) for k in range(steps)]
    count = rows.maskable.shape[0]
    mask = masking.bernoulli_mask(mask_key, rows.maskable, jnp.full((count,), first))
    ranks = masking.random_ranks(order_key, mask)
    masks = [mask]
    for ratio in ratios[1:]:
        exact = fractions.Fraction(ratio).limit_denominator(1000)
        wanted = rows.maskable.sum(-1) * exact.numerator // exact.denominator
        masks.append(mask & (ranks < wanted[:, None]))
    return Masks(masks, [rows.weight_at(jnp.full((count,), ratio)) for ratio in ratios])


@MASKING_STRATEGIES.register("cover")
def cover(key: Key, config: MemoryConfig, rows: Rows) -> Masks:
    """K disjoint masks per pass, so that every maskable token is a target exactly once per pass.

    The mask ratio is 1 / K, and every mask has the same size to within one token. ``config.deal``
    says how the tokens of a row are shared out. ``random``: anew in each pass. ``spread``: every
    K-th token, from a random first one, so that tokens closer than K are never masked together: a
    value is written while its key is visible.
    """
    masks: list[Mask] = []
    for pass_key in jax.random.split(key, config.passes):
        if config.deal == "random":
            ranks = masking.random_ranks(pass_key, rows.maskable)
        else:
            first = jax.random.randint(pass_key, (len(rows.maskable), 1), 0, config.steps)
            ranks = jnp.cumsum(rows.maskable, axis=-1) + first
        masks += [rows.maskable & (ranks % config.steps == k) for k in range(config.steps)]
    most = -(-rows.maskable.shape[-1] // config.steps)
    return Masks(masks, _actual_weights(rows, masks), most=most)


def anchor_consistent_masks(
    key: Key, maskable: Mask, anchor: Mask, steps: int, scale: float
) -> list[Mask]:
    """Draw the masks of an anchor-consistent trajectory (paper, section 4.2).

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


def _actual_weights(rows: Rows, masks: list[Mask]) -> list[Float[Array, "b"]]:
    """Loss weights at the mask ratios that the rows really have."""
    available = jnp.maximum(rows.maskable.sum(-1), 1)
    return [rows.weight_at(mask.sum(-1).astype(jnp.float32) / available) for mask in masks]


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
            ``sequence`` divides by the row's supervised tokens and multiplies by the rows; ``sum``
            divides by nothing.
        axis_name: device axis over which one memory is shared, if any.
    """
    per_group = weight.shape[0] // groups
    total = counts.reshape(groups, -1).sum(-1)
    rows = jnp.asarray(per_group)
    if axis_name is not None:
        total, rows = jax.lax.psum((total, rows), axis_name)
    # As wide as enabled: float64 parity would be lost in a float32 quotient.
    weight = weight.astype(jnp.result_type(float))
    if normalisation == "sum":
        return weight
    if normalisation == "token":
        return weight / jnp.repeat(jnp.maximum(total, 1), per_group)
    if normalisation == "batch":
        return weight / rows
    return weight / jnp.maximum(counts, 1) * rows
