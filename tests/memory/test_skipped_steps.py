"""A skipped inner step leaves no trace: neither in phi nor in the meta-gradient.

The oracle never meets the bad step: it runs every group alone over the states that are left, and
differentiates plain reverse over reverse.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import clipped_sgd, fold
from memdlm_jax.memory.meta_gradient import forward_over_reverse_gradient, reverse_gradient
from tests.memory import tiny
from tests.memory.test_inner_loop import GROUPS, PHI, STATES, THETA, normal, toy_loss

BAD_GROUP = 1
WEIGHTS = {name: normal(30 + i, *leaf.shape) for i, (name, leaf) in enumerate(PHI.items())}
OPTIMIZERS = {
    "clipped_sgd": clipped_sgd(MemoryConfig(clip_norm=6.0, learning_rate=0.1)),
    "adam": optax.adam(0.05),
}
# What spoils a step: a NaN that comes in, a loss that overflows from finite numbers, and a finite
# loss whose gradient's norm overflows.
SPOILS = {
    "nan_input": ("x", lambda x: np.full_like(x, np.nan)),
    "loss_overflows": ("y", lambda y: np.full_like(y, 1e200)),
    "norm_overflows": ("y", lambda y: np.full_like(y, 1e153)),
}


@pytest.fixture(scope="module", autouse=True)
def wide():
    with tiny.float64():
        yield


def spoilt(step, kind):
    """The toy states with one step of one group spoilt."""
    name, spoil = SPOILS[kind]
    states = [dict(state) for state in STATES]
    states[step][name] = states[step][name].copy()
    states[step][name][BAD_GROUP] = spoil(states[step][name][BAD_GROUP])
    return states


def score(phi, weights):
    return sum(jnp.sum(phi[name] * weights[name]) for name in phi)


@functools.cache
def compiled(rule, name):
    """Score of phi_K and record, with the gradient in theta and phi_0, under one optimiser."""

    def outer(theta, phi, states, weights):
        adapted, record = fold(rule(toy_loss), theta, phi, states, OPTIMIZERS[name])
        return score(adapted, weights), record

    return jax.jit(jax.value_and_grad(outer, (0, 1), has_aux=True))


def gradients(rule, theta, phi, states, weights, name):
    """Record, and the gradient of a fixed score of phi_K in theta and phi_0."""
    (_, record), grads = compiled(rule, name)(theta, phi, states, weights)
    return record, grads


@functools.cache
def without_the_step(step, optimizer):
    """The oracle's gradient in theta and phi_0: group by group, the bad step left out."""
    of_theta, of_phi = jax.tree.map(np.zeros_like, THETA), jax.tree.map(np.zeros_like, PHI)
    for g in range(GROUPS):
        kept = [s for k, s in enumerate(STATES) if (g, k) != (BAD_GROUP, step)]
        own = lambda tree, g=g: {name: leaf[g : g + 1] for name, leaf in tree.items()}  # noqa: E731
        states = [own(state) for state in kept]
        _, (theta, phi) = gradients(
            reverse_gradient, THETA, own(PHI), states, own(WEIGHTS), optimizer
        )
        of_theta = jax.tree.map(np.add, of_theta, theta)
        for name, leaf in phi.items():
            of_phi[name][g] = leaf[0]
    return of_theta, of_phi


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_gradient_is_that_without_the_step(name, step, kind):
    record, ours = gradients(
        forward_over_reverse_gradient,
        THETA, PHI, spoilt(step, kind), WEIGHTS, name,
    )  # fmt: skip
    expected = np.zeros((len(STATES), GROUPS), bool)
    expected[step, BAD_GROUP] = True
    np.testing.assert_array_equal(record.skipped, expected)
    tiny.assert_close(ours, without_the_step(step, name), 1e-11)


@pytest.mark.parametrize("kind", SPOILS)
def test_rule_takes_a_group_that_is_not_finite_for_a_constant(kind):
    """Used without ``fold``: cotangents that do arrive at such a group are not passed on."""
    cotangents = normal(40, GROUPS), {n: normal(41, *leaf.shape) for n, leaf in PHI.items()}
    rule = forward_over_reverse_gradient(toy_loss)
    state = spoilt(0, kind)[0]
    theta, phi, states = jax.jit(lambda c: jax.vjp(rule, THETA, PHI, state)[1](c))(cotangents)
    good = np.arange(GROUPS) != BAD_GROUP
    kept, silent = (jax.tree.map(lambda x, g=g: x[g], cotangents) for g in (good, ~good))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(silent))
    of_good = jax.tree.map(lambda x: x[good], (PHI, STATES[0]))
    oracle = reverse_gradient(toy_loss)
    expected = jax.jit(lambda c: jax.vjp(oracle, THETA, *of_good)[1](c))(kept)
    ours = (theta, *jax.tree.map(lambda x: x[good], (phi, states)))
    tiny.assert_close(ours, expected, 1e-11)
    for leaf in jax.tree.leaves((phi, states)):
        assert not leaf[BAD_GROUP].any()


def test_every_step_skipped_gives_no_gradient_to_theta():
    """phi_K is phi_0: nothing of theta went into it, and phi_0 passes through unchanged."""
    states = [{"x": s["x"], "y": np.full_like(s["y"], np.nan)} for s in STATES]
    record, (theta, phi) = gradients(
        forward_over_reverse_gradient,
        THETA, PHI, states, WEIGHTS, "clipped_sgd",
    )  # fmt: skip
    assert record.skipped.all()
    assert not theta["w"].any()
    for name, leaf in phi.items():
        np.testing.assert_array_equal(leaf, WEIGHTS[name])


def test_a_bad_share_of_one_device_skips_the_step_on_all_of_them():
    """Shared phi: the mapped axis stands for the devices, and one of them has the NaN."""
    phi, weights = ({name: leaf[:1] for name, leaf in tree.items()} for tree in (PHI, WEIGHTS))
    states = [{n: x[:, None] for n, x in state.items()} for state in spoilt(1, "nan_input")]

    def on_device(states, with_all):
        def outer(theta, phi):
            rule = forward_over_reverse_gradient(toy_loss, "devices")
            sgd = OPTIMIZERS["clipped_sgd"]
            adapted, record = fold(rule, theta, phi, states, sgd)
            return score(adapted, weights) * with_all, record

        return jax.grad(outer, (0, 1), has_aux=True)(THETA, phi)

    # One device carries the outer loss, so that the sum over devices is its gradient once.
    first = jnp.array([1.0, 0.0, 0.0])
    mapped = jax.vmap(on_device, in_axes=(0, 0), axis_name="devices")
    (theta, _), record = jax.jit(mapped)(states, first)
    assert record.skipped[:, :, 0].tolist() == [[False, True, False]] * GROUPS

    def one_memory(theta, phi, state):
        return sum(toy_loss(theta, phi, {n: x[d] for n, x in state.items()}) for d in range(GROUPS))

    def outer(theta):
        kept = [{n: x[None] for n, x in STATES[k].items()} for k in (0, 2)]
        rule = reverse_gradient(one_memory)
        adapted, _ = fold(rule, theta, phi, kept, OPTIMIZERS["clipped_sgd"])
        return score(adapted, weights)

    expected = jax.jit(jax.grad(outer))(THETA)
    tiny.assert_close(jax.tree.map(lambda leaf: leaf.sum(0), theta), expected, 1e-11)


@pytest.mark.parametrize("weight", [np.nan, 1e300])
@pytest.mark.parametrize("mode", ["first_order", "trunk_stopped", "exact"])
def test_outer_gradient_of_a_batch_with_a_skipped_row(mode, weight):
    """One row's pre-anchor step is skipped; the gradient is the sum over rows without it."""
    config, theta = tiny.settings(mode, "example"), tiny.MODEL.init(0)
    phi, batch, anchor, trajectory = tiny.draw(config, tiny.batch_of(0))
    first, last = trajectory.states
    bad = first.replace(weight=first.weight.at[BAD_GROUP].set(weight))
    given = phi, batch, anchor, trajectory.replace(states=(bad, last))
    (loss, sums), gradient = tiny.run(config, theta, given)
    assert sums.inner.skipped.tolist() == [[False, True, False, False], [False] * 4]

    # The good rows with both steps, and the bad one without its first: the others' loss weighs 0.
    total, expected = 0.0, jax.tree.map(jnp.zeros_like, theta)
    is_bad = np.arange(tiny.ROWS) == BAD_GROUP
    for counted, states in ((~is_bad, (first, last)), (is_bad, (last,))):
        state = anchor.state.replace(weight=anchor.state.weight * counted)
        part = phi, batch, anchor.replace(state=state), trajectory.replace(states=states)
        (own, _), of_part = tiny.run(config, theta, part)
        total, expected = total + own, jax.tree.map(jnp.add, expected, of_part)
    np.testing.assert_allclose(loss, total, rtol=1e-12)
    tiny.assert_close(gradient, expected, 1e-10)
