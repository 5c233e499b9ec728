"""The outer loss conditioned on memory, and the three ways its gradient treats the inner loop.

The three meta-gradients differ only in where ``stop_gradient`` stands and in the rule of the inner
gradient:

* ``first_order``: inner gradients are constants, so phi_K is one (the paper);
* ``trunk_stopped``: the hidden states that the inner loop reads are constants;
* ``exact``: nothing is.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import PAPER_LOSS, LossConfig
from memdlm_jax.diffusion.schedule import LinearSchedule, loss_weight
from memdlm_jax.memory import fast_weights, inner_loop, learned, shortcuts, walk
from memdlm_jax.memory import losses as inner_losses
from memdlm_jax.memory import trajectory as trajectories
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerStep
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.memory.losses import InnerLoss
from memdlm_jax.memory.trajectory import State, Trajectory
from memdlm_jax.typing import Batch, Denoiser, Hidden, Key, Mask, Partitioned, Phi, Theta

Corrupt = Callable[[Key, Batch], tuple[Mask, Float[Array, "b"]]]
"""(key, batch) -> (anchor mask [b, l] within ``maskable``, loss weight [b])."""


@flax.struct.dataclass
class OuterLoss:
    """Sums over the batch; divide by ``maskable`` for nats per maskable token.

    Attributes:
        memory_on: outer loss with phi_K. Phi has seen the very targets of this loss: never show it
            without ``memory_off``.
        memory_off: the same loss on the same masks with phi = None; NaN where not asked for.
        maskable: maskable tokens of the batch.
        rows: rows that have one.
        inner: record of the inner steps; ``None`` without memory.
        phi_norm: mean over the groups of |phi_K|; ``None`` without memory.
        phi_change: mean over the groups of |phi_K - phi_0|; ``None`` without memory.
        phi: the adapted fast weights phi_K; ``None`` without memory.
    """

    memory_on: Float[Array, ""]
    memory_off: Float[Array, ""]
    maskable: Int[Array, ""]
    rows: Int[Array, ""]
    inner: InnerStep | None = None
    phi_norm: Float[Array, ""] | None = None
    phi_change: Float[Array, ""] | None = None
    phi: Phi = None


def step_keys(key: Key, axis_name: str | None = None) -> tuple[Key, Key, Key, Key]:
    """Keys of phi_0 and, different on every device, of the anchor, inner masks and dropout."""
    phi_key, *others = jax.random.split(key, 4)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        others = [jax.random.fold_in(k, device) for k in others]
    return phi_key, *others


def draw_anchor(
    key: Key,
    denoiser: Denoiser,
    batch: Batch,
    schedule: LinearSchedule,
    capacity: int | None = None,
    corrupt: Corrupt | None = None,
    loss: LossConfig = PAPER_LOSS,
) -> tuple[Mask, Float[Array, "b"], State]:
    """Draw the outer loss's mask [b, l], the schedule's (or ``corrupt``'s) weights and x_t."""
    if corrupt is None:
        mask, t = trajectories.draw_anchor(key, batch, schedule)
        weight = loss_weight(t)
    else:
        mask, weight = corrupt(key, batch)
    weights = loss.row_weights(weight, batch)
    state = trajectories.anchor_state(batch, mask, weights, denoiser.mask_token_id, capacity)
    return mask, weight, state


def draw(
    key: Key,
    denoiser: Denoiser,
    config: MemoryConfig,
    batch: Batch,
    schedule: LinearSchedule,
    *,
    capacity: int | None = None,
    axis_name: str | None = None,
    corrupt: Corrupt | None = None,
    loss: LossConfig = PAPER_LOSS,
    micro_batches: int = 1,
    training: bool = True,
) -> tuple[Phi, State, Trajectory]:
    """Draw all that is random in one step: phi_0, the anchor, and the trajectory to it.

    Args:
        key: PRNG key. Under ``pmap`` it must be the same on all devices for the ``global`` scope's
            phi_0; masks are drawn per device all the same.
        denoiser: the backbone.
        config: memory settings.
        batch: clean rows.
        schedule: masking schedule of the outer loss.
        capacity: target slots of a row, see ``objective.gather_targets``.
        axis_name: device axis, if any.
        corrupt: draws the anchor's mask and weight in the schedule's place.
        loss: how the outer loss weighs its rows.
        micro_batches: parts of a device's rows of which ``batch`` is one.
        training: whether inputs of fast weights are dropped, where the config says so.

    Raises:
        ValueError: if the rows cannot be shared out among the config's memories.
    """
    phi_key, anchor_key, mask_key, dropout_key = step_keys(key, axis_name)
    outer = trajectories.without_padding(batch) if config.padding == "both" else batch
    mask, weight, anchor = draw_anchor(
        anchor_key, denoiser, outer, schedule, capacity, corrupt, loss
    )
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    groups = number_of_groups(config, batch.tokens.shape[0], devices * micro_batches)
    trajectory = trajectories.draw(
        mask_key, config, batch, mask, weight, denoiser.mask_token_id, groups,
        capacity=capacity, axis_name=axis_name if config.scope == "global" else None,
        dropout_key=dropout_key if training else None,
    )  # fmt: skip
    return fast_weights.init(phi_key, denoiser, config, groups), anchor, trajectory


def number_of_groups(config: MemoryConfig, rows: int, parts: int = 1) -> int:
    """Memories of ``rows`` rows, which are one of ``parts`` equal parts of a step's batch.

    Raises:
        ValueError: if the ``device`` scope's groups do not divide the parts and their rows evenly.
    """
    if config.scope == "example":
        return rows
    if config.scope == "global":
        return 1
    if config.groups % parts or rows % (config.groups // parts):
        raise ValueError(
            f"memory.groups={config.groups} must be a multiple of the {parts} parts (devices times "
            f"micro-batches) of a step's batch, and share out the {rows} rows of a part evenly"
        )
    return config.groups // parts


def outer_loss(
    denoiser: Denoiser,
    config: MemoryConfig,
    theta: Theta,
    phi: Phi,
    batch: Batch,
    anchor: State,
    trajectory: Trajectory,
    *,
    with_memory_off: bool | jax.Array = True,
    axis_name: str | None = None,
    inner: InnerParameters | None = None,
    inner_loss: InnerLoss | None = None,
    inner_optimizer: optax.GradientTransformation | None = None,
    is_fresh: bool = False,
) -> tuple[Float[Array, ""], OuterLoss]:
    """Adapt phi along the trajectory, then take the MDLM loss at the anchor (paper, section 4).

    Args:
        denoiser: the backbone.
        config: memory settings; ``meta_gradient`` decides what differentiating this in theta means.
        theta: base parameters.
        phi: phi_0, leaves [groups, ...].
        batch: clean rows; only ``valid`` and ``maskable`` are read.
        anchor: x_t, its targets and w(t).
        trajectory: states of the inner loop.
        with_memory_off: also compute the loss without memory, and the inner losses after each step
            (no gradient flows through them).
        axis_name: device axis over which a ``global`` memory is shared.
        inner: the learned inner loop's parameters.
        inner_loss: loss of one group's ``HeadState`` in the place of the config's; with a
            ``global`` memory on several devices, of a device's share.
        inner_optimizer: any optax optimiser in the place of the config's clipped SGD. Unless
            ``first_order``, it needs a derivative where an inner gradient is exactly zero:
            ``optax.adam`` with ``eps_root > 0``.
        is_fresh: ``phi`` is as ``draw`` made it, with B = 0; its first step then costs less.

    Returns:
        (sum of the memory-on loss over this batch, all sums).

    Raises:
        ValueError: if learned rates meet an ``inner_optimizer``, which would not use them.
    """
    if config.padding == "both":
        batch = trajectories.without_padding(batch)
    inner_theta, hold_hidden = _inner_view(config, theta)
    entering = None
    if inner_loss is None and not config.distils and config.meta_gradient != "trunk_stopped":
        # Not where the first head layer's attention has another gradient than the trunk, nor
        # where others than the losses of labels read its input.
        entering = fast_weights.entering(denoiser, config)
    reader = walk.Reader(
        denoiser, config, inner_theta, batch.valid, None, fast_weights.number_of_groups(phi),
        entering, hold_hidden,
    )  # fmt: skip
    hidden = reader.enter(reader.trunk(anchor.tokens, theta), anchor, theta)
    count, leading = walk.leading(reader, trajectory)
    steps = walk.head_states(reader, trajectory, hidden, count)
    phi = learned.started(inner, phi)
    loss = inner_losses.build(denoiser, config) if inner_loss is None else inner_loss
    shared_axis = axis_name if config.scope == "global" else None
    adapted, record = inner_loop.adapt(
        _RULES[config.meta_gradient](loss, shared_axis), inner_theta, phi, steps,
        optimizer_of(config, inner, inner_optimizer),
        inner_loop.measured(loss, with_memory_off, shared_axis), leading,
        is_fresh and config.meta_gradient == "first_order" and inner_loss is None
        and trajectory.dropout is None,
    )  # fmt: skip
    read = functools.partial(
        anchor_loss, denoiser, valid=batch.valid, anchor=anchor,
        split=fast_weights.split_of(denoiser, config), entered=entering is not None,
    )  # fmt: skip
    memory_on = read(theta, _as_read(config, theta, adapted, trajectory), hidden)
    memory_off = _memory_off(read, theta, hidden, with_memory_off)
    norm, change = jax.lax.stop_gradient(
        [fast_weights.group_norms(x).mean() for x in (adapted, _difference(adapted, phi))]
    )
    return memory_on, OuterLoss(
        memory_on, memory_off, *_counts(batch), record, norm, change, adapted
    )


def _as_read(config: MemoryConfig, theta: Theta, phi: Phi, trajectory: Trajectory) -> Phi:
    """The adapted fast weights in the form in which the outer loss reads them."""
    if trajectory.dropout is not None:
        drop = functools.partial(fast_weights.with_dropout, rate=config.dropout)
        return jax.vmap(drop)(phi, trajectory.dropout[-1])
    return shortcuts.fused(phi) if _is_fused(config, theta, phi) else phi


def _is_fused(config: MemoryConfig, theta: Theta, phi: Phi) -> bool:
    """Whether the outer loss adds the one memory to the base.

    A derivative in the memory is then taken through that of the base, which must be wanted itself.
    """
    trained = not isinstance(theta, Partitioned)
    one = fast_weights.number_of_groups(phi) == 1
    return one and (trained or config.meta_gradient == "first_order")


def _counts(batch: Batch) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Maskable tokens, and rows that have one."""
    counts = batch.maskable.sum(-1)
    return counts.sum(), jnp.sum(counts > 0)


_RULES = {
    "first_order": inner_loop.constant_gradient,
    "trunk_stopped": inner_loop.forward_over_reverse_gradient,
    "exact": inner_loop.forward_over_reverse_gradient,
}


def _difference(a: Phi, b: Phi) -> Phi:
    return jax.tree.map(jnp.subtract, a, b)


def _inner_view(config: MemoryConfig, theta: Theta):
    """Theta as the inner loop sees it, and what it does to the hidden states it reads."""
    stop = jax.lax.stop_gradient
    if config.meta_gradient == "first_order":
        return stop(theta), stop
    return theta, stop if config.meta_gradient == "trunk_stopped" else lambda hidden: hidden


def optimizer_of(
    config: MemoryConfig,
    inner: InnerParameters | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """The given optimiser, or clipped SGD with learned or fixed rates."""
    rates = learned.rates(inner)
    if optimizer is None:
        return inner_loop.inner_optimizer(config, rates)
    if rates is not None:
        raise ValueError("learned has 'rates', but another inner optimiser has rates of its own")
    return optimizer


def anchor_loss(
    denoiser: Denoiser, theta: Theta, phi: Phi, hidden: Hidden, valid: Mask, anchor: State, *,
    split: int, entered: bool = False,
) -> Float[Array, ""]:  # fmt: skip
    """Sum of the outer loss from the trunk's output; ``phi = None`` is the plain model.

    With ``entered``, ``hidden`` is what ``typing.EnteringDenoiser.enter`` made of it.
    """
    last = fast_weights.head_with_memory(
        denoiser, theta, phi, hidden, valid, split=split, at=anchor.targets.positions,
        entered=entered,
    )  # fmt: skip
    losses = objective.label_losses(denoiser, theta, last, anchor.targets)
    return objective.weighted_sum(losses, anchor.targets, anchor.weight)


def _memory_off(read, theta, hidden, wanted):
    theta, hidden = jax.lax.stop_gradient((theta, hidden))

    def compute():
        return read(theta, None, hidden)

    if isinstance(wanted, bool):
        return compute() if wanted else jnp.nan
    unknown = jnp.full((), jnp.nan, jax.eval_shape(compute).dtype)
    return jax.lax.cond(wanted, compute, lambda: unknown)


def plain_loss(
    denoiser: Denoiser, theta: Theta, batch: Batch, anchor: State
) -> tuple[Float[Array, ""], OuterLoss]:
    """The standard MDLM loss (paper, equation 2): no memory, both sums are the same number."""
    split = fast_weights.plain_split(denoiser)
    hidden = denoiser.trunk(theta, anchor.tokens, batch.valid, split=split)
    loss = anchor_loss(denoiser, theta, None, hidden, batch.valid, anchor, split=split)
    return loss, OuterLoss(loss, jax.lax.stop_gradient(loss), *_counts(batch))
