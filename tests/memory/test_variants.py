"""Inner losses, epochs, dropout, scopes and own parts, each against a plain oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import fast_weights, inner_loop
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.typing import Context
from tests.memory import tiny
from tests.memory.tiny import MODEL, ROWS, assert_close, batch_of, draw, run, settings

SPLIT = 1


pytestmark = pytest.mark.usefixtures("wide")


def last_at(theta, memory, tokens, valid, targets):
    context = Context(valid)
    hidden = MODEL.trunk(theta, tokens, context, split=SPLIT)
    at = targets.positions
    return objective.head_at(MODEL, theta, memory, hidden, at, context, split=SPLIT)


def plain_inner_loss(config, theta, memory, tokens, teacher, valid, state):
    """Written out with probabilities, for one memory of all rows."""
    student = last_at(theta, memory, tokens, valid, state.targets)
    frozen = jax.lax.stop_gradient((theta, memory))
    target = last_at(*frozen, teacher, valid, state.targets)
    if config.loss == "ce":
        p = jax.nn.softmax(MODEL.readout(theta, student))
        picked = jnp.take_along_axis(p, state.targets.labels[..., None], -1)[..., 0]
        each = -jnp.log(picked)
    elif config.loss == "distill_hidden":
        target = MODEL.normalise(frozen[0], target)
        if config.hidden_distance == "mse":
            each = ((student - target) ** 2).sum(-1) / student.shape[-1]
        else:
            size = jnp.sqrt((student**2).sum(-1) * (target**2).sum(-1))
            each = 1 - (student * target).sum(-1) / size
    else:
        of_student = jax.nn.softmax(MODEL.readout(theta, student) / config.temperature)
        of_teacher = jax.nn.softmax(MODEL.readout(frozen[0], target) / config.temperature)
        if config.loss == "distill":
            each = (of_teacher * jnp.log(of_teacher / of_student)).sum(-1)
        else:
            each = (of_student * jnp.log(of_student / of_teacher)).sum(-1)
    return (jnp.where(state.targets.present, each, 0.0) * state.weight[:, None]).sum()


def oracle(config, given):
    """theta -> (outer loss, inner losses) with plain loops and reverse over reverse."""
    phi, batch, anchor, states = given
    optimizer, anchor = inner_loop.clipped_sgd(config), anchor.state
    last = states.states[-1].tokens if states.after is None else states.after
    if states.after is None and not states.ends_at_anchor:
        last = anchor.tokens
    teachers = [*(state.tokens for state in states.states[1:]), last]

    def loss(theta):
        memory, seen = jax.tree.map(lambda leaf: leaf[0], phi), []
        for _ in range(config.epochs):
            for state, teacher in zip(states.states, teachers, strict=True):
                one = functools.partial(
                    plain_inner_loss, config, theta, tokens=state.tokens, teacher=teacher,
                    valid=batch.valid, state=state,
                )  # fmt: skip
                value, grads = jax.value_and_grad(one)(memory)
                updates, _ = optimizer.update(grads, optimizer.init(memory))
                memory = jax.tree.map(jnp.add, memory, updates)
                seen.append(value)
        hidden = last_at(theta, memory, anchor.tokens, batch.valid, anchor.targets)
        nll = objective.token_losses(MODEL.readout(theta, hidden), anchor.targets)
        return objective.weighted_sum(nll, anchor.targets, anchor.weight), jnp.stack(seen)

    return loss


VARIANTS = {
    "reverse": {"loss": "distill_reverse", "supervise": "newly_revealed", "steps": 3},
    "mse": {"loss": "distill_hidden", "clip": "global"},
    "cosine": {"loss": "distill_hidden", "hidden_distance": "cosine", "adapter": "full"},
    "epochs": {
        "loss": "distill", "epochs": 2, "masking": "pre_only", "clip": "none",
        "learning_rate": 0.02,
    },
    "no_progressive": {"masking": "no_progressive", "loss": "distill_reverse"},
    "progressive_memory": {
        "masking": "progressive_memory", "loss": "distill", "steps": 3, "temperature": 2.0,
    },
    "sequence": {"normalisation": "sequence", "weighting": "uniform"},
    "long": {"steps": 4},
    "independent": {"masking": "progressive_memory", "supervise": "newly_revealed"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_exact_equals_reverse_over_reverse_through_plain_loops(theta, name):
    config = settings("exact", "global", **VARIANTS[name])
    given = draw(config, batch_of(0))
    (loss, sums), gradient = run(config, theta, given)
    differentiated = jax.jit(jax.value_and_grad(oracle(config, given), has_aux=True))
    (expected, inner), expected_gradient = differentiated(theta)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(sums.inner.loss[:, 0], inner, rtol=1e-11)
    assert_close(gradient, expected_gradient, 1e-9)
    moved = fast_weights.group_norms(jax.tree.map(jnp.subtract, sums.phi, given[0]))
    assert float(moved[0]) > 1e-3, "the fast weights must have moved"


@pytest.mark.parametrize("mode", ["first_order", "trunk_stopped", "exact"])
@pytest.mark.parametrize("name", ["cosine", "epochs"])
def test_all_gradients_agree_on_the_value(theta, mode, name):
    config = settings(mode, "example", **VARIANTS[name])
    given = draw(config, batch_of(0))
    (loss, _), gradient = run(config, theta, given)
    reference = dataclasses.replace(config, meta_gradient="first_order")
    assert float(loss) == pytest.approx(float(run(reference, theta, given)[0][0]), rel=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("name", "scope"),
    [(name, "global") for name in VARIANTS]
    # Of every loss and normalisation one; maskings do not know of the scope.
    + [(name, "example") for name in ("reverse", "mse", "cosine", "epochs", "sequence")],
)
def test_rows_that_hold_little_are_harmless(theta, name, scope):
    """No maskable token, one, all masked, nothing but padding: finite, nothing skipped."""
    maskable = np.zeros((ROWS, tiny.LENGTH), bool)
    maskable[1], maskable[2, 5] = True, True
    valid = np.ones_like(maskable)
    valid[2, 6:] = valid[3] = False
    batch = dataclasses.replace(
        batch_of(3), maskable=jnp.asarray(maskable), valid=jnp.asarray(valid)
    )
    config = settings("exact", scope, **VARIANTS[name])
    given = draw(config, batch, lambda _, batch: (batch.maskable, jnp.ones(ROWS)))
    (loss, sums), gradient = run(config, theta, given)
    assert np.isfinite(loss) and not sums.inner.skipped.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, sums.phi)))
    if scope == "example":
        assert not sums.inner.loss[:, [0, 3]].any(), "rows without a target have no inner loss"


class TestDropout:
    CONFIG = settings("exact", "global", dropout=0.4)

    def test_steps_and_outer_loss_drop_with_keys_of_their_own(self, theta):
        given = draw(self.CONFIG, batch_of(0))
        trajectory = given[3]
        keys = jax.random.key_data(trajectory.dropout)
        assert keys.shape[:2] == (3, 1) and len(np.unique(keys.reshape(3, -1), axis=0)) == 3
        (loss, sums), _ = run(self.CONFIG, theta, given)
        # At phi_0 (B = 0) nothing can be seen of it; from the second step on it shows.
        without = (*given[:3], dataclasses.replace(trajectory, dropout=None))
        plain = dataclasses.replace(self.CONFIG, dropout=0.0)
        (other, others), _ = run(plain, theta, without)
        assert float(sums.inner.loss[0, 0]) == pytest.approx(float(others.inner.loss[0, 0]))
        assert abs(float(sums.inner.loss[1, 0]) - float(others.inner.loss[1, 0])) > 1e-6
        assert abs(float(loss) - float(other)) > 1e-6

    def test_the_outer_loss_drops_too(self, theta):
        """Two outer keys, the same inner ones: phi_K is the same, the loss is not."""
        given = draw(self.CONFIG, batch_of(0))
        dropout = given[3].dropout
        other = dropout.at[-1].set(jax.random.key(99))
        changed = (*given[:3], dataclasses.replace(given[3], dropout=other))
        (loss, sums), _ = run(self.CONFIG, theta, given)
        (another, same), _ = run(self.CONFIG, theta, changed)
        assert_close(same.phi, sums.phi, 0.0)
        assert float(loss) != float(another)

    @pytest.mark.parametrize("scope", ["example", "global"])
    def test_exact_gradient_by_central_differences(self, theta, scope):
        config = settings("exact", scope, dropout=0.4)
        given = draw(config, batch_of(0))
        _, gradient = run(config, theta, given)
        rng = np.random.default_rng(0)
        direction = {name: rng.normal(size=leaf.shape) for name, leaf in theta.items()}

        def at(step):
            moved = {name: leaf + step * direction[name] for name, leaf in theta.items()}
            return float(run(config, moved, given)[0][0])

        h = 1e-4
        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found = sum(float(np.vdot(gradient[name], direction[name])) for name in theta)
        assert found == pytest.approx(expected, rel=1e-6)

    def test_not_when_evaluating(self):
        given = draw(self.CONFIG, batch_of(0))
        keys = jax.random.key(0), jax.random.key(1), None
        loop = inner_loop.InnerLoop(MODEL, self.CONFIG)
        _, trajectory = loop.draw(keys, given.batch, given.anchor, LinearSchedule())
        assert trajectory.dropout is None


class TestDeviceScope:
    CONFIG = settings("exact", "device", groups=2)

    def test_equals_a_loop_over_groups_of_consecutive_rows(self, theta):
        given = draw(self.CONFIG, batch_of(0))
        (loss, sums), gradient = run(self.CONFIG, theta, given)
        assert fast_weights.number_of_groups(sums.phi) == 2
        total, expected = 0.0, jax.tree.map(jnp.zeros_like, theta)
        for group in range(2):
            rows = slice(2 * group, 2 * group + 2)
            phi = jax.tree.map(lambda leaf, g=group: leaf[g : g + 1], given[0])
            part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], given[1:])
            own = settings("exact", "global")
            (value, alone), one = run(own, theta, (phi, *part))
            np.testing.assert_allclose(alone.inner.loss[:, 0], sums.inner.loss[:, group])
            total, expected = total + value, jax.tree.map(jnp.add, expected, one)
        assert float(loss) == pytest.approx(float(total), rel=1e-12)
        assert_close(gradient, expected, 1e-11)

    @pytest.mark.parametrize(("groups", "same_as"), [(1, "global"), (ROWS, "example")])
    def test_its_ends_are_the_other_scopes(self, theta, groups, same_as):
        config = settings("exact", "device", groups=groups)
        (loss, _), gradient = run(config, theta, draw(config, batch_of(0)))
        other = settings("exact", same_as)
        (expected, _), same = run(other, theta, draw(other, batch_of(0)))
        assert float(loss) == pytest.approx(float(expected), rel=1e-13)
        assert_close(gradient, same, 1e-12)

    @pytest.mark.parametrize("groups", [2, 4])
    def test_devices_share_out_the_groups(self, groups):
        """Every device of two holds half of the memories, over the rows that it has."""
        config = settings("exact", "device", groups=groups)

        def on_device(rows):
            return draw(config, rows, parts=2, axis_name="d").phi

        halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch_of(0))
        phi = jax.vmap(on_device, axis_name="d")(halves)
        assert jax.tree.leaves(phi)[0].shape[:2] == (2, groups // 2)

    @pytest.mark.parametrize(("groups", "parts"), [(3, 1), (2, 4), (10, 2)])
    def test_groups_that_cannot_be_shared_out_are_refused(self, groups, parts):
        config = MemoryConfig(scope="device", groups=groups)
        with pytest.raises(ValueError, match=rf"memory\.groups={groups} must be a multiple of"):
            fast_weights.groups_for(config, ROWS, parts)


def test_adam_with_a_number_under_its_root_differentiates_where_gradients_are_zero():
    """A's gradient is exactly zero at phi_0, and all of row 0's, which has no maskable token."""
    theta, maskable = MODEL.init(0), np.ones((ROWS, tiny.LENGTH), bool)
    maskable[0] = False
    batch = dataclasses.replace(batch_of(3), maskable=jnp.asarray(maskable))
    config = settings("exact", "example", optimizer="tests.memory.own_parts:rooted_adam")
    given = draw(config, batch, lambda _, batch: (batch.maskable, jnp.ones(ROWS)))

    @jax.jit
    def outer(theta):
        return tiny.outer(config, theta, given, with_memory_off=False)[0]

    gradient, rng = jax.jit(jax.grad(outer))(theta), np.random.default_rng(0)
    direction = {name: rng.normal(size=leaf.shape) for name, leaf in theta.items()}

    def at(step):
        return float(outer({name: x + step * direction[name] for name, x in theta.items()}))

    h = 1e-5
    expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    found = sum(float(np.vdot(gradient[name], direction[name])) for name in theta)
    assert found == pytest.approx(expected, rel=1e-4)
