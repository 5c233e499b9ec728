"""The states of the inner loop: exact counts, nested masks, uniform draws, weights."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import trajectory
from memdlm_jax.typing import Batch

LENGTH, MASK_ID = 42, 63
PAIRS = [(m, n) for m in range(41) for n in range(m + 1)]
"""All (maskable, masked in the anchor) with up to 40 maskable tokens."""

SCALES = {
    "1": Fraction(1),
    "1.16": Fraction(29, 25),  # 25 * 1.16 falls short of 29 in float64
    "1.25": Fraction(5, 4),
    "4/3": Fraction(4, 3),
    "1.5": Fraction(3, 2),
    "1.75": Fraction(7, 4),
    "2": Fraction(2),
}


@pytest.fixture(scope="module")
def rows():
    """(maskable, anchor) numpy [pairs, l]: one row for every pair, at random places."""
    rng = np.random.default_rng(0)
    maskable, anchor = np.zeros((2, len(PAIRS), LENGTH), bool)
    for i, (m, n) in enumerate(PAIRS):
        places = rng.permutation(LENGTH)
        maskable[i, places[:m]] = True
        anchor[i, places[:n]] = True
    return maskable, anchor


def draw(rows, steps, scale, seed=0):
    maskable, anchor = map(jnp.asarray, rows)
    masks = trajectory.draw_masks(jax.random.key(seed), maskable, anchor, steps, scale)
    return np.asarray(masks)


@pytest.mark.parametrize("scale", SCALES)
def test_pre_anchor_count_is_exact(rows, scale):
    """min(M, floor(s n)) in rational arithmetic for every pair."""
    counts = draw(rows, 1, float(SCALES[scale]))[0].sum(-1)
    expected = [min(m, int(SCALES[scale] * n)) for m, n in PAIRS]
    assert counts.tolist() == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_masks_shrink_to_the_anchor_by_equal_reveals(rows, steps):
    maskable, anchor = rows
    masks = draw(rows, steps, 2.5)
    assert masks.shape == (steps, *anchor.shape)
    assert not (masks & ~maskable).any()
    assert not (anchor & ~masks).any(), "every state masks at least the anchor's positions"
    assert not (masks[1:] & ~masks[:-1]).any(), "what is revealed stays revealed"
    if steps >= 2:
        np.testing.assert_array_equal(masks[-1], anchor)
    for i, (m, n) in enumerate(PAIRS):
        left = [min(m, 5 * n // 2) - n]
        for steps_left in range(steps - 1, 0, -1):
            left.append(left[-1] - -(-left[-1] // steps_left))
        assert (masks[:, i].sum(-1) - n).tolist() == left


def chi_square(outcomes, choices):
    observed = np.array([outcomes.count(choice) for choice in choices])
    assert observed.sum() == len(outcomes)
    expected = len(outcomes) / len(choices)
    return ((observed - expected) ** 2 / expected).sum()


def test_extra_positions_are_uniform_over_the_visible_maskable_ones():
    """Three extra of six visible, then one of them left: chi-square at the 99.9 % quantile."""
    maskable = jnp.array([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1]], bool)
    anchor = jnp.array([[0, 0, 1, 0, 0, 0, 0, 1, 0, 0]], bool)

    @jax.jit
    @jax.vmap
    def many(key):
        return jnp.stack(trajectory.draw_masks(key, maskable, anchor, 3, 2.5))[:, 0]

    drawn = np.asarray(many(jax.random.split(jax.random.key(2), 4000))) & ~np.asarray(anchor[0])
    visible = np.flatnonzero(np.asarray(maskable & ~anchor)[0])
    extra = [tuple(np.flatnonzero(row)) for row in drawn[:, 0]]
    assert chi_square(extra, list(itertools.combinations(visible, 3))) < 43.8
    middle = [tuple(np.flatnonzero(row)) for row in drawn[:, 1]]
    assert chi_square(middle, [(place,) for place in visible]) < 20.5


def test_rows_draw_their_extra_positions_independently():
    maskable, anchor = jnp.ones((2, 40), bool), jnp.zeros((2, 40), bool).at[:, :10].set(True)
    first, second = draw((maskable, anchor), 1, 2.0)[0]
    assert (first != second).any()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, MASK_ID, (4, LENGTH)).astype(np.int32)
    maskable = rng.random((4, LENGTH)) < 0.7
    maskable[3] = False
    return Batch(jnp.asarray(tokens), jnp.asarray(maskable), jnp.ones((4, LENGTH), bool))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("uniform", [False, True])
def test_inner_states_against_a_loop(batch, groups, uniform):
    tokens, maskable = np.asarray(batch.tokens), np.asarray(batch.maskable)
    rng = np.random.default_rng(2)
    masks = [maskable & (rng.random(maskable.shape) < share) for share in (0.8, 0.4)]
    states = trajectory.inner_states(
        batch, [jnp.asarray(m) for m in masks], MASK_ID, None, groups, uniform_weights=uniform
    )
    assert len(states) == 2
    for state, mask in zip(states, masks, strict=True):
        np.testing.assert_array_equal(state.tokens, np.where(mask, MASK_ID, tokens))
        for row in range(4):
            group = np.arange(4).reshape(groups, -1)
            members = next(g for g in group if row in g)
            ratio = mask[row].sum() / max(maskable[row].sum(), 1)
            weight = 1.0 if uniform else 1 / (ratio + 1e-6)
            expected = weight / max(mask[members].sum(), 1)
            assert float(state.weight[row]) == pytest.approx(expected, rel=2e-5)
            present = np.asarray(state.targets.present[row])
            places = np.asarray(state.targets.positions[row])[present]
            assert places.tolist() == np.flatnonzero(mask[row]).tolist()
            labels = np.asarray(state.targets.labels[row])[present]
            assert labels.tolist() == tokens[row, mask[row]].tolist()


def test_a_shared_memory_is_normalised_over_all_devices():
    weight, counts = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5, 0], [1, 2]])

    def on_device(weight, counts):
        return trajectory.normalised(weight, counts, 1, "devices")

    split = jax.vmap(on_device, axis_name="devices")(weight, counts)
    np.testing.assert_allclose(split, weight / 8, rtol=1e-6)


def test_capacity_reaches_the_targets(batch):
    states = trajectory.inner_states(batch, [batch.maskable], MASK_ID, 36, 4)
    assert states[0].targets.positions.shape == (4, 36)


def test_anchor_masks_each_row_at_its_own_time():
    maskable = jnp.ones((6, 4000), bool).at[0].set(False).at[1, 2000:].set(False)
    batch = Batch(jnp.zeros(maskable.shape, jnp.int32), maskable, maskable)
    mask, t = trajectory.draw_anchor(jax.random.key(0), batch, LinearSchedule(0.05))
    assert not (mask & ~maskable).any()
    ratio = mask.sum(-1)[1:] / maskable.sum(-1)[1:]
    np.testing.assert_allclose(ratio, t[1:], atol=0.04)
    assert t.shape == (6,) and np.ptp(t) > 0.2


def test_time_and_mask_are_drawn_apart():
    """A lone token is masked with probability E[t]; drawn from one key it would be always."""
    one = jnp.ones((1, 1), bool)
    batch = Batch(jnp.zeros((1, 1), jnp.int32), one, one)

    def masked(key):
        return trajectory.draw_anchor(key, batch, LinearSchedule())[0].sum()

    keys = jax.random.split(jax.random.key(0), 1000)
    assert abs(float(jax.jit(jax.vmap(masked))(keys).mean()) - 0.5) < 0.06


def test_anchor_state_holds_the_masked_tokens_and_their_truth(batch):
    mask, weight = batch.maskable, jnp.arange(4.0)
    state = trajectory.anchor_state(batch, mask, weight, MASK_ID, None)
    np.testing.assert_array_equal(state.tokens == MASK_ID, mask)
    np.testing.assert_array_equal(state.targets.present.sum(-1), mask.sum(-1))
    np.testing.assert_array_equal(state.weight, weight)
