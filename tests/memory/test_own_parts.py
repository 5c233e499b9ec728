"""Parts from outside the package: a config names them, and everything uses them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.meta_gradient import FirstOrder, outer_loss
from memdlm_jax.memory.trajectory import Rows
from memdlm_jax.memory.trajectory import draw as draw_trajectory
from memdlm_jax.memory.written import write_prompt
from memdlm_jax.registry import (
    INNER_LOSSES,
    INNER_OPTIMIZERS,
    MASKING_STRATEGIES,
    META_GRADIENTS,
)
from memdlm_jax.typing import Context
from tests.memory import own_parts, tiny
from tests.memory.tiny import MODEL, assert_close, batch_of, draw, run, settings

pytestmark = pytest.mark.usefixtures("wide")

OWN = "tests.memory.own_parts:"


def test_own_loss_and_optimiser_replace_the_configs(theta):
    """Exact, against plain loops and reverse over reverse."""
    parts = {"loss": OWN + "smoothed_cross_entropy", "optimizer": OWN + "rooted_adam"}
    config = settings("exact", "example", **parts)
    given = draw(config, batch_of(0))
    (loss, sums), gradient = run(config, theta, given)

    def oracle(theta):
        memory, optimizer = given.phi, own_parts.rooted_adam(None)
        state, context = optimizer.init(memory), given.trajectory.context
        for one in given.trajectory.states:

            def total(memory, one=one):
                hidden = MODEL.trunk(theta, one.tokens, context, split=1)
                last = fast_weights.head_with_memory(
                    MODEL, theta, memory, hidden, context, split=1, at=one.targets.positions
                )
                log_p = jax.nn.log_softmax(MODEL.readout(theta, last))
                clean = jnp.take_along_axis(log_p, one.targets.labels[..., None], -1)[..., 0]
                losses = -0.9 * clean - 0.1 * log_p.mean(-1)
                return objective.weighted_sum(losses, one.targets, one.weight)

            updates, state = optimizer.update(jax.grad(total)(memory), state)
            memory = optax.apply_updates(memory, updates)
        hidden = MODEL.trunk(theta, given.anchor.state.tokens, context, split=1)
        at = given.anchor.state.targets.positions
        last = fast_weights.head_with_memory(MODEL, theta, memory, hidden, context, split=1, at=at)
        return objective.state_loss(MODEL, theta, last, given.anchor.state)

    expected, same = jax.jit(jax.value_and_grad(oracle))(theta)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_close(gradient, same, 1e-9)
    assert not sums.inner.skipped.any()


def test_the_same_parts_write_a_prompt(theta):
    """What is trained is what writes at inference: nothing falls back to the standard parts."""
    batch = batch_of(0)

    def written(**parts):
        loop = InnerLoop(MODEL, settings("first_order", "example", **parts))
        return write_prompt(jax.random.key(0), loop, theta, batch.tokens, batch.valid)

    standard, record = written()
    own_loss, smoothed = written(loss=OWN + "smoothed_cross_entropy")
    own_step, _ = written(optimizer=OWN + "rooted_adam")
    assert (smoothed.loss != record.loss)[:, :2].all(), "rows 2 and 3 mask nothing"
    for changed in (own_loss, own_step):
        gap = fast_weights.group_norms(jax.tree.map(jnp.subtract, changed, standard))
        assert (gap[:2] > 1e-3).all()
    # Adam's first step moves every entry that has a gradient by its rate, whatever its size.
    steps = np.abs(np.asarray(own_step["mlp"]["up"]["delta"].B)).max((1, 2, 3))
    assert (steps[:2] > 0.04).all()


def test_own_masking_strategy(theta):
    config = settings("exact", "example", masking=OWN + "halves")
    given = draw(config, batch_of(0))
    masks = [np.asarray(s.tokens == MODEL.mask_token_id) for s in given.trajectory.states]
    assert not (masks[0] & masks[1]).any()
    np.testing.assert_array_equal(masks[0] | masks[1], given.batch.maskable)
    assert not given.trajectory.ends_at_anchor
    (loss, sums), gradient = run(config, theta, given)
    assert np.isfinite(loss) and (sums.inner.loss > 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_own_schedule_weighs_the_states(theta):
    schedule = own_parts.SquareSchedule()
    config = settings("first_order", "example")
    batch = batch_of(0)
    anchor = objective.draw_anchor(jax.random.key(0), batch, MODEL.mask_token_id, schedule)
    keys = jax.random.split(jax.random.key(1))
    _, trajectory = InnerLoop(MODEL, config).draw((*keys, None), batch, anchor, schedule)
    for state in trajectory.states:
        count = state.targets.present.sum(-1)
        ratio = np.asarray(count / anchor.maskable)
        expected = [2 * math.sqrt(r) / r / c if r else 0 for r, c in zip(ratio, count, strict=True)]
        found = np.where(count > 0, state.weight, 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_own_meta_gradient_rule(theta):
    """Half of the inner gradient's derivative: the mean of what is between the two rules."""
    given = draw(settings("exact", "global", clip="none"), batch_of(0))
    gradients = {
        rule: run(settings(rule, "global", clip="none"), theta, given)[1]
        for rule in (OWN + "HalfTheInnerGradient", "exact", "first_order")
    }
    half, exact, first = gradients.values()
    gap = np.abs(half["up"] - exact["up"]).max()
    assert gap > 1e-3 * np.abs(exact["up"]).max()
    assert np.abs(half["up"] - first["up"]).max() > 1e-3 * np.abs(exact["up"]).max()


def test_a_registered_name_works_like_a_built_in_one(theta):
    tables = INNER_LOSSES, INNER_OPTIMIZERS, MASKING_STRATEGIES, META_GRADIENTS
    parts = (
        own_parts.smoothed_cross_entropy,
        own_parts.rooted_adam,
        own_parts.halves,
        own_parts.HalfTheInnerGradient,
    )
    for table, part in zip(tables, parts, strict=True):
        table.register("of_this_test")(part)
    named = dict.fromkeys(("loss", "optimizer", "masking"), "of_this_test")
    config = settings("of_this_test", "example", **named)
    imported = settings(
        OWN + "HalfTheInnerGradient", "example", loss=OWN + "smoothed_cross_entropy",
        optimizer=OWN + "rooted_adam", masking=OWN + "halves",
    )  # fmt: skip
    (loss, _), gradient = run(config, theta, draw(config, batch_of(0)))
    (same, _), equal = run(imported, theta, draw(imported, batch_of(0)))
    assert float(loss) == float(same)
    assert_close(gradient, equal, 0.0)


@pytest.mark.parametrize("field", ["loss", "optimizer", "masking", "meta_gradient"])
def test_an_unknown_name_is_refused_with_its_field(field):
    with pytest.raises(ValueError, match=rf"memory\.{field}='unheard' must be one of '"):
        MemoryConfig(**{field: "unheard"})
    with pytest.raises(ValueError, match=rf"memory\.{field}='nowhere:x' cannot be imported"):
        MemoryConfig(**{field: "nowhere:x"})


def test_a_loss_of_the_wrong_shape_is_refused(theta):
    config = settings("first_order", "example", loss=OWN + "wrong_shape")
    with pytest.raises(ValueError, match=r"wrong_shape' returned shape \(1,\); it must return"):
        run(config, theta, draw(config, batch_of(0)))


class TestWrittenAndReadApart:
    """A context is written, other rows are read: other tokens, lengths, capacities and counts."""

    def given(self, config, questions):
        """Two contexts of 8 tokens, and ``questions`` rows of 8 about each."""
        written, read = batch_of(5), batch_of(6)
        rows = Rows(
            written.tokens[:2], written.valid[:2], written.valid[:2], jnp.ones(2),
            Context(written.valid[:2]), MODEL.mask_token_id,
        )  # fmt: skip
        trajectory = draw_trajectory(jax.random.key(0), config, rows, 2, capacity=8)
        read = jax.tree.map(lambda leaf: leaf[: 2 * questions], read)
        schedule = tiny.LinearSchedule(0.5)
        anchor = objective.draw_anchor(
            jax.random.key(1), read, MODEL.mask_token_id, schedule, capacity=5
        )
        phi = InnerLoop(MODEL, config).start(jax.random.key(2), 2)
        return jax.tree.map(lambda leaf: leaf.astype(float), phi), trajectory, anchor

    @pytest.mark.parametrize("questions", [1, 2])
    def test_equals_writing_first_and_reading_afterwards(self, theta, questions):
        config = settings("exact", "example", masking=OWN + "halves")
        loop = InnerLoop(MODEL, config)
        phi, trajectory, anchor = self.given(config, questions)

        def both(theta):
            return outer_loss(loop, theta, None, phi, trajectory, anchor)

        (loss, sums), gradient = jax.jit(jax.value_and_grad(both, has_aux=True))(theta)
        adapted, _ = loop.adapt(theta, None, phi, trajectory, FirstOrder())
        assert_close(sums.phi, adapted, 1e-12)
        each = jax.tree.map(lambda leaf: jnp.repeat(leaf, questions, axis=0), adapted)
        hidden = MODEL.trunk(theta, anchor.state.tokens, anchor.context, split=1)
        last = fast_weights.head_with_memory(
            MODEL, theta, each, hidden, anchor.context, split=1,
            at=anchor.state.targets.positions,
        )  # fmt: skip
        expected = objective.state_loss(MODEL, theta, last, anchor.state)
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)

        direction = {n: np.random.default_rng(0).normal(size=x.shape) for n, x in theta.items()}

        def at(step):
            return float(both({n: x + step * direction[n] for n, x in theta.items()})[0])

        h = 1e-4
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found = sum(float(np.vdot(gradient[n], direction[n])) for n in theta)
        assert found == pytest.approx(slope, rel=1e-6)

    def test_the_gradient_asks_phi_to_carry_the_context(self, theta):
        """Through phi alone, the loss on other rows depends on how the context was written."""
        config = settings("exact", "example", masking=OWN + "halves")
        phi, trajectory, anchor = self.given(config, 1)

        def loss(theta, weight):
            states = tuple(s.replace(weight=s.weight * weight) for s in trajectory.states)
            written = dataclasses.replace(trajectory, states=states)
            loop = InnerLoop(MODEL, config)
            return outer_loss(loop, theta, None, phi, written, anchor)[0]

        assert abs(float(jax.grad(loss, 1)(theta, 1.0))) > 1e-6
