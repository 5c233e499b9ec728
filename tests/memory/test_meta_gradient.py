"""The outer loss and its three gradients on a denoiser small enough to check by brute force."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import fast_weights, inner_loop, meta_gradient
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.training.step import step_keys
from memdlm_jax.typing import Context, Denoiser
from tests.memory.tiny import (
    LENGTH,
    MODEL,
    ROWS,
    assert_close,
    batch_of,
    draw,
    run,
    settings,
)

MODES = ("first_order", "trunk_stopped", "exact")


pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture(scope="module")
def shared():
    """One memory for the batch."""
    return draw(settings("exact", "global"), batch_of(0))


@pytest.fixture(scope="module")
def own():
    """A memory for every row."""
    return draw(settings("exact", "example"), batch_of(0))


def test_tiny_answers_the_protocol():
    assert isinstance(MODEL, Denoiser)


def loss_at(theta, memory, hidden, batch, state):
    """Weighted sum of -log p over the targets of a state, memory without group axis."""
    last = MODEL.head(theta, memory, hidden, Context(batch.valid), split=1)
    last = jnp.take_along_axis(last, state.targets.positions[..., None], axis=1)
    return objective.state_loss(MODEL, theta, last, state)


def trunk(theta, batch, state):
    return MODEL.trunk(theta, state.tokens, Context(batch.valid), split=1)


def slope(loss, theta, direction, h=1e-4):
    """d loss / d step along a direction, by central differences of fourth order."""

    def at(step):
        moved = {name: leaf + step * direction[name] for name, leaf in theta.items()}
        return float(loss(moved))

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def unit(seed, theta):
    """A random direction of norm 1."""
    rng = np.random.default_rng(seed)
    direction = {name: rng.normal(size=leaf.shape) for name, leaf in theta.items()}
    size = np.sqrt(sum(np.sum(leaf**2) for leaf in direction.values()))
    return {name: leaf / size for name, leaf in direction.items()}


def along(gradient, direction):
    return sum(np.vdot(gradient[name], direction[name]) for name in direction)


class TestOracles:
    """Each gradient against a direct statement of what it takes as constant."""

    def test_first_order_takes_phi_as_a_constant(self, theta, shared):
        (_, sums), gradient = run(settings("first_order", "global"), theta, shared)
        _, batch, anchor, _ = shared
        memory = jax.tree.map(lambda leaf: leaf[0], sums.phi)

        def oracle(theta):
            constant = jax.lax.stop_gradient(memory)
            return loss_at(theta, constant, trunk(theta, batch, anchor.state), batch, anchor.state)

        loss, expected = jax.jit(jax.value_and_grad(oracle))(theta)
        assert float(sums.memory_on) == pytest.approx(float(loss), rel=1e-13)
        assert_close(gradient, expected, 1e-12)

    def test_trunk_stopped_takes_inner_hidden_states_as_constants(self, theta, shared):
        """Central differences of a loss whose inner steps read hidden states made beforehand."""
        config = settings("trunk_stopped", "global")
        (_, sums), gradient = run(config, theta, shared)
        phi, batch, anchor, states = shared
        hiddens = [trunk(theta, batch, state) for state in states.states]
        optimizer = inner_loop.clipped_sgd(config)

        @jax.jit
        def oracle(theta):
            memory = jax.tree.map(lambda leaf: leaf[0], phi)
            for hidden, state in zip(hiddens, states.states, strict=True):
                grads = jax.grad(loss_at, 1)(theta, memory, hidden, batch, state)
                updates, _ = optimizer.update(grads, optimizer.init(memory))
                memory = jax.tree.map(jnp.add, memory, updates)
            return loss_at(theta, memory, trunk(theta, batch, anchor.state), batch, anchor.state)

        assert float(sums.memory_on) == pytest.approx(float(oracle(theta)), rel=1e-13)
        for seed in range(3):
            direction = unit(seed, theta)
            expected = slope(oracle, theta, direction)
            assert along(gradient, direction) == pytest.approx(expected, rel=1e-7)

    def test_the_three_agree_on_values_and_differ_in_gradients(self, theta, shared):
        results = {mode: run(settings(mode, "global"), theta, shared) for mode in MODES}
        (loss, sums), _ = results["exact"]
        for (other, others), _ in results.values():
            assert float(other) == pytest.approx(float(loss), rel=1e-13)
            assert_close(others.phi, sums.phi, 1e-12)
        gradients = {mode: gradient for mode, (_, gradient) in results.items()}
        for a, b, name in (
            ("first_order", "trunk_stopped", "up"),
            ("trunk_stopped", "exact", "place"),
        ):
            gap = np.abs(gradients[a][name] - gradients[b][name]).max()
            assert gap > 1e-2 * np.abs(gradients[b][name]).max()


@pytest.mark.parametrize(("clip", "steps"), [("local", 2), ("none", 3), ("global", 2)])
def test_exact_equals_central_differences(theta, clip, steps):
    """At phi_0 (B = 0) along five random directions, where first order is not even close."""
    rate = 0.05 if clip == "none" else 0.1
    config = settings("exact", "global", clip=clip, steps=steps, learning_rate=rate)
    given = draw(config, batch_of(0))
    (_, sums), gradient = run(config, theta, given)
    assert (sums.inner.gradient_norm > 2).all(), "the clip must be at work"
    for seed in range(5):
        direction = unit(seed, theta)
        expected = slope(lambda at: run(config, at, given)[0][0], theta, direction)
        assert along(gradient, direction) == pytest.approx(expected, rel=1e-7)


class TestMemoryOff:
    def test_traced_switch(self, theta, shared):
        """On: the plain model's loss on the same masks. Off: NaN. The gradient is the same."""
        config = settings("exact", "global")
        (_, on), gradient = run(config, theta, shared, report=True)
        (_, off), without = run(config, theta, shared, report=False)
        _, batch, anchor, _ = shared
        plain = jax.jit(functools.partial(objective.mdlm_loss, MODEL))(theta, anchor)
        hidden = trunk(theta, batch, anchor.state)
        expected = loss_at(theta, None, hidden, batch, anchor.state)
        assert float(plain) == pytest.approx(float(expected))
        assert float(on.memory_off) == pytest.approx(float(plain), rel=1e-13)
        np.testing.assert_array_equal(anchor.maskable, batch.maskable.sum(-1))
        assert np.isnan(off.memory_off)
        assert float(on.memory_on) == float(off.memory_on)
        assert_close(without, gradient, 0.0)

    def test_norms_of_phi_and_of_its_change_are_means_over_groups(self, theta, own):
        (_, sums), _ = run(settings("exact", "example"), theta, own)
        moved = jax.tree.map(jnp.subtract, sums.phi, own[0])
        for tree, found in ((sums.phi, sums.phi_norm), (moved, sums.phi_change)):
            squares = sum(np.sum(np.square(leaf), (1, 2, 3)) for leaf in jax.tree.leaves(tree))
            assert float(found) == pytest.approx(np.sqrt(squares).mean(), rel=1e-12)

    def test_inner_losses_after_each_step_are_those_on_the_same_states(self, theta, own):
        """Walked twice with a tiny rate, state k's first loss after is its second loss before."""
        config = settings("first_order", "example", learning_rate=1e-9)
        twice = (*own[:3], own[3].replace(epochs=2))
        (_, sums), _ = run(config, theta, twice)
        np.testing.assert_allclose(sums.inner.loss_after[:2], sums.inner.loss[2:], rtol=1e-7)

    @pytest.mark.parametrize("mode", MODES)
    def test_inner_losses_after_each_step_are_lower_and_those_of_every_mode(self, theta, own, mode):
        (_, on), _ = run(settings(mode, "example"), theta, own)
        assert (on.inner.loss_after < on.inner.loss).all()
        (_, reference), _ = run(settings("first_order", "example"), theta, own)
        np.testing.assert_allclose(on.inner.loss_after, reference.inner.loss_after, rtol=1e-12)
        (_, off), _ = run(settings(mode, "example"), theta, own, report=False)
        assert np.isnan(off.inner.loss_after).all()


def edge_batch():
    """No maskable token; all maskable; a single-token response; nothing but padding."""
    maskable = np.zeros((ROWS, LENGTH), bool)
    maskable[1] = True
    maskable[2, 5] = True
    valid = np.ones((ROWS, LENGTH), bool)
    valid[2, 6:] = valid[3] = False
    return dataclasses.replace(
        batch_of(3), maskable=jnp.asarray(maskable), valid=jnp.asarray(valid)
    )


def assert_finite(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(leaf).all(), path


class TestEdgeRows:
    """Finite losses and gradients from rows that hold little; K = 2, exact, clip at work."""

    @pytest.mark.parametrize("scope", ["example", "global"])
    def test_everything_masked(self, theta, scope):
        config = settings("exact", scope)
        given = draw(
            config, edge_batch(), lambda _, batch: (batch.maskable, jnp.asarray(np.ones(ROWS)))
        )
        result = run(config, theta, given)
        assert_finite(result)
        (loss, sums), _ = result
        assert loss > 0 and not sums.inner.skipped.any()
        if scope == "example":
            assert sums.inner.loss[:, [0, 3]].tolist() == [[0.0, 0.0]] * 2
            moved = jax.tree.map(jnp.subtract, sums.phi, given[0])
            norms = np.asarray(fast_weights.group_norms(moved))
            assert ((norms > 0) == [False, True, True, False]).all()

    @pytest.mark.parametrize("scope", ["example", "global"])
    def test_nothing_masked(self, theta, scope):
        """An anchor may mask no token of a short response; its weight is then at its largest."""
        config = settings("exact", scope)
        largest = jnp.asarray(np.full(ROWS, 1e6))
        given = draw(
            config, edge_batch(), lambda _, batch: (jnp.zeros_like(batch.maskable), largest)
        )
        (loss, sums), gradient = run(config, theta, given)
        assert loss == 0 and sums.memory_off == 0
        assert_close(sums.phi, given[0], 0.0)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))

    def test_batch_of_one(self, theta):
        config = settings("exact", "example")
        given = draw(
            config, edge_batch(), lambda _, batch: (batch.maskable, jnp.asarray(np.ones(ROWS)))
        )
        result = run(config, theta, jax.tree.map(lambda leaf: leaf[2:3], given))
        assert_finite(result)
        assert result[0][0] > 0


def test_bfloat16_base_keeps_float32_memory():
    """A pulse of the real model on the edge rows, and the types of its exact gradient."""
    model = LLaDA(
        LLaDAConfig(
            vocab_size=20, width=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_features=12,
            mask_token_id=0, max_length=LENGTH, dtype="bfloat16", param_dtype="bfloat16",
        )
    )  # fmt: skip
    config = MemoryConfig(rank=2, layer_fraction=0.5, meta_gradient="exact")

    @jax.jit
    def pulse(theta, batch, report):
        anchor = objective.draw_anchor(
            jax.random.key(0), batch, model.mask_token_id, LinearSchedule(1.0)
        )
        loop, keys = InnerLoop(model, config), jax.random.split(jax.random.key(1))
        phi, trajectory = loop.draw((*keys, None), batch, anchor, LinearSchedule(1.0))
        return meta_gradient.outer_loss(
            loop, theta, None, phi, trajectory, anchor, with_memory_off=report
        )

    with jax.enable_x64(False):
        theta = jax.jit(model.init)(jax.random.key(1))
        given = theta, jax.tree.map(np.asarray, edge_batch()), np.bool_(True)
        loss, sums = pulse(*given)
        gradient, _ = jax.eval_shape(jax.grad(pulse, has_aux=True), *given)
    assert_finite((loss, sums))
    assert loss.dtype == sums.memory_off.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(sums.phi)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    assert float(sums.phi_norm) > 0


class TestDraw:
    def test_the_trajectory_ends_at_the_anchor_from_two_steps_on(self, shared):
        _, batch, anchor, states = shared
        assert states.ends_at_anchor and len(states.states) == 2
        np.testing.assert_array_equal(states.states[-1].tokens, anchor.state.tokens)
        single = draw(settings("exact", "global", steps=1), batch)[3]
        assert not single.ends_at_anchor and len(single.states) == 1

    def test_groups_follow_the_scope(self, shared, own):
        assert fast_weights.number_of_groups(shared[0]) == 1
        assert fast_weights.number_of_groups(own[0]) == ROWS
        # The masks are those of the shared memory, only the weights' normaliser differs.
        for mine, all_in_one in zip(own[3].states, shared[3].states, strict=True):
            np.testing.assert_array_equal(mine.tokens, all_in_one.tokens)
            counts = np.asarray(mine.targets.present.sum(-1))
            whole = np.asarray(all_in_one.weight) * counts.sum()
            np.testing.assert_allclose(mine.weight * counts, whole, rtol=1e-6)

    def test_a_forward_process_of_ones_own_replaces_the_schedule(self):
        batch, config = batch_of(0), settings("exact", "example")
        wanted = batch.maskable & (jnp.arange(LENGTH) % 2 == 0)

        def corrupt(key, batch):
            return wanted, jnp.arange(4.0)

        anchor = objective.draw_anchor(
            jax.random.key(0), batch, MODEL.mask_token_id, corrupt, capacity=5
        )
        keys = jax.random.split(jax.random.key(1))
        _, states = InnerLoop(MODEL, config).draw((*keys, None), batch, anchor, LinearSchedule())
        np.testing.assert_array_equal(anchor.state.tokens == MODEL.mask_token_id, wanted)
        assert anchor.state.weight.tolist() == [0, 1, 2, 3]
        assert anchor.state.targets.positions.shape == (4, 5)
        assert all(state.targets.positions.shape == (4, 5) for state in states.states)

    def test_devices_share_phi_and_draw_masks_apart(self):
        key = jax.random.key(0)
        keys = jax.vmap(lambda _: step_keys(key, "d"), axis_name="d")(jnp.arange(3))
        phi, *others = (np.asarray(jax.random.key_data(k)) for k in keys)
        assert len(np.unique(phi, axis=0)) == 1 and len(others) == 3
        assert len(np.unique(np.concatenate([phi, *others]), axis=0)) == 10
