"""One optimiser step and one validation step: pure functions for ``jit`` and ``pmap`` alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from memdlm_jax import partitioning
from memdlm_jax.diffusion.objective import PAPER_LOSS, LossConfig
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import fast_weights, learned, meta_gradient
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.losses import InnerLoss
from memdlm_jax.memory.meta_gradient import Corrupt, OuterLoss
from memdlm_jax.training import optimizer as optimizers
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.state import TrainState
from memdlm_jax.typing import Batch, Denoiser, Key, Partitioned, Theta

Metrics = dict[str, jax.Array]
"""Name -> scalar, already averaged over the whole batch."""


@dataclasses.dataclass(frozen=True)
class StepSetup:
    """Everything static about a step.

    Attributes:
        denoiser: the backbone.
        optimizer: settings of the outer optimiser.
        memory: settings of the Parametric Memory; ``None`` trains a plain MDLM.
        schedule: masking schedule of the outer loss.
        capacity: target slots of a row, see ``objective.gather_targets``; ``None`` is all.
        axis_name: device axis under ``pmap``; ``None`` on one device.
        corrupt: draws the anchor's mask and loss weight in the schedule's place, if given.
        loss: weights and normalisation of the outer loss.
        inner_loss: see ``meta_gradient.outer_loss``.
        inner_optimizer: see ``meta_gradient.outer_loss``.
        dropout: (theta, key) -> theta that drops inputs of its adapters, for training; or ``None``.
    """

    denoiser: Denoiser
    optimizer: OptimizerConfig
    memory: MemoryConfig | None = None
    schedule: LinearSchedule = dataclasses.field(default_factory=LinearSchedule)
    capacity: int | None = None
    axis_name: str | None = None
    corrupt: Corrupt | None = None
    loss: LossConfig = PAPER_LOSS
    inner_loss: InnerLoss | None = None
    inner_optimizer: optax.GradientTransformation | None = None
    dropout: Callable[[Theta, Key], Theta] | None = None

    def __post_init__(self):
        shared = self.memory is not None and self.memory.scope == "global"
        if shared and self.optimizer.accumulation > 1:
            raise ValueError(
                f"optimizer.accumulation={self.optimizer.accumulation} must be 1 with "
                "memory.scope='global': one memory cannot span micro-batches; "
                "use memory.scope='example'"
            )


@flax.struct.dataclass
class Sums:
    """What is summed over rows, micro-batches and devices before anything is divided.

    Attributes:
        memory_on: outer loss in nats.
        memory_off: the same without memory; NaN where not asked for.
        normaliser: what both are divided by.
        maskable: maskable tokens.
        tokens: valid tokens.
        inner: sums over the memories; ``None`` without memory.
    """

    memory_on: Float[Array, ""]
    memory_off: Float[Array, ""]
    normaliser: Int[Array, ""]
    maskable: Int[Array, ""]
    tokens: Int[Array, ""]
    inner: "InnerSums | None" = None


@flax.struct.dataclass
class InnerSums:
    """Sums over the memories of a batch.

    Attributes:
        groups: memories.
        taken: [k] groups that took inner step k.
        loss: [k] loss before the step over the groups that took it.
        loss_after: [k] the same loss after the step; NaN where not asked for.
        gradient_norm: [k] norm of the gradient before clipping, over the same groups.
        phi_norm: norms of phi_K.
        phi_change: norms of what the inner loop added to phi_0.
    """

    groups: Int[Array, ""]
    taken: Int[Array, "k"]
    loss: Float[Array, "k"]
    loss_after: Float[Array, "k"]
    gradient_norm: Float[Array, "k"]
    phi_norm: Float[Array, ""]
    phi_change: Float[Array, ""]


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key,
    report: bool | jax.Array,
    *,
    setup: StepSetup,
    frozen: Theta = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimiser step (paper, section 4.4).

    Args:
        state: before the step.
        batch: this device's rows [b, l], b a multiple of ``optimizer.accumulation``.
        key: PRNG key of the step, the same on all devices.
        report: whether to pay for the memory-off loss; a traced bool or a static one.
        setup: everything static.
        frozen: the part of theta that is not trained, see ``typing.Partitioned``; ``None`` if
            ``state.theta`` is all of theta.

    Returns:
        (state after the step, metrics). Gradient and losses are sums over all rows of all
        devices divided by the maskable tokens of all (or what ``setup.loss`` says), never means of
        means. Without memory ``loss/memory_on`` and ``loss/memory_off`` are the same number.

    Raises:
        ValueError: if the rows cannot be cut into the micro-batches.
    """
    gradient, sums = gradient_sums(setup, state.theta, batch, key, report, frozen)
    if setup.axis_name is not None:
        gradient, sums = jax.lax.psum((gradient, sums), setup.axis_name)
    scale = 1.0 / jnp.maximum(sums.normaliser, 1)
    gradient = jax.tree.map(lambda g, leaf: (g * scale).astype(leaf.dtype), gradient, state.theta)
    updates, optimizer_state = optimizers.build(setup.optimizer).update(
        gradient, state.optimizer_state, state.theta
    )
    theta = optax.apply_updates(state.theta, updates)
    metrics = metrics_of(sums) | {
        "gradient_norm": optax.tree.norm(gradient),
        "parameter_norm": optax.tree.norm(theta),
        "learning_rate": optimizers.learning_rate_at(setup.optimizer, state.step),
    }
    return TrainState(state.step + 1, theta, optimizer_state), metrics


def gradient_sums(
    setup: StepSetup,
    theta: Theta,
    batch: Batch,
    key: Key,
    report: bool | jax.Array,
    frozen: Theta = None,
) -> tuple[Theta, Sums]:
    """Gradient of the summed outer loss, and the sums, over this device's micro-batches.

    The gradient is accumulated in float32 or wider; micro-batches are consecutive rows and draw
    from keys of their own.
    """

    def one(batch, key):
        return _one_gradient(setup, theta, frozen, batch, key, report)

    return _over_micro_batches(setup, one, batch, key)


def _over_micro_batches(setup: StepSetup, one: Callable[[Batch, Key], Any], batch: Batch, key: Key):
    """Sum of ``one`` over the micro-batches, one after the other."""
    parts = setup.optimizer.accumulation
    if parts == 1:
        return one(batch, key)
    rows = batch.tokens.shape[0]
    if rows % parts:
        raise ValueError(
            f"optimizer.accumulation={parts} must divide the {rows} rows of a device's batch"
        )
    micro = fast_weights.group_rows(batch, parts)
    # On a mesh every micro-batch is divided, not the micro-batches among the devices.
    micro = partitioning.constrain_tree(micro, None, "rows", "length")
    inputs = (micro, jax.random.split(key, parts))

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, one(*inputs)), None

    shapes = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, inputs)[0]


def _one_gradient(setup: StepSetup, theta: Theta, frozen: Theta, batch: Batch, key: Key, report):
    if setup.dropout is not None:
        key, dropout_key = jax.random.split(key)
        if setup.axis_name is not None:
            device = jax.lax.axis_index(setup.axis_name)
            dropout_key = jax.random.fold_in(dropout_key, device)
        frozen = setup.dropout(frozen, dropout_key)

    def loss(theta):
        return _outer_loss(setup, theta, frozen, batch, key, report)

    gradient, sums = jax.grad(loss, has_aux=True)(theta)
    wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
    return wide, sums


def _outer_loss(
    setup: StepSetup, parameters: Any, frozen: Theta, batch: Batch, key: Key, report,
    training: bool = True,
):  # fmt: skip
    """Draw one corruption and take the loss on it: (sum, ``Sums``)."""
    theta, inner = learned.split(parameters)
    if frozen is not None:
        theta = Partitioned(theta, frozen)
    memory = setup.memory
    if memory is None:
        # The anchor is drawn as with memory, so that runs with one seed see the same masks.
        _, anchor_key, *_ = meta_gradient.step_keys(key, setup.axis_name)
        *_, anchor = meta_gradient.draw_anchor(
            anchor_key, setup.denoiser, batch, setup.schedule, setup.capacity, setup.corrupt,
            setup.loss,
        )  # fmt: skip
        loss, outer = meta_gradient.plain_loss(setup.denoiser, theta, batch, anchor)
        return loss, _sums(setup, outer, batch)
    phi, anchor, states = meta_gradient.draw(
        key, setup.denoiser, memory, batch, setup.schedule,
        capacity=setup.capacity, axis_name=setup.axis_name, corrupt=setup.corrupt, loss=setup.loss,
        micro_batches=setup.optimizer.accumulation, training=training,
    )  # fmt: skip
    loss, outer = meta_gradient.outer_loss(
        setup.denoiser, memory, theta, phi, batch, anchor, states,
        with_memory_off=report, axis_name=setup.axis_name, inner=inner,
        inner_loss=setup.inner_loss, inner_optimizer=setup.inner_optimizer, is_fresh=True,
    )  # fmt: skip
    return loss, _sums(setup, outer, batch)


def _sums(setup: StepSetup, outer: OuterLoss, batch: Batch) -> Sums:
    memory_off = jnp.asarray(outer.memory_off)
    normaliser = setup.loss.normaliser(outer.maskable, outer.rows)
    counts = normaliser, outer.maskable, jnp.sum(batch.valid)
    return Sums(outer.memory_on, memory_off, *counts, _inner_sums(setup, outer))


def _inner_sums(setup: StepSetup, outer: OuterLoss) -> InnerSums | None:
    record = outer.inner
    if record is None or outer.phi_norm is None or outer.phi_change is None:
        return None
    fine = ~record.skipped
    groups = jnp.asarray(fine.shape[-1])

    def over_taken(values):
        return jnp.where(fine, values, 0.0).sum(-1)

    sums = InnerSums(
        groups, fine.sum(-1),
        over_taken(record.loss), over_taken(record.loss_after), over_taken(record.gradient_norm),
        outer.phi_norm * groups, outer.phi_change * groups,
    )  # fmt: skip
    if setup.axis_name is None or setup.memory is None or setup.memory.scope != "global":
        return sums
    # Every device has the same memory: it counts once.
    first = jax.lax.axis_index(setup.axis_name) == 0
    return jax.tree.map(lambda leaf: jnp.where(first, leaf, jnp.zeros_like(leaf)), sums)


def metrics_of(sums: Sums) -> Metrics:
    """Averages of what was summed, by the names under which they are logged.

    ``inner/loss_K`` and ``inner/loss_after_K`` are inner step K's loss on its own state before and
    after it, over the memories that took it; ``inner/skipped`` counts the steps left out because
    they were not finite.
    """
    scale = 1.0 / jnp.maximum(sums.normaliser, 1)
    metrics = {
        "loss/memory_on": sums.memory_on * scale,
        "loss/memory_off": sums.memory_off * scale,
        "maskable": sums.maskable,
        "tokens": sums.tokens,
    }
    inner = sums.inner
    if inner is None:
        return metrics
    taken = jnp.maximum(inner.taken, 1)
    for k in range(taken.shape[0]):
        metrics[f"inner/loss_{k + 1}"] = inner.loss[k] / taken[k]
        metrics[f"inner/loss_after_{k + 1}"] = inner.loss_after[k] / taken[k]
        metrics[f"inner/gradient_norm_{k + 1}"] = inner.gradient_norm[k] / taken[k]
    metrics["inner/phi_norm"] = inner.phi_norm / inner.groups
    metrics["inner/phi_change"] = inner.phi_change / inner.groups
    metrics["inner/skipped"] = jnp.sum(inner.groups - inner.taken)
    return metrics


def eval_step(
    theta: Theta, batch: Batch, key: Key, *, setup: StepSetup, frozen: Theta = None
) -> Sums:
    """Sums of the memory-on and memory-off losses on one validation batch.

    Times are drawn with low discrepancy whatever the training schedule: the expectation is the
    same, its variance smaller. Micro-batches are those of training. Add the results of several
    batches with fixed keys, then divide by ``maskable``.
    """
    schedule = dataclasses.replace(setup.schedule, sampling="low_discrepancy")
    setup = dataclasses.replace(setup, schedule=schedule)

    def one(batch, key):
        return _outer_loss(setup, theta, frozen, batch, key, True, training=False)[1]

    sums = _over_micro_batches(setup, one, batch, key)
    return sums if setup.axis_name is None else jax.lax.psum(sums, setup.axis_name)
