"""The inner loop on small problems of our own: any loss, any optimiser, any number of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.memory import fast_weights, inner_loop
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import clip_local, clipped_sgd, fold
from memdlm_jax.memory.meta_gradient import forward_over_reverse_gradient, reverse_gradient

GROUPS, STACK, BOUND = 3, 2, 6.0


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def toy_loss(theta, phi, state):
    """A two-layer stack of tanh maps with fast weights, squared error to a target."""
    x = state["x"]
    for layer in range(STACK):
        x = jnp.tanh(x @ (theta["w"][layer] + phi["a"][layer] @ phi["b"][layer]))
    return jnp.sum((x - state["y"]) ** 2)


THETA = {"w": normal(0, STACK, 4, 4)}
PHI = {"a": normal(1, GROUPS, STACK, 4, 2), "b": normal(2, GROUPS, STACK, 2, 4)}
STATES = [{"x": normal(3 + k, GROUPS, 5, 4), "y": normal(9 + k, GROUPS, 5, 4)} for k in range(3)]


@pytest.fixture(scope="module")
def run():
    """``fold`` on the toy problem under one optimiser, compiled."""

    def with_optimizer(optimizer, loss=toy_loss):
        def both(theta, phi, states):
            return fold(reverse_gradient(loss), theta, phi, states, optimizer)

        return jax.jit(both)

    return with_optimizer


@pytest.fixture(scope="module")
def sgd(run):
    return run(clipped_sgd(MemoryConfig(clip_norm=BOUND, learning_rate=0.1)))


@pytest.fixture(scope="module")
def adam(run):
    return run(optax.adam(0.05))


def clip_matrices(g, bound):
    """The rule in a loop: matrix by matrix."""
    g = np.array(g)
    for place in np.ndindex(g.shape[:-2]):
        norm = np.linalg.norm(g[place])
        if norm > bound:
            g[place] *= bound / (norm + 1e-12)
    return g


class TestClipping:
    def test_every_matrix_alone(self):
        grads = {"a": normal(0, 3, 2, 4, 5), "b": 0.1 * normal(1, 3, 2, 2, 2)}
        grads["a"][1, 0] = 0.0
        grads["a"][2] *= 1e-3
        clip = clip_local(1.0)
        clipped, _ = jax.jit(clip.update)(grads, clip.init(grads))
        for name, g in grads.items():
            np.testing.assert_allclose(clipped[name], clip_matrices(g, 1.0), rtol=1e-12)
        np.testing.assert_array_equal(clipped["a"][2], grads["a"][2])
        norms = np.linalg.norm(clipped["a"], axis=(-2, -1))
        assert norms[0] == pytest.approx([1.0, 1.0], rel=1e-9)

    def test_derivative_at_a_zero_gradient_is_finite(self):
        """The gradient of A is exactly zero at phi_0: d|g| / dg must not turn it into NaN."""

        def through(g):
            return jnp.sum(clip_local(0.5).update(g, ())[0] * weights)

        weights = normal(1, 2, 3, 3)
        at = normal(2, 2, 3, 3)
        at[0] = 0.0
        gradient = jax.grad(through)(jnp.asarray(at))
        np.testing.assert_array_equal(gradient[0], weights[0])
        # g c / |g|: the derivative is the projection off g, times c / |g|.
        norm, unit = np.linalg.norm(at[1]), at[1] / np.linalg.norm(at[1])
        expected = 0.5 / norm * (weights[1] - np.sum(unit * weights[1]) * unit)
        np.testing.assert_allclose(gradient[1], expected, rtol=1e-9, atol=1e-12)

    def test_none_is_plain_sgd(self):
        optimizer = clipped_sgd(MemoryConfig(clip="none", learning_rate=0.5))
        g = jnp.full((2, 2), 100.0)
        np.testing.assert_array_equal(optimizer.update(g, optimizer.init(g))[0], -0.5 * g)

    def test_global_is_one_factor_for_all_matrices(self):
        optimizer = clipped_sgd(MemoryConfig(clip="global", clip_norm=2.0, learning_rate=0.5))
        grads = {"a": jnp.full((2, 1, 2), 3.0), "b": jnp.full((2, 2, 1), 4.0)}
        norm = np.sqrt(4 * 9 + 4 * 16)
        updates, _ = optimizer.update(grads, optimizer.init(grads))
        for name, g in grads.items():
            np.testing.assert_allclose(updates[name], -0.5 * g * 2.0 / norm, rtol=1e-6)
        small = jax.tree.map(lambda g: g / norm, grads)
        kept, _ = optimizer.update(small, optimizer.init(small))
        jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -0.5 * g), kept, small)

    @pytest.mark.parametrize("clip", ["local", "global"])
    def test_a_zero_gradient_has_a_derivative(self, clip):
        transform = getattr(inner_loop, f"clip_{clip}")(1.0)

        def squared(g):
            clipped, _ = transform.update({"A": g, "B": g}, transform.init(None))
            return sum(jnp.sum(leaf + leaf**2) for leaf in clipped.values())

        zero = jnp.zeros((2, 3, 3))
        np.testing.assert_array_equal(jax.grad(squared)(zero), jnp.full_like(zero, 2.0))


class TestFold:
    def test_scales_are_per_step_matrix_and_layer(self):
        scales = {"a": normal(20, 3, STACK), "b": normal(21, 3, STACK)}
        optimizer = clipped_sgd(MemoryConfig(clip_norm=BOUND, learning_rate=0.1))
        scaled = jax.jit(
            lambda scales: fold(
                reverse_gradient(toy_loss), THETA, PHI, STATES, optimizer, scales=scales
            )
        )
        gradient = jax.jit(jax.grad(toy_loss, 1))
        expected = {name: leaf.copy() for name, leaf in PHI.items()}
        for k, state in enumerate(STATES):
            for group in range(GROUPS):
                own = jax.tree.map(lambda x, g=group: x[g], (expected, state))
                grads = gradient(THETA, *own)
                for name in PHI:
                    step = 0.1 * clip_matrices(grads[name], BOUND)
                    step *= scales[name][k][:, None, None]
                    expected[name][group] -= step
        found, _ = scaled(scales)
        for name in PHI:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-10)

    def test_equals_sgd_in_a_python_loop(self, sgd):
        phi, record = sgd(THETA, PHI, STATES)
        gradient = jax.jit(jax.value_and_grad(toy_loss, 1))
        exceeds = []
        for g in range(GROUPS):
            own = {name: leaf[g] for name, leaf in PHI.items()}
            for k, state in enumerate(STATES):
                loss, grads = gradient(THETA, own, {name: x[g] for name, x in state.items()})
                norm = np.sqrt(sum(np.sum(np.square(x)) for x in grads.values()))
                assert float(record.loss[k, g]) == pytest.approx(float(loss), rel=1e-12)
                assert float(record.gradient_norm[k, g]) == pytest.approx(norm, rel=1e-12)
                clipped = {name: clip_matrices(x, BOUND) for name, x in grads.items()}
                sizes = np.concatenate([np.linalg.norm(x, axis=(1, 2)) for x in grads.values()])
                exceeds.extend(sizes > BOUND)
                own = {name: own[name] - 0.1 * clipped[name] for name in own}
            for name, leaf in own.items():
                np.testing.assert_allclose(phi[name][g], leaf, rtol=1e-11)
        assert any(exceeds) and not all(exceeds)
        assert record.skipped.shape == (3, GROUPS) and not record.skipped.any()

    def test_a_step_that_is_not_finite_is_skipped_for_its_group_alone(self, sgd):
        spoilt = [dict(state) for state in STATES]
        spoilt[1]["x"] = STATES[1]["x"].copy()
        spoilt[1]["x"][1, 0, 0] = np.nan
        phi, record = sgd(THETA, PHI, spoilt)
        expected = np.zeros((3, GROUPS), bool)
        expected[1, 1] = True
        np.testing.assert_array_equal(record.skipped, expected)
        whole, _ = sgd(THETA, PHI, STATES)
        for name, leaf in phi.items():
            assert np.isfinite(leaf).all()
            same = (leaf == whole[name]).all((1, 2, 3))
            assert same.tolist() == [True, False, True]

    def test_a_skipped_step_leaves_the_optimiser_state_alone(self, adam):
        """Adam's moments after (NaN, s, s') are those after nothing, then s and s'."""
        spoilt = {"x": STATES[0]["x"].copy(), "y": STATES[0]["y"]}
        spoilt["x"][1] = np.inf
        phi, record = adam(THETA, PHI, [spoilt, STATES[1], STATES[2]])
        assert record.skipped[0].tolist() == [False, True, False]
        fresh = reference_adam(PHI, STATES[1:], group=1)
        for name, leaf in fresh.items():
            np.testing.assert_allclose(phi[name][1], leaf, rtol=1e-9)

    def test_every_group_has_its_own_optimiser_state(self, adam):
        phi, _ = adam(THETA, PHI, STATES)
        for g in range(GROUPS):
            alone = reference_adam(PHI, STATES, group=g)
            for name, leaf in alone.items():
                np.testing.assert_allclose(phi[name][g], leaf, rtol=1e-9)

    def test_theta_is_read_only_and_states_are_walked_in_order(self, sgd):
        forward, _ = sgd(THETA, PHI, STATES)
        backward, _ = sgd(THETA, PHI, STATES[::-1])
        assert np.abs(forward["a"] - backward["a"]).max() > 1e-3


def reference_adam(phi, states, group, rate=0.05, decay=(0.9, 0.999)):
    """Adam as published (Kingma and Ba, algorithm 1) on one group, in numpy."""
    gradient = jax.jit(jax.grad(toy_loss, 1))
    own = {name: np.array(leaf[group]) for name, leaf in phi.items()}
    first, second = ({name: np.zeros_like(leaf) for name, leaf in own.items()} for _ in "12")
    for step, state in enumerate(states, 1):
        grads = gradient(THETA, own, {name: x[group] for name, x in state.items()})
        for name, g in grads.items():
            first[name] = decay[0] * first[name] + (1 - decay[0]) * np.asarray(g)
            second[name] = decay[1] * second[name] + (1 - decay[1]) * np.asarray(g) ** 2
            mean, spread = (
                first[name] / (1 - decay[0] ** step),
                second[name] / (1 - decay[1] ** step),
            )
            own[name] = own[name] - rate * mean / (np.sqrt(spread) + 1e-8)
    return own


def test_how_to_bring_your_own_loss_and_optimiser():
    """A bias learns each group's mean with momentum: nothing else of the library is needed."""

    def loss(theta, phi, points):
        return jnp.mean((points - theta - phi["bias"]) ** 2)

    theta, points = jnp.array([1.0, -1.0]), normal(0, 5, 8, 2)
    phi = {"bias": jnp.zeros((5, 2))}
    optimizer = optax.sgd(0.5, momentum=0.1)
    phi, record = fold(reverse_gradient(loss), theta, phi, [points] * 8, optimizer)

    np.testing.assert_allclose(theta + phi["bias"], points.mean(1), atol=1e-3)
    assert (record.loss[-1] < record.loss[0]).all()


@pytest.fixture(scope="module")
def head_problem():
    """A one-layer attention head on hidden states, with the denoising loss; two groups of rows."""

    def loss(theta, phi, state):
        hidden, valid, _, targets, weight = state
        scores = hidden @ theta["qk"] @ hidden.swapaxes(-1, -2)
        seen = jax.nn.softmax(jnp.where(valid[:, None], scores, -1e30)) @ hidden
        w1, w2 = (theta[name] + phi["a"][i] @ phi["b"][i] for i, name in enumerate(("w1", "w2")))
        last = hidden + jnp.tanh(seen @ w1) @ w2
        last = jnp.take_along_axis(last, targets.positions[..., None], axis=1)
        losses = objective.token_losses(last @ theta["out"], targets)
        return objective.weighted_sum(losses, targets, weight)

    shapes = {"qk": (6, 6), "w1": (6, 6), "w2": (6, 6), "out": (6, 9)}
    theta = {name: normal(i, *shape) / 2 for i, (name, shape) in enumerate(shapes.items())}
    phi = {"a": normal(7, 2, 2, 6, 2), "b": normal(8, 2, 2, 2, 6)}
    rng = np.random.default_rng(5)
    tokens, mask = rng.integers(0, 9, (4, 5)), rng.random((4, 5)) < 0.6
    targets = objective.gather_targets(jnp.asarray(tokens), jnp.asarray(mask))
    valid = jnp.ones((4, 5), bool).at[3, 4:].set(False)
    state = (normal(6, 4, 5, 6), valid, None, targets, np.array([0.5, 0.1, 0.3, 0.7]))
    return loss, theta, phi, fast_weights.group_rows(state, 2)


def pull_back(rule, loss, theta, phi, state, cotangents):
    """(outputs, cotangents of theta, phi, hidden states and weights)."""
    hidden, valid, positions, targets, weight = state

    def of_floats(theta, phi, hidden, weight):
        return rule(loss)(theta, phi, (hidden, valid, positions, targets, weight))

    outputs, pull = jax.vjp(of_floats, theta, phi, hidden, weight)
    return outputs, pull(cotangents)


def test_forward_over_reverse_equals_reverse_over_reverse(head_problem):
    """Values, and what flows back to theta, phi, hidden states and weights, from both outputs."""
    loss, theta, phi, state = head_problem
    cotangents = (
        jnp.array([0.7, -1.3]),
        {name: normal(9, *leaf.shape) for name, leaf in phi.items()},
    )
    ours, oracle = (
        jax.jit(lambda *given, rule=rule: pull_back(rule, loss, *given))(
            theta, phi, state, cotangents
        )
        for rule in (forward_over_reverse_gradient, reverse_gradient)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(oracle)
    for path, leaf in jax.tree.leaves_with_path(oracle):
        mine = dict(jax.tree.leaves_with_path(ours))[path]
        assert np.abs(leaf).max() > 0, path
        np.testing.assert_allclose(mine, leaf, rtol=0, atol=1e-12 * np.abs(leaf).max())


def test_rule_sums_the_incoming_cotangent_over_devices():
    """Shared phi, a share of the loss per device; the mapped axis stands for the devices.

    The whole is sum_d <v_d, grad_phi sum_e L_e>: what comes back to theta, added over the
    devices, must be its gradient. With a device's own cotangent alone the cross terms d != e
    would be missing.
    """
    shares, phi = STATES[0], {name: leaf[:1] for name, leaf in PHI.items()}
    v = {name: normal(20, GROUPS, *leaf.shape) for name, leaf in phi.items()}
    on_losses = normal(21, GROUPS, 1)

    def on_device(state, v, on_loss):
        rule = forward_over_reverse_gradient(toy_loss, "devices")
        state = {name: x[None] for name, x in state.items()}
        outputs, pull = jax.vjp(rule, THETA, phi, state)
        return outputs, pull((on_loss, v))[:2]

    outputs, pulled = jax.jit(jax.vmap(on_device, axis_name="devices"))(shares, v, on_losses)

    def on_one(theta, phi):
        def whole(phi):
            own = {name: leaf[0] for name, leaf in phi.items()}
            return sum(toy_loss(theta, own, {n: x[d] for n, x in shares.items()}) for d in range(3))

        loss, grads = jax.value_and_grad(whole)(phi)
        return (loss[None], grads)

    expected, pull = jax.vjp(jax.jit(on_one), THETA, phi)
    of_all = pull((on_losses.sum(0), {name: x.sum(0) for name, x in v.items()}))
    for ours, theirs in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        for device in range(GROUPS):
            np.testing.assert_allclose(ours[device], theirs, rtol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(pulled), jax.tree.leaves(of_all), strict=True):
        np.testing.assert_allclose(ours.sum(0), theirs, rtol=1e-11)
