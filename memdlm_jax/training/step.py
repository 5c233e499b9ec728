"""One optimiser step and one validation step: pure functions for ``jit`` and ``pmap`` alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import fast_weights, meta_gradient
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.meta_gradient import Corrupt, OuterLoss
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
        memory: settings of the Parametric Memory; ``None`` trains a plain MDLM.
        schedule: masking schedule of the outer loss.
        capacity: target slots of a row, see ``objective.gather_targets``; ``None`` is all.
        axis_name: device axis under ``pmap``; ``None`` on one device.
        corrupt: draws the anchor's mask and loss weight in the schedule's place, if given.
    """

    denoiser: Denoiser
    optimizer: OptimizerConfig
    memory: MemoryConfig | None = None
    schedule: LinearSchedule = dataclasses.field(default_factory=LinearSchedule)
    capacity: int | None = None
    axis_name: str | None = None
    corrupt: Corrupt | None = None

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
        maskable: maskable tokens.
        tokens: valid tokens.
        groups: memories; 0 without memory.
        inner_loss: [k] loss of every inner step over the groups that took it.
        inner_taken: [k] groups that took it.
        phi_norm: norms of what the inner loop added to phi_0.
    """

    memory_on: Float[Array, ""]
    memory_off: Float[Array, ""]
    maskable: Int[Array, ""]
    tokens: Int[Array, ""]
    groups: Int[Array, ""]
    inner_loss: Float[Array, "k"]
    inner_taken: Int[Array, "k"]
    phi_norm: Float[Array, ""]


def train_step(
    state: TrainState, batch: Batch, key: Key, report: bool | jax.Array, *, setup: StepSetup
) -> tuple[TrainState, Metrics]:
    """Take one optimiser step (paper, section 4.4).

    Args:
        state: before the step.
        batch: this device's rows [b, l], b a multiple of ``optimizer.accumulation``.
        key: PRNG key of the step, the same on all devices.
        report: whether to pay for the memory-off loss; a traced bool or a static one.
        setup: everything static.

    Returns:
        (state after the step, metrics). Gradient and losses are sums over all rows of all
        devices divided by the maskable tokens of all, never means of means. Without memory
        ``loss/memory_on`` and ``loss/memory_off`` are the same number.

    Raises:
        ValueError: if the rows cannot be cut into the micro-batches.
    """
    gradient, sums = gradient_sums(setup, state.theta, batch, key, report)
    if setup.axis_name is not None:
        gradient, sums = jax.lax.psum((gradient, sums), setup.axis_name)
    scale = 1.0 / jnp.maximum(sums.maskable, 1)
    gradient = jax.tree.map(lambda g, leaf: (g * scale).astype(leaf.dtype), gradient, state.theta)
    updates, optimizer_state = optimizers.build(setup.optimizer).update(
        gradient, state.optimizer_state, state.theta
    )
    theta = optax.apply_updates(state.theta, updates)
    metrics = _metrics(sums) | {
        "gradient_norm": optax.tree.norm(gradient),
        "parameter_norm": optax.tree.norm(theta),
        "learning_rate": optimizers.learning_rate_at(setup.optimizer, state.step),
    }
    return TrainState(state.step + 1, theta, optimizer_state), metrics


def gradient_sums(
    setup: StepSetup, theta: Theta, batch: Batch, key: Key, report: bool | jax.Array
) -> tuple[Theta, Sums]:
    """Gradient of the summed outer loss, and the sums, over this device's micro-batches.

    The gradient is accumulated in float32 or wider; micro-batches are consecutive rows and draw
    from keys of their own.
    """

    def one(batch, key):
        return _one_gradient(setup, theta, batch, key, report)

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
    inputs = (fast_weights.group_rows(batch, parts), jax.random.split(key, parts))

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, one(*inputs)), None

    shapes = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, inputs)[0]


def _one_gradient(setup: StepSetup, theta: Theta, batch: Batch, key: Key, report):
    def loss(theta):
        return _outer_loss(setup, theta, batch, key, report)

    gradient, sums = jax.grad(loss, has_aux=True)(theta)
    wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
    return wide, sums


def _outer_loss(setup: StepSetup, theta: Theta, batch: Batch, key: Key, report):
    """Draw one corruption and take the loss on it: (sum, ``Sums``)."""
    if setup.memory is None:
        # The anchor is drawn as with memory, so that runs with one seed see the same masks.
        _, anchor_key, _ = meta_gradient.step_keys(key, setup.axis_name)
        _, anchor = meta_gradient.draw_anchor(
            anchor_key, setup.denoiser, batch, setup.schedule, setup.capacity, setup.corrupt
        )
        loss, outer = meta_gradient.plain_loss(setup.denoiser, theta, batch, anchor)
    else:
        phi, anchor, trajectory = meta_gradient.draw(
            key, setup.denoiser, setup.memory, batch, setup.schedule,
            capacity=setup.capacity, axis_name=setup.axis_name, corrupt=setup.corrupt,
        )  # fmt: skip
        loss, outer = meta_gradient.outer_loss(
            setup.denoiser, setup.memory, theta, phi, batch, anchor, trajectory,
            with_memory_off=report, axis_name=setup.axis_name,
        )  # fmt: skip
    return loss, _sums(outer, batch)


def _sums(outer: OuterLoss, batch: Batch) -> Sums:
    losses = (outer.memory_on, jnp.asarray(outer.memory_off), outer.maskable)
    tokens = jnp.sum(batch.valid)
    if outer.inner is None or outer.phi_norm is None:
        none = jnp.zeros((), jnp.int32)
        return Sums(*losses, tokens, none, jnp.zeros(0), jnp.zeros(0, jnp.int32), jnp.zeros(()))
    fine = ~outer.inner.skipped
    inner_loss = jnp.where(fine, outer.inner.loss, 0.0).sum(-1)
    groups = jnp.asarray(fine.shape[-1])
    return Sums(*losses, tokens, groups, inner_loss, fine.sum(-1), outer.phi_norm * groups)


def _metrics(sums: Sums) -> Metrics:
    maskable = jnp.maximum(sums.maskable, 1)
    metrics = {
        "loss/memory_on": sums.memory_on / maskable,
        "loss/memory_off": sums.memory_off / maskable,
        "maskable": sums.maskable,
        "tokens": sums.tokens,
    }
    steps = sums.inner_loss.shape[0]
    if steps == 0:
        return metrics
    mean = sums.inner_loss / jnp.maximum(sums.inner_taken, 1)
    metrics |= {f"inner/loss_{k + 1}": mean[k] for k in range(steps)}
    metrics["inner/phi_norm"] = sums.phi_norm / sums.groups
    metrics["inner/skipped"] = 1.0 - sums.inner_taken.sum() / (steps * sums.groups)
    return metrics


def eval_step(theta: Theta, batch: Batch, key: Key, *, setup: StepSetup) -> Sums:
    """Sums of the memory-on and memory-off losses on one validation batch.

    Times are drawn with low discrepancy whatever the training schedule: the expectation is the
    same, its variance smaller. Micro-batches are those of training. Add the results of several
    batches with fixed keys, then divide by ``maskable``.
    """
    schedule = dataclasses.replace(setup.schedule, sampling="low_discrepancy")
    setup = dataclasses.replace(setup, schedule=schedule)

    def one(batch, key):
        return _outer_loss(setup, theta, batch, key, True)[1]

    sums = _over_micro_batches(setup, one, batch, key)
    return sums if setup.axis_name is None else jax.lax.psum(sums, setup.axis_name)
