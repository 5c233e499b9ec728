"""Parts of the method from outside the package, as a user would write them."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from memdlm_jax.diffusion import masking, objective
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.memory.meta_gradient import Exact
from memdlm_jax.memory.trajectory import Masks


def smoothed_cross_entropy(denoiser, config, theta, student, teacher, targets):
    """An inner loss: label smoothing of 0.1."""
    log_p = jax.nn.log_softmax(denoiser.readout(theta, student))
    losses = objective.label_losses(denoiser, theta, student, targets)
    return 0.9 * losses - 0.1 * log_p.mean(-1)


def rooted_adam(config):
    """An inner optimiser that has a derivative at a zero gradient."""
    return optax.adam(0.05, eps_root=1e-8)


def adam(config):
    return optax.adam(config.learning_rate)


def halves(key, config, rows):
    """A masking strategy: two disjoint masks that cover every maskable token once."""
    ranks = masking.random_ranks(key, rows.maskable)
    first = rows.maskable & (ranks < rows.maskable.sum(-1, keepdims=True) // 2)
    weights = jnp.ones(rows.maskable.shape[0])
    return Masks([first, rows.maskable & ~first], [weights, weights])


@dataclasses.dataclass(frozen=True)
class SquareSchedule(Schedule):
    """A schedule: alpha(t) = 1 - t^2."""

    def alpha(self, t):
        return 1 - t**2

    def alpha_derivative(self, t):
        return -2 * t


class HalfTheInnerGradient(Exact):
    """A meta-gradient rule: the inner gradient's derivative counts half."""

    def gradient(self, loss):
        rule = super().gradient(loss)

        def value_and_gradient(theta, phi, state):
            found = rule(theta, phi, state)
            stopped = jax.lax.stop_gradient(found)
            return jax.tree.map(lambda a, b: (a + b) / 2, found, stopped)

        return value_and_gradient


def wrong_shape(denoiser, config, theta, student, teacher, targets):
    return objective.label_losses(denoiser, theta, student, targets).sum(-1)
