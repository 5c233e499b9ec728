"""Random masks: who may be masked, how many, and that every choice is equally likely."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion.masking import (
    apply_mask,
    bernoulli_mask,
    choose_exactly,
    random_ranks,
)

MASKABLE = np.array([[0, 1, 1, 1, 1, 0, 1, 1], [1] * 8, [0] * 8, [0, 0, 0, 1, 0, 0, 0, 0]], bool)
DRAWS = 4000


def many(function, argument):
    """[DRAWS, b, l]: independent draws of one mask function."""
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return np.asarray(COMPILED[function](keys, MASKABLE, jnp.asarray(argument)))


COMPILED = {f: jax.jit(jax.vmap(f, (0, None, None))) for f in (choose_exactly, bernoulli_mask)}


def test_exact_counts_within_the_candidates():
    for count in ([0, 0, 0, 0], [3, 8, 1, 1], [99, 5, 2, 0]):
        drawn = many(choose_exactly, count)
        assert not (drawn & ~MASKABLE).any()
        wanted = np.minimum(count, MASKABLE.sum(-1))
        assert (drawn.sum(-1) == wanted).all()


def test_every_subset_is_equally_likely():
    """Chi-square over the 20 subsets of size 3 of row 0's 6 candidates, 4,000 draws."""
    drawn = many(choose_exactly, [3, 0, 0, 0])[:, 0]
    candidates = np.flatnonzero(MASKABLE[0])
    subsets = list(itertools.combinations(candidates, 3))
    seen = [tuple(np.flatnonzero(row)) for row in drawn]
    observed = np.array([seen.count(subset) for subset in subsets])
    expected = DRAWS / len(subsets)
    assert observed.sum() == DRAWS
    # 99.9 % quantile of chi-square with 19 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 43.8


def test_rows_are_drawn_independently():
    """Rows 1 and 0 share six candidates: the overlap is that of independent draws, not all."""
    drawn = many(choose_exactly, [3, 4, 0, 0])
    overlap = (drawn[:, 0] & drawn[:, 1]).sum(-1).mean()
    assert abs(overlap - 3 * 4 / 8) < 0.06


def test_bernoulli_masks_the_maskable_at_the_rate_of_the_row():
    ratio = np.array([0.2, 0.7, 0.5, 0.9], np.float32)
    drawn = many(bernoulli_mask, ratio)
    assert not (drawn & ~MASKABLE).any()
    error = np.sqrt(ratio * (1 - ratio) / DRAWS)[:, None]
    expected = np.where(MASKABLE, ratio[:, None], 0)
    assert (np.abs(drawn.mean(0) - expected) < 4.5 * error).all()
    # Positions are independent: the count has the binomial variance.
    count = drawn[:, 1].sum(-1)
    assert abs(count.var() / (8 * 0.7 * 0.3) - 1) < 0.1


def test_extreme_ratios_mask_nothing_and_all():
    ratio = jnp.array([0.0, 1.0, 1.0, 1.0])
    mask = bernoulli_mask(jax.random.key(0), MASKABLE, ratio)
    np.testing.assert_array_equal(mask, MASKABLE & (ratio > 0)[:, None])


def test_jit_equals_eager():
    key, count = jax.random.key(3), jnp.array([2, 5, 1, 1])
    ratio = jnp.full(4, 0.5)
    for function, argument in ((choose_exactly, count), (bernoulli_mask, ratio)):
        eager = function(key, jnp.asarray(MASKABLE), argument)
        np.testing.assert_array_equal(jax.jit(function)(key, MASKABLE, argument), eager)


def test_apply_mask_replaces_only_the_masked_and_keeps_the_dtype():
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    mask = jnp.array([[1, 0, 0, 1], [0] * 4, [1] * 4], bool)
    masked = apply_mask(tokens, mask, 63)
    assert masked.dtype == jnp.int32
    np.testing.assert_array_equal(masked, [[63, 1, 2, 63], [4, 5, 6, 7], [63] * 4])


def test_equal_scores_are_put_in_random_order():
    """Among 32k candidates some scores are equal: the left one must not always come first."""
    key, candidates = jax.random.key(0), np.ones((16, 2**15), bool)
    scores = np.asarray(jax.random.uniform(key, candidates.shape))
    ranks = np.asarray(random_ranks(key, jnp.asarray(candidates)))
    left_first = []
    for row, rank in zip(scores, ranks, strict=True):
        np.testing.assert_array_equal(np.sort(rank), np.arange(2**15))
        order = np.argsort(row, kind="stable")
        pairs = np.flatnonzero(np.diff(row[order]) == 0)
        left_first += list(rank[order[pairs]] < rank[order[pairs + 1]])
        assert (np.diff(row[np.argsort(rank)]) >= 0).all()
    assert len(left_first) > 500
    assert abs(np.mean(left_first) - 0.5) < 4 * 0.5 / np.sqrt(len(left_first))
