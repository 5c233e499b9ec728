"""The outer step of the bilevel problem: adapt phi, then take the MDLM loss with it.

``outer_loss`` reads top to bottom. Differentiating it in theta gives the meta-gradient. The three
rules differ in what they treat as a constant:

* ``FirstOrder``: everything the inner loop reads, so that phi_K is a constant (the paper);
* ``TrunkStopped``: the hidden states that the inner loop reads;
* ``Exact``: nothing.

A new rule is one class with one line in ``META_GRADIENTS``; a config then names it
(``memory.meta_gradient``).
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Anchor
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.inner_loop import (
    GroupLoss,
    InnerGradient,
    InnerLoop,
    InnerParameters,
    InnerStep,
    choose_groups,
    computed_if,
    group_losses,
    harmless,
    sum_over,
)
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.parameters import Partitioned, differentiable
from memdlm_jax.registry import META_GRADIENTS
from memdlm_jax.typing import Hidden, Phi, Theta


@flax.struct.dataclass
class OuterLoss:
    """What came of the inner loop and of the outer loss, summed over the batch.

    Attributes:
        memory_on: outer loss with phi_K. In the paper's recipe phi_K was trained on the targets
            that this loss scores: never show it without ``memory_off``.
        memory_off: the same loss on the same masks with phi = None; NaN where not asked for.
        inner: record of the inner steps.
        phi_norm: mean over the groups of |phi_K|.
        phi_change: mean over the groups of |phi_K - phi_0|.
        phi: the adapted fast weights phi_K.
    """

    memory_on: Float[Array, ""]
    memory_off: Float[Array, ""]
    inner: InnerStep
    phi_norm: Float[Array, ""]
    phi_change: Float[Array, ""]
    phi: Phi


def outer_loss(
    inner_loop: InnerLoop,
    theta: Theta,
    learned: InnerParameters | None,
    phi: Phi,
    trajectory: Trajectory,
    anchor: Anchor,
    *,
    with_memory_off: bool | jax.Array = True,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], OuterLoss]:
    """Adapt phi along the trajectory, then take the MDLM loss at the anchor (paper, section 4).

    What is written (``trajectory``) and what is read (``anchor``) are separate. They may be the
    same rows, as in the paper, or different ones: a context that is written, and a question about
    it that is read. Both are divided evenly among the groups of phi, in order.

    Args:
        inner_loop: how memory is written; its ``meta_gradient`` decides what differentiating this
            function in theta means.
        theta: base parameters.
        learned: learned parts of the inner loop, or ``None``.
        phi: phi_0, leaves [groups, ...].
        trajectory: what is written.
        anchor: what is read.
        with_memory_off: also compute the loss without memory, and the inner losses after each step
            (no gradient flows through them).
        axis_name: device axis over which a ``global`` memory is shared.

    Returns:
        (sum of the memory-on loss over this batch, all sums).
    """
    config, split = inner_loop.config, inner_loop.split
    shared_axis = axis_name if config.scope == "global" else None
    rule = META_GRADIENTS(config.meta_gradient)(shared_axis)
    entered = inner_loop.enters(rule)

    # 1. The anchor up to where phi is first read, once for the inner loop and the outer loss.
    hidden = inner_loop.read(theta, anchor.state, anchor.context, entered)

    # 2. Write: gradient steps on phi along the trajectory.
    adapted, record = inner_loop.adapt(
        theta, learned, phi, trajectory, rule, hidden, with_memory_off
    )

    # 3. Read: the MDLM loss with phi_K, and without memory for comparison.
    def read(theta, phi, hidden):
        last = fast_weights.head_with_memory(
            inner_loop.denoiser, theta, phi, hidden, anchor.context,
            split=split, at=anchor.state.targets.positions, entered=entered,
        )  # fmt: skip
        return objective.state_loss(inner_loop.denoiser, theta, last, anchor.state)

    used = adapted
    if trajectory.dropout is not None:
        drop = jax.vmap(lambda phi, key: fast_weights.with_dropout(phi, key, config.dropout))
        used = drop(adapted, trajectory.dropout[-1])
    memory_on = read(theta, used, hidden)
    constants = jax.lax.stop_gradient((theta, None, hidden))
    memory_off = computed_if(with_memory_off, lambda: read(*constants))

    change = jax.tree.map(jnp.subtract, adapted, phi)
    norm, moved = jax.lax.stop_gradient(
        [fast_weights.group_norms(tree).mean() for tree in (adapted, change)]
    )
    return memory_on, OuterLoss(memory_on, memory_off, record, norm, moved, adapted)


@META_GRADIENTS.register("first_order")
@dataclasses.dataclass(frozen=True)
class FirstOrder:
    """The inner loop's inputs are constants of the outer loss (the paper and its code).

    Attributes:
        axis_name: device axis over which one memory is shared, if any.
    """

    axis_name: str | None = None
    shares_attention = True

    def inner_theta(self, theta: Theta) -> Theta:
        """Theta as a constant."""
        return jax.lax.stop_gradient(theta)

    def inner_hidden(self, hidden: Hidden) -> Hidden:
        """Hidden states as constants."""
        return jax.lax.stop_gradient(hidden)

    def gradient(self, loss: GroupLoss) -> InnerGradient:
        """The inner gradient as a constant."""
        return constant_gradient(loss, self.axis_name)


@META_GRADIENTS.register("exact")
@dataclasses.dataclass(frozen=True)
class Exact:
    """Nothing is a constant: the true gradient of the outer loss.

    Attributes:
        axis_name: device axis over which one memory is shared, if any.
    """

    axis_name: str | None = None
    shares_attention = True

    def inner_theta(self, theta: Theta) -> Theta:
        """Theta itself."""
        return theta

    def inner_hidden(self, hidden: Hidden) -> Hidden:
        """Hidden states themselves."""
        return hidden

    def gradient(self, loss: GroupLoss) -> InnerGradient:
        """The inner gradient with an exact derivative."""
        return forward_over_reverse_gradient(loss, self.axis_name)


@META_GRADIENTS.register("trunk_stopped")
class TrunkStopped(Exact):
    """Exact through fast weights and head layers; the trunk's hidden states are constants."""

    shares_attention = False  # In the first head layer it has a gradient, unlike in the trunk.

    def inner_hidden(self, hidden: Hidden) -> Hidden:
        """Hidden states as constants."""
        return jax.lax.stop_gradient(hidden)


def constant_gradient(loss: GroupLoss, axis_name: str | None = None) -> InnerGradient:
    """Gradient in phi of every group's loss, without a derivative of its own: first order."""
    rule = reverse_gradient(loss, axis_name)

    def value_and_gradient(theta, phi, state):
        return jax.lax.stop_gradient(rule(theta, phi, state))

    return value_and_gradient


def reverse_gradient(loss: GroupLoss, axis_name: str | None = None) -> InnerGradient:
    """Gradient in phi of every group's loss, by plain reverse mode.

    Differentiating it again is reverse over reverse: correct, and the oracle of
    ``forward_over_reverse_gradient``, but its residuals are large. ``axis_name`` sums the devices'
    shares of the loss and must then not be differentiated again.
    """

    def value_and_gradient(theta, phi, state):
        ones = jnp.ones((fast_weights.number_of_groups(phi),))
        grads, losses = jax.grad(_weighted(loss), 1, has_aux=True)(theta, phi, state, ones)
        return sum_over(axis_name, (losses, grads))

    return value_and_gradient


def forward_over_reverse_gradient(loss: GroupLoss, axis_name: str | None = None) -> InnerGradient:
    """The same gradient with a cheap exact derivative: a Jacobian-vector product of the gradient.

    For a cotangent v of grad_phi L, what flows back to (theta, phi, state) is the derivative of
    grad_(theta, phi, state) L along v in phi (second derivatives commute), so that only the inputs
    are kept for the backward pass (the idea of MixFlow-MG, arXiv 2505.00793).

    With ``axis_name`` every device holds the same phi and a share of the loss: the rule sums the
    incoming cotangent over the axis before the product and differentiates the local share.

    A group whose loss or gradient is not finite counts as a constant: ``fold`` skips its step.
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
        cotangents = sum_over(axis_name, cotangents)
        # A group that is not finite is skipped: nothing depends on it, so nothing flows back.
        zeros = jax.tree.map(jnp.zeros_like, cotangents)
        loss_cotangent, direction = choose_groups(fine, cotangents, zeros)
        floats, rebuild = _split_floats(state)
        phi, floats = harmless(fine, (phi, floats))
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


def _weighted(loss: GroupLoss) -> Callable:
    """(theta, phi, state, weights [g]) -> (weighted sum of the groups' losses, losses [g])."""

    def total(theta, phi, state, weights):
        losses = group_losses(loss, theta, phi, state)
        return jnp.sum(losses * weights.astype(losses.dtype)), losses

    return total


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
