"""The inner loop: fold gradient steps on fast weights over a trajectory.

``adapt`` takes any loss ``(theta, phi, state) -> scalar`` of *one group* and any optax optimiser;
the denoising loss and clipped SGD of the paper are one choice of each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from memdlm_jax import partitioning
from memdlm_jax.memory import fast_weights, shortcuts
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.losses import InnerLoss
from memdlm_jax.typing import Partitioned, Phi, Theta, differentiable

Measure = Callable[[Theta, Phi, Any], jax.Array]
"""(theta, phi [g, ...], state [g, ...]) -> losses [g]."""

InnerGradient = Callable[[Theta, Phi, Any], tuple[jax.Array, Phi]]
"""(theta, phi [g, ...], state [g, ...]) -> (losses [g], gradient like phi)."""


@flax.struct.dataclass
class InnerStep:
    """What one inner step saw and did; leading axes [steps, groups].

    Attributes:
        loss: inner loss before the step, nats per supervised token (times its weight).
        loss_after: the same loss on the same state after the step; NaN where not measured.
        gradient_norm: norm of the whole gradient before clipping.
        skipped: the step was left out because loss or gradient was not finite.
    """

    loss: Float[Array, "k g"]
    loss_after: Float[Array, "k g"]
    gradient_norm: Float[Array, "k g"]
    skipped: Bool[Array, "k g"]


def adapt(
    gradient: InnerGradient,
    theta: Theta,
    phi: Phi,
    states: Sequence[Any],
    optimizer: optax.GradientTransformation,
    measure: Measure | None = None,
    leading: tuple[Any, Callable[[Any], Any]] | None = None,
    is_fresh: bool = False,
) -> tuple[Phi, InnerStep]:
    """Take one optimiser step on phi per state, in order (paper, equations 5 to 8).

    Args:
        gradient: ``constant_gradient(loss)``, ``forward_over_reverse_gradient(loss)`` or
            ``reverse_gradient(loss)``.
        theta: base parameters, read only.
        phi: fast weights, leaves [g, ...].
        states: one per inner step, leaves [g, ...].
        optimizer: applied to every group alone, its state starting afresh.
        measure: the loss to be recorded after every step, see ``measured``; ``None`` records NaN.
        leading: (entries stacked along a first axis, entry -> state) of steps before those of
            ``states``, walked under a scan: each state is made when its step is taken.
        is_fresh: ``phi`` leaves the model unchanged (B = 0), and ``gradient`` is of first order:
            the first step then leaves out what is known to be zero, unless it is a ``leading`` one.

    Returns:
        The adapted phi, and the record of the steps. A step whose loss or gradient is not finite
        leaves its group's phi and optimiser state as they were and is counted as skipped. With
        ``forward_over_reverse_gradient`` it leaves no trace in derivatives either, unless what is
        not finite is theta, or the trunk that a state was computed with.
    """

    def walk(before, state, is_fresh=False):
        phi, optimizer_state = before
        loss, grads = gradient(theta, shortcuts.fresh(phi) if is_fresh else phi, state)
        grads = shortcuts.unwrapped(grads) if is_fresh else grads
        norm = jax.lax.stop_gradient(fast_weights.group_norms(grads))
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        grads = _harmless(fine, grads)
        updates, new_state = jax.vmap(optimizer.update)(grads, optimizer_state, phi)
        phi = _where(fine, optax.apply_updates(phi, updates), phi)
        phi = partitioning.constrain_tree(phi, "rows")
        loss = jax.lax.stop_gradient(loss)
        after = jnp.full_like(loss, jnp.nan) if measure is None else measure(theta, phi, state)
        kept = phi, _where(fine, new_state, optimizer_state)
        return kept, InnerStep(loss, after, norm, ~fine)

    reached, records = (phi, jax.vmap(optimizer.init)(phi)), []
    if leading is not None:
        entries, read = leading
        reached, record = jax.lax.scan(lambda at, x: walk(at, read(x)), reached, entries)
        records.append(record)
    for number, state in enumerate(states):
        reached, record = walk(reached, state, is_fresh and number == 0 and leading is None)
        records.append(jax.tree.map(lambda x: x[None], record))
    return reached[0], jax.tree.map(lambda *steps: jnp.concatenate(steps), *records)


def _where(fine: Bool[Array, "g"], new, old):
    """Choose per group between two trees."""
    return jax.tree.map(
        lambda a, b: jnp.where(fine.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old
    )


def _harmless(fine: Bool[Array, "g"], tree):
    """The tree with ones for the groups that are skipped.

    Choosing the old value afterwards is not enough for a derivative: it sends a zero back through
    the step, and zero times NaN is NaN. Ones, because norms and roots have no derivative at zero.
    """
    return _where(fine, tree, jax.tree.map(jnp.ones_like, tree))


def inner_optimizer(config: MemoryConfig, rates: Phi = None) -> optax.GradientTransformation:
    """SGD after clipping (paper, section 4.3).

    Args:
        config: kind and bound of the clipping, learning rate.
        rates: learned rates in phi's structure, leaves [layers], in the place of the config's.
    """
    clip = {
        "local": clip_local(config.clip_norm),
        "global": clip_global(config.clip_norm),
        "none": optax.identity(),
    }[config.clip]
    if rates is None:
        return optax.chain(clip, optax.sgd(config.learning_rate))
    return optax.chain(clip, _sgd_per_layer(rates))


def _sgd_per_layer(rates: Phi) -> optax.GradientTransformation:
    def step(g, rate):
        return -rate.reshape(-1, *(1,) * (g.ndim - 1)) * g

    return _stateless(lambda grads: jax.tree.map(step, grads, rates))


def clip_local(norm: float) -> optax.GradientTransformation:
    """Scale every gradient *matrix* (last two axes) whose norm exceeds ``norm`` down to it.

    A stack of layers or experts is clipped matrix by matrix, as the public code clips tensor by
    tensor; the factor is norm / (|g| + 1e-12).
    """

    def clip(grads):
        def one(g):
            return g * _clip_factor(jnp.sum(g**2, axis=(-2, -1), keepdims=True), norm)

        return jax.tree.map(one, grads)

    return _stateless(clip)


def clip_global(norm: float) -> optax.GradientTransformation:
    """Scale all gradients by one factor where their common norm exceeds ``norm``."""

    def clip(grads):
        square = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
        return jax.tree.map(lambda g: g * _clip_factor(square, norm), grads)

    return _stateless(clip)


def _stateless(change: Callable[[Phi], Phi]) -> optax.GradientTransformation:
    def update(grads, state, params=None):
        del params
        return change(grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip_factor(square: jax.Array, bound: float) -> jax.Array:
    # The gradient of A is exactly zero at phi_0 (B = 0), where d|g|/dg is 0/0: without the inner
    # ``where`` the meta-gradient would be NaN from the first step on.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    exceeds = (square > 0) & (norm > bound)
    return jnp.where(exceeds, bound / (norm + 1e-12), 1.0)


def measured(loss: InnerLoss, wanted: bool | jax.Array, axis_name: str | None = None) -> Measure:
    """Losses of all groups as plain numbers, no derivative, computed only where ``wanted``."""

    def measure(theta, phi, state):
        theta, phi, state = jax.lax.stop_gradient((theta, phi, state))

        def compute():
            return _losses(loss, theta, phi, state)

        unknown = jax.eval_shape(compute)
        unknown = jnp.full(unknown.shape, jnp.nan, unknown.dtype)
        if isinstance(wanted, bool):
            found = compute() if wanted else unknown
        else:
            found = jax.lax.cond(wanted, compute, lambda: unknown)
        return _over_devices(found, axis_name)

    return measure


def constant_gradient(loss: InnerLoss, axis_name: str | None = None) -> InnerGradient:
    """Gradient in phi of every group's loss, without a derivative of its own: first order."""
    rule = reverse_gradient(loss, axis_name)

    def value_and_gradient(theta, phi, state):
        return jax.lax.stop_gradient(rule(theta, phi, state))

    return value_and_gradient


def reverse_gradient(loss: InnerLoss, axis_name: str | None = None) -> InnerGradient:
    """Gradient in phi of every group's loss, by plain reverse mode.

    Differentiating it again is reverse over reverse: correct, and the oracle of
    ``forward_over_reverse_gradient``, but its residuals are large. ``axis_name`` sums the devices'
    shares of the loss and must then not be differentiated again.
    """

    def value_and_gradient(theta, phi, state):
        ones = jnp.ones((fast_weights.number_of_groups(phi),))
        grads, losses = jax.grad(_weighted(loss), 1, has_aux=True)(theta, phi, state, ones)
        return _over_devices((losses, grads), axis_name)

    return value_and_gradient


def forward_over_reverse_gradient(loss: InnerLoss, axis_name: str | None = None) -> InnerGradient:
    """The same gradient with a cheap exact derivative: a Jacobian-vector product of the gradient.

    For a cotangent v of grad_phi L, what flows back to (theta, phi, state) is the derivative of
    grad_(theta, phi, state) L along v in phi (second derivatives commute), so that only the inputs
    are kept for the backward pass (the idea of MixFlow-MG, arXiv 2505.00793).

    With ``axis_name`` every device holds the same phi and a share of the loss: the rule sums the
    incoming cotangent over the axis before the product and differentiates the local share.

    A group whose loss or gradient is not finite counts as a constant: ``adapt`` skips its step.
    """
    weighted = _weighted(loss)

    @jax.custom_vjp
    def value_and_gradient(theta, phi, state):
        return reverse_gradient(loss, axis_name)(theta, phi, state)

    def forward(theta, phi, state):
        loss, grads = value_and_gradient(theta, phi, state)
        fine = jnp.isfinite(loss) & jnp.isfinite(fast_weights.group_norms(grads))
        return (loss, grads), (theta, phi, state, fine)

    def backward(saved, cotangents):
        theta, phi, state, fine = saved
        cotangents = _over_devices(cotangents, axis_name)
        # A group that is not finite is skipped: nothing depends on it, so nothing flows back.
        zeros = jax.tree.map(jnp.zeros_like, cotangents)
        loss_cotangent, direction = _where(fine, cotangents, zeros)
        floats, rebuild = _split_floats(state)
        phi, floats = _harmless(fine, (phi, floats))
        trained, complete = differentiable(theta)

        def gradients(phi, weights):
            def total(trained, phi, floats):
                return weighted(complete(trained), phi, rebuild(floats), weights)[0]

            return jax.grad(total, (0, 1, 2))(trained, phi, floats)

        # One product for both outputs: moving the weights along the losses' cotangent adds
        # sum_g c_g grad L_g to the second-order term.
        at = (phi, jnp.ones_like(loss_cotangent))
        _, (d_trained, d_phi, d_floats) = jax.jvp(gradients, at, (direction, loss_cotangent))
        d_theta = d_trained
        if isinstance(theta, Partitioned):
            d_theta = Partitioned(d_trained, frozen=None)  # no cotangent at all
        return d_theta, d_phi, rebuild(d_floats, keep_others=False)

    value_and_gradient.defvjp(forward, backward)
    return value_and_gradient


def _weighted(loss: InnerLoss):
    """(theta, phi, state, weights [g]) -> (weighted sum of the groups' losses, losses [g])."""

    def total(theta, phi, state, weights):
        losses = _losses(loss, theta, phi, state)
        return jnp.sum(losses * weights.astype(losses.dtype)), losses

    return total


def _losses(loss: InnerLoss, theta: Theta, phi: Phi, state: Any) -> jax.Array:
    """Losses of all groups, [g]."""
    groups = fast_weights.number_of_groups(phi)
    return partitioning.map_groups(loss, groups, (None, 0, 0))(theta, phi, state)


def _over_devices(tree, axis_name: str | None):
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _split_floats(tree):
    """Return the inexact leaves of a tree, and a function that puts such leaves back into it."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def rebuild(floats, keep_others=True):
        floats = iter(floats)
        merged = [
            next(floats) if is_float else (leaf if keep_others else None)
            for leaf, is_float in zip(leaves, inexact, strict=True)
        ]
        return jax.tree.unflatten(structure, merged)

    return [x for x, is_float in zip(leaves, inexact, strict=True) if is_float], rebuild
