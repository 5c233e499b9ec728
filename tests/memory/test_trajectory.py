"""The states of the inner loop: exact counts, nested masks, uniform draws, weights."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Anchor
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import trajectory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.trajectory import Rows
from memdlm_jax.typing import Batch, Context

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
    masks = trajectory.anchor_consistent_masks(jax.random.key(seed), maskable, anchor, steps, scale)
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
        return jnp.stack(trajectory.anchor_consistent_masks(key, maskable, anchor, 3, 2.5))[:, 0]

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


def drawn(batch, groups=4, share=0.4, weight=None, seed=0, **settings):
    """(trajectory, anchor) of a batch whose anchor masks a share of the maskable positions."""
    rng = np.random.default_rng(2)
    anchor = jnp.asarray(np.asarray(batch.maskable) & (rng.random(batch.maskable.shape) < share))
    weight = jnp.ones(4) if weight is None else weight
    config = MemoryConfig(**settings)
    rows = rows_of(config, batch, anchor, weight)
    return trajectory.draw(jax.random.key(seed), config, rows, groups), np.asarray(anchor)


def rows_of(config, batch, mask, weight):
    """What is written where the outer loss masks the same rows with ``mask``."""
    anchor = Anchor(None, Context(batch.valid), batch.maskable.sum(-1), mask, weight)
    return trajectory.rows_of_anchor(batch, anchor, config, MASK_ID, LinearSchedule())


def masks_of(found):
    return [np.asarray(state.tokens) == MASK_ID for state in found.states]


def supervised_of(state):
    """[b, l] bool from the gathered targets."""
    mask = np.zeros((4, LENGTH), bool)
    for row in range(4):
        present = np.asarray(state.targets.present[row])
        mask[row, np.asarray(state.targets.positions[row])[present]] = True
    return mask


STRATEGIES = ("pmc", "pre_only", "no_progressive", "progressive_memory")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("weighting", ["scheduler", "uniform"])
@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
def test_states_against_a_loop(batch, groups, weighting, normalisation):
    """Clean targets at the masked positions, weights by actual ratio, normalised per group."""
    tokens, maskable = np.asarray(batch.tokens), np.asarray(batch.maskable)
    found, _ = drawn(batch, groups, weighting=weighting, normalisation=normalisation)
    assert len(found.states) == 2 and found.ends_at_anchor and found.after is None
    for state, mask in zip(found.states, masks_of(found), strict=True):
        np.testing.assert_array_equal(state.tokens, np.where(mask, MASK_ID, tokens))
        np.testing.assert_array_equal(supervised_of(state), mask)
        for row in range(4):
            group = np.arange(4).reshape(groups, -1)
            members = next(g for g in group if row in g)
            ratio = mask[row].sum() / max(maskable[row].sum(), 1)
            weight = 1.0 if weighting == "uniform" else 1 / (ratio + 1e-6)
            divided = {
                "token": weight / max(mask[members].sum(), 1),
                "sequence": weight / max(mask[row].sum(), 1) * len(members),
                "batch": weight / len(members),
            }
            assert float(state.weight[row]) == pytest.approx(divided[normalisation], rel=2e-5)
            present = np.asarray(state.targets.present[row])
            labels = np.asarray(state.targets.labels[row])[present]
            assert labels.tolist() == tokens[row, mask[row]].tolist()


class TestStrategies:
    def test_pre_only_is_the_first_state_of_pmc_alone(self, batch):
        (one, _), (two, _) = drawn(batch, masking="pre_only"), drawn(batch)
        (only,) = masks_of(one)
        np.testing.assert_array_equal(only, masks_of(two)[0])
        assert not one.ends_at_anchor

    def test_no_progressive_is_the_anchor_with_the_anchors_weight(self, batch):
        weight = jnp.array([2.0, 3.0, 5.0, 7.0])
        found, anchor = drawn(batch, masking="no_progressive", weight=weight)
        (mask,) = masks_of(found)
        np.testing.assert_array_equal(mask, anchor)
        assert found.ends_at_anchor
        expected = np.asarray(weight) / np.maximum(anchor.sum(-1), 1)
        np.testing.assert_allclose(found.states[0].weight, expected, rtol=1e-6)

    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    def test_progressive_memory_ignores_the_anchor(self, batch, steps):
        rows = jnp.ones((4, LENGTH), bool)
        full = batch.replace(maskable=rows)
        found, _ = drawn(full, masking="progressive_memory", steps=steps)
        other, _ = drawn(full, share=0.9, masking="progressive_memory", steps=steps)
        masks = masks_of(found)
        for mask, same in zip(masks, masks_of(other), strict=True):
            np.testing.assert_array_equal(mask, same)
        assert not found.ends_at_anchor
        ratios = np.linspace(0.8, 0.2, steps) if steps > 1 else [0.2]
        counts = masks[0].sum(-1)
        for mask, ratio, before in zip(masks, ratios, [masks[0], *masks], strict=False):
            assert not (mask & ~before).any(), "what is revealed stays revealed"
            if mask is not masks[0]:
                counts = np.minimum(counts, int(round(ratio * LENGTH, 9)))
            np.testing.assert_array_equal(mask.sum(-1), counts)
        for state, mask, ratio in zip(found.states, masks, ratios, strict=True):
            expected = 1 / (ratio + 1e-6) / mask.sum(-1)
            np.testing.assert_allclose(state.weight, expected, rtol=2e-5)

    def test_progressive_memory_draws_uniformly(self):
        """First mask Bernoulli(0.8); of the masked, every position is as likely to stay."""
        maskable = jnp.ones((1, 5), bool)
        config = MemoryConfig(masking="progressive_memory", prompt_mask_ratio=0.4)

        @jax.jit
        @jax.vmap
        def many(key):
            rows = Rows(None, maskable, maskable, None, None, MASK_ID)
            return jnp.stack(trajectory.independent(key, config, rows).masks)[:, 0]

        drawn = np.asarray(many(jax.random.split(jax.random.key(5), 4000)))
        np.testing.assert_allclose(drawn[:, 0].mean(0), 0.8, atol=0.025)
        full = drawn[drawn[:, 0].all(-1)][:, 1]
        kept = [tuple(np.flatnonzero(row)) for row in full]
        assert chi_square(kept, list(itertools.combinations(range(5), 2))) < 27.9

    @pytest.mark.parametrize("masking", STRATEGIES)
    def test_jit_equals_eager(self, batch, masking):
        settings = {"masking": masking, "steps": 2, "loss": "distill"}

        def draw(key):
            config = MemoryConfig(**settings)
            rows = rows_of(config, batch, batch.maskable, jnp.ones(4))
            return trajectory.draw(key, config, rows, 4)

        eager, compiled = draw(jax.random.key(0)), jax.jit(draw)(jax.random.key(0))
        assert jax.tree.structure(eager) == jax.tree.structure(compiled)
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
            # Row 3 has nothing to mask; its weight, 1 / (1 - (1 - 0) + 1e-6), is never used.
            np.testing.assert_allclose(a[:3], b[:3], rtol=1e-6)


class TestSupervisedPositions:
    @pytest.mark.parametrize("steps", [2, 3])
    def test_newly_revealed_are_those_the_next_state_shows(self, batch, steps):
        found, _ = drawn(batch, supervise="newly_revealed", steps=steps)
        masks = masks_of(found)
        follows = [*masks[1:], np.zeros_like(masks[0])]
        for state, mask, following in zip(found.states, masks, follows, strict=True):
            np.testing.assert_array_equal(supervised_of(state), mask & ~following)

    def test_pre_only_is_followed_by_the_anchor(self, batch):
        found, anchor = drawn(batch, masking="pre_only", supervise="newly_revealed")
        mask = masks_of(found)[0]
        np.testing.assert_array_equal(supervised_of(found.states[0]), mask & ~anchor)

    def test_weights_count_the_supervised_positions(self, batch):
        found, _ = drawn(batch, supervise="newly_revealed", weighting="uniform")
        counts = supervised_of(found.states[0]).sum(-1)
        np.testing.assert_allclose(found.states[0].weight, 1 / np.maximum(counts, 1), rtol=1e-6)


class TestTeachers:
    @pytest.mark.parametrize("masking", ["pmc", "no_progressive", "progressive_memory"])
    def test_the_last_one_reads_the_clean_tokens(self, batch, masking):
        found, _ = drawn(batch, masking=masking, loss="distill")
        np.testing.assert_array_equal(found.after, batch.tokens)

    def test_pre_only_ones_read_the_anchor(self, batch):
        found, _ = drawn(batch, masking="pre_only", loss="distill")
        assert found.after is None


class TestPadding:
    @pytest.fixture
    def padded(self, batch):
        """The last ten positions are supervised padding."""
        maskable = batch.maskable.at[:, -10:].set(True)
        padding = jnp.zeros_like(maskable).at[:, -10:].set(True)
        return batch.replace(maskable=maskable, padding=padding)

    def test_none_masks_it_like_a_response(self, padded):
        found, _ = drawn(padded, share=0.6)
        assert all(mask[:, -10:].any() for mask in masks_of(found))
        assert found.ends_at_anchor

    @pytest.mark.parametrize("masking", STRATEGIES)
    def test_inner_leaves_it_visible_and_unlearnt(self, padded, masking):
        found, anchor = drawn(padded, share=0.6, padding="inner", masking=masking)
        for state, mask in zip(found.states, masks_of(found), strict=True):
            assert not mask[:, -10:].any() and not supervised_of(state)[:, -10:].any()
        assert not found.ends_at_anchor, "the outer loss masks it, the inner loop does not"
        if masking == "no_progressive":
            inner = anchor & ~np.asarray(padded.padding)
            np.testing.assert_array_equal(masks_of(found)[0], inner)

    def test_ratios_are_those_of_what_may_be_masked(self, padded):
        found, anchor = drawn(padded, share=0.6, padding="inner")
        inner = np.asarray(padded.maskable & ~padded.padding)
        counts = (anchor & inner).sum(-1)
        weight = 1 / (counts / np.maximum(inner.sum(-1), 1) + 1e-6) / np.maximum(counts, 1)
        np.testing.assert_allclose(found.states[1].weight, weight, rtol=2e-5)

    def test_inner_gives_the_teacher_of_pre_only_its_own_anchor(self, padded):
        found, anchor = drawn(
            padded, share=0.6, padding="inner", masking="pre_only", loss="distill"
        )
        inner = anchor & ~np.asarray(padded.padding)
        np.testing.assert_array_equal(np.asarray(found.after) == MASK_ID, inner)

    def test_without_padding_the_policy_changes_nothing(self, batch):
        found, _ = drawn(batch, padding="inner")
        assert found.ends_at_anchor
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, drawn(batch)[0]))

    def test_visible_to_the_outer_loss_is_padding_that_is_not_maskable(self, padded):
        assert objective.LossConfig().supervised(padded) is padded
        plain = objective.LossConfig(padding="visible").supervised(padded)
        assert not (plain.maskable & padded.padding).any()
        assert (plain.maskable == (padded.maskable & ~padded.padding)).all()


def test_a_shared_memory_is_normalised_over_all_devices():
    weight, counts = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5, 0], [1, 2]])

    def on_device(weight, counts):
        return trajectory.normalised(weight, counts, 1, axis_name="devices")

    split = jax.vmap(on_device, axis_name="devices")(weight, counts)
    np.testing.assert_allclose(split, weight / 8, rtol=1e-6)


def test_capacity_reaches_the_targets(batch):
    rows = rows_of(MemoryConfig(), batch, batch.maskable, jnp.ones(4))
    found = trajectory.draw(jax.random.key(0), MemoryConfig(), rows, 4, capacity=36)
    assert found.states[0].targets.positions.shape == (4, 36)
