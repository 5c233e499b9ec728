"""A learned inner loop: starts at the fixed one, and its parameters get the outer gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters
from memdlm_jax.memory.written import write_prompt
from memdlm_jax.parameters import join_learned, split_learned
from memdlm_jax.typing import Context
from tests.memory import tiny
from tests.memory.tiny import MODEL, assert_close, batch_of, draw, settings

BOTH = ("rates", "start")


pytestmark = pytest.mark.usefixtures("wide")


def parameters(config, seed=5):
    """Inner parameters in float64, moved off their start."""
    rng = np.random.default_rng(seed)
    inner = InnerLoop(MODEL, config).init_learned(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf.astype(float) + 0.1 * rng.normal(size=leaf.shape), inner)


@functools.partial(jax.jit, static_argnums=0)
def outer(config, given, theta, inner):
    """The outer loss with inner parameters."""
    phi = started(config, given.phi, inner)
    return tiny.outer(config, theta, given._replace(phi=phi), inner)[0]


def started(config, phi, inner):
    """Phi_0 with the learned start, in phi's dtype."""
    if inner is None or inner.start is None:
        return phi
    groups = fast_weights.number_of_groups(phi)
    fresh = InnerLoop(MODEL, config).start(jax.random.key(0), groups, inner)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), fresh, phi)


def test_off_by_default():
    assert InnerLoop(MODEL, settings("exact", "example")).init_learned(jax.random.key(0)) is None
    theta = {"a": jnp.ones(2)}
    assert join_learned(theta, None) is theta
    assert split_learned(theta) == (theta, None)


@pytest.mark.parametrize("parts", [("rates",), ("start",), BOTH])
def test_what_is_learned_is_what_the_config_names(parts):
    loop = InnerLoop(MODEL, settings("exact", "example", learned=parts))
    inner = loop.init_learned(jax.random.key(0))
    assert (inner.log_rates is not None) == ("rates" in parts)
    assert (inner.start is not None) == ("start" in parts)
    theta, again = split_learned(join_learned({"a": 1}, inner))
    assert theta == {"a": 1} and again is inner


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_starts_at_the_fixed_inner_loop(theta, adapter):
    """Rates equal to the config's, and the start one draw of phi_0: the same loss."""
    config = settings("exact", "example", learned=BOTH, adapter=adapter)
    given = draw(config, batch_of(0))
    inner = InnerLoop(MODEL, config).init_learned(jax.random.key(7))
    drawn = fast_weights.init(jax.random.key(7), MODEL, config, tiny.ROWS)
    inner = jax.tree.map(lambda leaf: leaf.astype(float), inner)
    fixed = jax.tree.map(lambda leaf: leaf.astype(float), drawn)
    loss = outer(config, given, theta, inner)
    plain = settings("exact", "example", adapter=adapter)
    expected = outer(plain, given._replace(phi=fixed), theta, None)
    assert float(loss) == pytest.approx(float(expected), rel=1e-7)  # exp(log(rate)) in float32


@pytest.mark.parametrize(("adapter", "scope"), [("lora", "example"), ("full", "global")])
def test_exact_gradient_equals_central_differences(theta, scope, adapter):
    config = settings("exact", scope, learned=BOTH, adapter=adapter)
    given, inner = draw(config, batch_of(0)), parameters(config)
    loss_and_gradient = jax.jit(
        jax.value_and_grad(lambda theta, inner: outer(config, given, theta, inner), (0, 1))
    )
    _, gradient = loss_and_gradient(theta, inner)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (theta, inner))

        def at(step, direction=direction):
            moved = jax.tree.map(lambda x, way: x + step * way, (theta, inner), direction)
            return float(loss_and_gradient(*moved)[0])

        h = 1e-4
        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        found = sum(float(np.vdot(g, d)) for g, d in pairs)
        assert found == pytest.approx(expected, rel=1e-6)


def test_first_order_takes_inner_gradients_for_constants(theta):
    """d loss / d log rate = -rate <outer gradient, steps taken>; d loss / d start as at phi_K."""
    config = settings("first_order", "global", learned=BOTH, clip="none", learning_rate=0.02)
    given, inner = draw(config, batch_of(0)), parameters(config)

    @jax.jit
    def found_and_sums(theta, inner):
        def loss(inner):
            phi = started(config, given.phi, inner)
            return tiny.outer(config, theta, given._replace(phi=phi), inner)

        return jax.grad(loss, has_aux=True)(inner)

    found, sums = found_and_sums(theta, inner)
    _, batch, anchor, _ = given

    @jax.jit
    @jax.grad
    def gradient_of_phi(phi):
        context, at = Context(batch.valid), anchor.state.targets.positions
        hidden = MODEL.trunk(theta, anchor.state.tokens, context, split=1)
        last = fast_weights.head_with_memory(MODEL, theta, phi, hidden, context, split=1, at=at)
        return objective.state_loss(MODEL, theta, last, anchor.state)

    of_phi = gradient_of_phi(sums.phi)
    start = started(config, given.phi, inner)
    moved = jax.tree.map(lambda a, b: (a - b)[0], sums.phi, start)  # -rate * sum of gradients
    expected = jax.tree.map(lambda g, m: jnp.sum(g[0] * m, axis=(1, 2)), of_phi, moved)
    assert_close(jax.tree.map(lambda leaf: leaf.sum(0), found.log_rates), expected, 1e-9)
    for name, leaf in found.start.items():
        module, matrix = name.split("/")
        assert_close(leaf, of_phi[module][matrix]["delta"].A[0], 1e-9)


def test_learning_them_lowers_the_outer_loss(theta):
    config = settings("exact", "example", learned=BOTH)
    given, inner = draw(config, batch_of(0)), parameters(config)
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(inner, state):
        loss, gradient = jax.value_and_grad(lambda i: outer(config, given, theta, i))(inner)
        updates, state = optimizer.update(gradient, state)
        return loss, optax.apply_updates(inner, updates), state

    state, seen = optimizer.init(inner), []
    for _ in range(20):
        loss, inner, state = step(inner, state)
        seen.append(float(loss))
    assert seen[-1] < seen[0] - 0.1


def test_prompts_are_written_with_the_learned_inner_loop(theta):
    config = settings("exact", "example", learned=BOTH)
    tokens, valid = batch_of(0).tokens, batch_of(0).valid
    inner = parameters(config)

    def write(inner, rate=None):
        used = config if rate is None else settings("exact", "example", learning_rate=rate)
        loop = InnerLoop(MODEL, used)
        return write_prompt(jax.random.key(0), loop, theta, tokens, valid, inner)[0]

    still = InnerParameters(
        jax.tree.map(lambda leaf: jnp.full_like(leaf, -100.0), inner.log_rates), inner.start
    )
    phi = write(still)
    for name, leaf in inner.start.items():
        module, matrix = name.split("/")
        np.testing.assert_allclose(phi[module][matrix]["delta"].A[2], leaf, rtol=1e-6)
        assert np.abs(phi[module][matrix]["delta"].B).max() < 1e-20
    moved = write(inner)["mlp"]["up"]["delta"].B
    assert np.abs(moved).max() > 1e-4


def test_a_wrong_start_is_not_broadcast(theta):
    del theta
    config = settings("exact", "example", learned=("start",))
    loop = InnerLoop(MODEL, config)
    wider = loop.init_learned(jax.random.key(0))
    bad = InnerParameters(start={k: leaf[:, :-1] for k, leaf in wider.start.items()})
    with pytest.raises(ValueError, match="broadcast"):
        loop.start(jax.random.key(0), 2, bad)
