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
from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import PAPER_LOSS, Anchor, Corruption, LossConfig
from memdlm_jax.diffusion.schedule import LinearSchedule, Schedule
from memdlm_jax.memory import fast_weights, meta_gradient
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.meta_gradient import OuterLoss
from memdlm_jax.parameters import Partitioned, WithInner
from memdlm_jax.training import optimizer as optimizers
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.state import TrainState
from memdlm_jax.typing import Batch, Denoiser, Key, Theta

Metrics = dict[str, jax.Array]
"""Name -> scalar, already averaged over the whole batch."""


@dataclasses.dataclass(frozen=True)
class StepSetup:
    """Everything static about a step.

    Attributes:
        denoiser: the backbone.
        optimizer: settings of the outer optimiser.
        inner_loop: writes the Parametric Memory, on the same denoiser; ``None`` trains a plain
            MDLM.
        schedule: masking schedule of the outer loss.
        capacity: target slots of a row, see ``objective.gather_targets``; ``None`` is all.
        axis_name: device axis under ``pmap``; ``None`` on one device.
        corruption: forward process that replaces the schedule, if given.
        loss: weights and normalisation of the outer loss.
        dropout: (theta, key) -> theta that drops inputs of its adapters, for training; or ``None``.
    """

    denoiser: Denoiser
    optimizer: OptimizerConfig
    inner_loop: InnerLoop | None = None
    schedule: Schedule = dataclasses.field(default_factory=LinearSchedule)
    capacity: int | None = None
    axis_name: str | None = None
    corruption: Corruption | None = None
    loss: LossConfig = PAPER_LOSS
    dropout: Callable[[Theta, Key], Theta] | None = None

    def __post_init__(self):
        if self.inner_loop is None:
            return
        if self.inner_loop.denoiser != self.denoiser:
            raise ValueError("inner_loop.denoiser must be the denoiser that is trained")
        if self.inner_loop.config.scope == "global" and self.optimizer.accumulation > 1:
            raise ValueError(
                f"optimizer.accumulation={self.optimizer.accumulation} must be 1 with "
                "memory.scope='global': one memory cannot span micro-batches; "
                "use memory.scope='example'"
            )

    def with_denoiser(self, denoiser: Denoiser) -> "StepSetup":
        """The same step of another denoiser."""
        inner_loop = self.inner_loop
        if inner_loop is not None:
            inner_loop = dataclasses.replace(inner_loop, denoiser=denoiser)
        return dataclasses.replace(self, denoiser=denoiser, inner_loop=inner_loop)


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
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
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


def step_keys(key: Key, axis_name: str | None = None) -> tuple[Key, Key, Key, Key]:
    """Keys of phi_0 and, different on every device, of the anchor, inner masks and dropout."""
    phi_key, *others = jax.random.split(key, 4)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        others = [jax.random.fold_in(k, device) for k in others]
    return phi_key, *others


def _outer_loss(
    setup: StepSetup, parameters: Any, frozen: Theta, batch: Batch, key: Key, report,
    training: bool = True,
):  # fmt: skip
    """Draw one corruption and take the loss on it: (sum, ``Sums``)."""
    theta, learned = parameters, None
    if isinstance(parameters, WithInner):
        theta, learned = parameters.theta, parameters.inner
    if frozen is not None:
        theta = Partitioned(theta, frozen)
    denoiser, loop, axis_name = setup.denoiser, setup.inner_loop, setup.axis_name
    batch = setup.loss.supervised(batch)
    # The anchor is drawn alike with and without memory: runs with one seed see the same masks.
    phi_key, anchor_key, mask_key, dropout_key = step_keys(key, axis_name)
    anchor = objective.draw_anchor(
        anchor_key, batch, denoiser.mask_token_id, setup.corruption or setup.schedule,
        setup.loss, setup.capacity,
    )  # fmt: skip
    if loop is None:
        loss = objective.mdlm_loss(denoiser, theta, anchor)
        return loss, _sums(setup, anchor, batch, loss, jax.lax.stop_gradient(loss))

    keys = phi_key, mask_key, dropout_key if training else None
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    parts = devices * setup.optimizer.accumulation
    phi, trajectory = loop.draw(keys, batch, anchor, setup.schedule, learned, parts, axis_name)
    loss, outer = meta_gradient.outer_loss(
        loop, theta, learned, phi, trajectory, anchor,
        with_memory_off=report, axis_name=axis_name,
    )  # fmt: skip
    inner = _inner_sums(setup, outer)
    return loss, _sums(setup, anchor, batch, outer.memory_on, outer.memory_off, inner)


def _sums(
    setup: StepSetup, anchor: Anchor, batch: Batch, memory_on, memory_off, inner=None
) -> Sums:
    maskable, rows = anchor.maskable.sum(), jnp.sum(anchor.maskable > 0)
    normaliser = setup.loss.normaliser(maskable, rows)
    return Sums(memory_on, memory_off, normaliser, maskable, jnp.sum(batch.valid), inner)


def _inner_sums(setup: StepSetup, outer: OuterLoss) -> InnerSums:
    record = outer.inner
    fine = ~record.skipped
    groups = jnp.asarray(fine.shape[-1])

    def over_taken(values):
        return jnp.where(fine, values, 0.0).sum(-1)

    sums = InnerSums(
        groups, fine.sum(-1),
        over_taken(record.loss), over_taken(record.loss_after), over_taken(record.gradient_norm),
        outer.phi_norm * groups, outer.phi_change * groups,
    )  # fmt: skip
    if setup.axis_name is None or setup.inner_loop is None:
        return sums
    if setup.inner_loop.config.scope != "global":
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
