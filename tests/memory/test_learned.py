"""A learned inner loop: starts at the fixed one, and its parameters get the outer gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdlm_jax.memory import fast_weights, learned, meta_gradient, prompt_memory
from tests.memory import tiny
from tests.memory.tiny import MODEL, assert_close, batch_of, draw, settings

BOTH = ("rates", "start")


pytestmark = pytest.mark.usefixtures("wide")


def parameters(config, seed=5):
    """Inner parameters in float64, moved off their start."""
    rng = np.random.default_rng(seed)
    inner = learned.init(jax.random.key(3), MODEL, config)
    return jax.tree.map(lambda leaf: leaf.astype(float) + 0.1 * rng.normal(size=leaf.shape), inner)


@functools.partial(jax.jit, static_argnums=0)
def outer(config, given, theta, inner):
    """The outer loss with inner parameters."""
    return meta_gradient.outer_loss(MODEL, config, theta, *given, inner=inner)[0]


def test_off_by_default():
    assert learned.init(jax.random.key(0), MODEL, settings("exact", "example")) is None
    theta = {"a": jnp.ones(2)}
    assert learned.join(theta, None) is theta
    assert learned.split(theta) == (theta, None)


@pytest.mark.parametrize("parts", [("rates",), ("start",), BOTH])
def test_what_is_learned_is_what_the_config_names(parts):
    inner = learned.init(jax.random.key(0), MODEL, settings("exact", "example", learned=parts))
    assert (inner.log_rates is not None) == ("rates" in parts)
    assert (inner.start is not None) == ("start" in parts)
    theta, again = learned.split(learned.join({"a": 1}, inner))
    assert theta == {"a": 1} and again is inner


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_starts_at_the_fixed_inner_loop(theta, adapter):
    """Rates equal to the config's, and the start one draw of phi_0: the same loss."""
    config = settings("exact", "example", learned=BOTH, adapter=adapter)
    phi, *rest = draw(config, batch_of(0))
    inner = learned.init(jax.random.key(7), MODEL, config)
    drawn = fast_weights.init(jax.random.key(7), MODEL, config, tiny.ROWS)
    inner = jax.tree.map(lambda leaf: leaf.astype(float), inner)
    fixed = jax.tree.map(lambda leaf: leaf.astype(float), drawn)
    loss = outer(config, (phi, *rest), theta, inner)
    expected = outer(settings("exact", "example", adapter=adapter), (fixed, *rest), theta, None)
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
            return meta_gradient.outer_loss(MODEL, config, theta, *given, inner=inner)

        return jax.grad(loss, has_aux=True)(inner)

    found, sums = found_and_sums(theta, inner)
    _, batch, anchor, _ = given

    @jax.jit
    @jax.grad
    def gradient_of_phi(phi):
        hidden = MODEL.trunk(theta, anchor.tokens, batch.valid, split=1)
        return meta_gradient.anchor_loss(MODEL, theta, phi, hidden, batch.valid, anchor, split=1)

    of_phi = gradient_of_phi(sums.phi)
    start = learned.started(inner, given[0])
    moved = jax.tree.map(lambda a, b: (a - b)[0], sums.phi, start)  # -rate * sum of gradients
    expected = jax.tree.map(lambda g, m: jnp.sum(g[0] * m, axis=(1, 2)), of_phi, moved)
    assert_close(found.log_rates, expected, 1e-9)
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
        phi, _ = prompt_memory.write_prompt(
            jax.random.key(0), MODEL, used, theta, tokens, valid, inner=inner
        )
        return phi

    still = learned.InnerParameters(
        jax.tree.map(lambda leaf: jnp.full_like(leaf, -100.0), inner.log_rates), inner.start
    )
    phi = write(still)
    for name, leaf in inner.start.items():
        module, matrix = name.split("/")
        np.testing.assert_allclose(phi[module][matrix]["delta"].A[2], leaf, rtol=1e-6)
        assert np.abs(phi[module][matrix]["delta"].B).max() < 1e-20
    moved = write(inner)["mlp"]["up"]["delta"].B
    assert np.abs(moved).max() > 1e-4


def test_learned_rates_refuse_another_optimiser(theta):
    config = settings("exact", "example", learned=("rates",))
    given, inner = draw(config, batch_of(0)), parameters(config)
    with pytest.raises(ValueError, match="learned has 'rates', but another inner optimiser"):
        meta_gradient.outer_loss(
            MODEL, config, theta, *given, inner=inner, inner_optimizer=optax.adam(0.1)
        )


def test_a_wrong_start_is_not_broadcast(theta):
    del theta
    config = settings("exact", "example", learned=("start",))
    phi = draw(config, batch_of(0))[0]
    wider = learned.init(jax.random.key(0), MODEL, settings("exact", "example", learned=BOTH))
    bad = learned.InnerParameters(start={k: leaf[:, :-1] for k, leaf in wider.start.items()})
    with pytest.raises(ValueError, match="broadcast"):
        learned.started(bad, phi)
