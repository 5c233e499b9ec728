"""The outer loss conditioned on memory, and the three ways its gradient treats the inner loop.

The three meta-gradients differ only in where ``stop_gradient`` stands and in the rule of the inner
gradient:

* ``first_order``: everything the inner loop reads is a constant, so phi_K is one (the paper);
* ``trunk_stopped``: the hidden states that the inner loop reads are constants;
* ``exact``: nothing is.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.schedule import LinearSchedule, loss_weight
from memdlm_jax.memory import fast_weights, inner_loop
from memdlm_jax.memory import trajectory as trajectories
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerStep
from memdlm_jax.memory.trajectory import State, Trajectory
from memdlm_jax.typing import Batch, Denoiser, Hidden, Key, Mask, Phi, Theta

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
        inner: record of the inner steps; ``None`` without memory.
        phi_norm: mean over the groups of |phi_K - phi_0|; ``None`` without memory.
        phi: the adapted fast weights phi_K; ``None`` without memory.
    """

    memory_on: Float[Array, ""]
    memory_off: Float[Array, ""]
    maskable: Int[Array, ""]
    inner: InnerStep | None = None
    phi_norm: Float[Array, ""] | None = None
    phi: Phi = None


def step_keys(key: Key, axis_name: str | None = None) -> tuple[Key, Key, Key]:
    """Keys of phi_0, the anchor and the inner masks; the last two differ between devices."""
    phi_key, anchor_key, mask_key = jax.random.split(key, 3)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        anchor_key, mask_key = (jax.random.fold_in(k, device) for k in (anchor_key, mask_key))
    return phi_key, anchor_key, mask_key


def draw_anchor(
    key: Key,
    denoiser: Denoiser,
    batch: Batch,
    schedule: LinearSchedule,
    capacity: int | None = None,
    corrupt: Corrupt | None = None,
) -> tuple[Mask, State]:
    """Draw the outer loss's mask [b, l] and its state x_t, by the schedule or by ``corrupt``."""
    if corrupt is None:
        mask, t = trajectories.draw_anchor(key, batch, schedule)
        weight = loss_weight(t)
    else:
        mask, weight = corrupt(key, batch)
    return mask, trajectories.anchor_state(batch, mask, weight, denoiser.mask_token_id, capacity)


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
    """
    phi_key, anchor_key, mask_key = step_keys(key, axis_name)
    mask, anchor = draw_anchor(anchor_key, denoiser, batch, schedule, capacity, corrupt)
    masks = trajectories.draw_masks(
        mask_key, batch.maskable, mask, config.steps, config.pre_anchor_scale
    )
    groups = number_of_groups(config, batch.tokens.shape[0])
    shared_axis = axis_name if config.scope == "global" else None
    states = trajectories.inner_states(
        batch, masks, denoiser.mask_token_id, capacity, groups, axis_name=shared_axis
    )
    phi = fast_weights.init(phi_key, denoiser, config, groups)
    return phi, anchor, Trajectory(states, ends_at_anchor=config.steps >= 2)


def number_of_groups(config: MemoryConfig, rows: int) -> int:
    """Memories of a batch (on one device): one per row, or one in all."""
    return rows if config.scope == "example" else 1


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
        with_memory_off: also compute the loss without memory (no gradient flows through it).
        axis_name: device axis over which a ``global`` memory is shared.

    Returns:
        (sum of the memory-on loss over this batch, all sums).
    """
    split = fast_weights.split_of(denoiser, config)
    groups = fast_weights.number_of_groups(phi)
    inner_theta, hold_hidden = _inner_view(config, theta)
    hidden = denoiser.trunk(theta, anchor.tokens, batch.valid, split=split)
    hiddens = [
        denoiser.trunk(inner_theta, state.tokens, batch.valid, split=split)
        for state in trajectory.states[: -1 if trajectory.ends_at_anchor else None]
    ] + [hidden] * trajectory.ends_at_anchor
    steps = [
        (hold_hidden(h), batch.valid, None, state.targets, state.weight)
        for h, state in zip(hiddens, trajectory.states, strict=True)
    ]
    gradient = _inner_gradient(denoiser, config, split, axis_name)
    optimizer = inner_loop.inner_optimizer(config)
    adapted, inner = inner_loop.adapt(
        gradient, inner_theta, phi, fast_weights.group_rows(steps, groups), optimizer
    )
    memory_on = anchor_loss(denoiser, theta, adapted, hidden, batch.valid, anchor, split=split)
    memory_off = _memory_off(denoiser, theta, hidden, batch.valid, anchor, split, with_memory_off)
    moved = jax.tree.map(jnp.subtract, adapted, phi)
    norm = jax.lax.stop_gradient(fast_weights.group_norms(moved).mean())
    maskable = jnp.sum(batch.maskable)
    return memory_on, OuterLoss(memory_on, memory_off, maskable, inner, norm, adapted)


def _inner_view(config: MemoryConfig, theta: Theta):
    """Theta as the inner loop sees it, and what it does to the hidden states it reads."""
    stop = jax.lax.stop_gradient
    if config.meta_gradient == "first_order":
        return stop(theta), stop
    return theta, stop if config.meta_gradient == "trunk_stopped" else lambda hidden: hidden


def _inner_gradient(denoiser: Denoiser, config: MemoryConfig, split: int, axis_name: str | None):
    """The gradient rule that the config's meta-gradient needs."""

    def loss(theta, phi, state):
        return denoising_loss(denoiser, theta, phi, state, split=split)

    first_order = config.meta_gradient == "first_order"
    rule = inner_loop.reverse_gradient if first_order else inner_loop.forward_over_reverse_gradient
    return rule(loss, axis_name if config.scope == "global" else None)


def denoising_loss(denoiser: Denoiser, theta: Theta, phi: Phi, state, *, split: int):
    """Inner loss of one group: weighted sum of -log p(x_0 | x) over its targets (paper, eq. 5).

    Args:
        denoiser: the backbone.
        theta: base parameters.
        phi: fast weights of this group, without group axis.
        state: (hidden [rows, l, d] from the trunk, valid [rows, l], position ids or ``None``,
            targets, weight [rows]).
        split: number of trunk layers.
    """
    hidden, valid, position_ids, targets, weight = state
    last = denoiser.head(theta, phi, hidden, valid, position_ids, split=split)
    return objective.diffusion_loss(lambda h: denoiser.readout(theta, h), last, targets, weight)


def anchor_loss(
    denoiser: Denoiser, theta: Theta, phi: Phi, hidden: Hidden, valid: Mask, anchor: State, *,
    split: int,
) -> Float[Array, ""]:  # fmt: skip
    """Sum of the outer loss from the trunk's output; ``phi = None`` is the plain model."""
    last = fast_weights.head_with_memory(denoiser, theta, phi, hidden, valid, split=split)
    return objective.diffusion_loss(
        lambda h: denoiser.readout(theta, h), last, anchor.targets, anchor.weight
    )


def _memory_off(denoiser, theta, hidden, valid, anchor, split, wanted):
    theta, hidden = jax.lax.stop_gradient((theta, hidden))

    def compute():
        return anchor_loss(denoiser, theta, None, hidden, valid, anchor, split=split)

    if isinstance(wanted, bool):
        return compute() if wanted else jnp.nan
    unknown = jnp.full((), jnp.nan, jax.eval_shape(compute).dtype)
    return jax.lax.cond(wanted, compute, lambda: unknown)


def plain_loss(
    denoiser: Denoiser, theta: Theta, batch: Batch, anchor: State
) -> tuple[Float[Array, ""], OuterLoss]:
    """The standard MDLM loss (paper, equation 2): no memory, both sums are the same number."""
    split = denoiser.num_layers
    hidden = denoiser.trunk(theta, anchor.tokens, batch.valid, split=split)
    loss = anchor_loss(denoiser, theta, None, hidden, batch.valid, anchor, split=split)
    return loss, OuterLoss(loss, jax.lax.stop_gradient(loss), jnp.sum(batch.maskable))
