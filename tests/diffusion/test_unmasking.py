import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import unmasking
from memdlm_jax.diffusion.samplers import DecodeConfig

RNG = np.random.default_rng(0)


def settings(**changes):
    return DecodeConfig(length=8, block_length=8, steps=8, **changes)


_propose = jax.jit(unmasking.propose, static_argnums=(2, 3))


def propose(logits, mask=None, key=0, **changes):
    logits = jnp.asarray(logits, jnp.float32)
    keys = jax.random.split(jax.random.key(key), len(logits))
    mask = logits.shape[-1] - 1 if mask is None else mask
    return _propose(keys, logits, settings(**changes), mask)


def test_the_mask_token_is_never_proposed():
    logits = jnp.zeros((2, 3, 5)).at[..., 4].set(50.0).at[0, :, 2].set(1.0)
    for changes in ({}, {"temperature": 1.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert not (propose(logits, **changes).tokens == 4).any()
    assert propose(logits).tokens.tolist() == [[2, 2, 2], [0, 0, 0]]


@pytest.mark.parametrize("noise", ["float32", "float64"])
def test_samples_follow_the_softmax_at_the_temperature(noise):
    logits, temperature = np.array([0.3, -1.0, 1.2, 0.0]), 0.7
    many = np.broadcast_to(logits, (1, 40_000, 4))
    with jax.enable_x64(noise == "float64"):
        tokens = propose(many, key=1, temperature=temperature, noise=noise).tokens
        expected = jax.nn.softmax(logits[:3] / temperature)
    frequencies = np.bincount(tokens[0], minlength=4) / 40_000
    np.testing.assert_allclose(frequencies[:3], expected, atol=0.01)


def test_float64_noise_needs_the_64_bit_mode():
    with pytest.raises(ValueError, match=r"decode\.noise='float64' needs JAX's 64-bit mode"):
        propose(np.zeros((1, 2, 3)), temperature=1.0, noise="float64")


def test_a_rows_noise_is_its_own():
    logits = RNG.normal(size=(3, 4, 9))
    keys = jax.random.split(jax.random.key(2), 3)
    config = settings(temperature=1.0, order="random")
    together = _propose(keys, jnp.asarray(logits), config, 8)
    alone = _propose(keys[2:], jnp.asarray(logits[2:]), config, 8)
    np.testing.assert_array_equal(together.tokens[2:], alone.tokens)
    np.testing.assert_array_equal(together.score[2:], alone.score)


@pytest.mark.parametrize("vocabulary", [7, 12, 36])
def test_a_vocabulary_is_searched_in_parts(vocabulary):
    """Few different logits, so that there are ties in a part and between parts; 7 is prime."""
    logits = RNG.integers(0, 3, (2, 50, vocabulary)).astype(np.float32)
    logits[0, 0] = -np.inf
    for mask in {0, vocabulary // 2, vocabulary - 1}:
        allowed = np.where(np.arange(vocabulary) == mask, -np.inf, logits)
        found = propose(logits, mask)
        expected = np.argmax(allowed, axis=-1)
        expected = np.where(expected == mask, int(mask == 0), expected)
        np.testing.assert_array_equal(found.tokens, expected)
        p = np.asarray(jax.nn.softmax(logits[1:], axis=-1))
        picked = np.take_along_axis(p, expected[1:, :, None], -1)[..., 0]
        np.testing.assert_allclose(found.probability[1:], picked, rtol=1e-6)


def test_scores_of_every_order():
    logits = RNG.normal(size=(2, 3, 7)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best, second = np.sort(p[..., :6], axis=-1)[..., ::-1][..., :2].transpose(2, 0, 1)
    found = propose(logits)
    np.testing.assert_allclose(found.probability, best, rtol=1e-5)
    np.testing.assert_allclose(found.score, best, rtol=1e-5)
    entropy = propose(logits, order="entropy")
    np.testing.assert_allclose(entropy.score, (p * np.log(p)).sum(-1), rtol=1e-5)
    first, other = np.sort(p, axis=-1)[..., ::-1][..., :2].transpose(2, 0, 1)
    margin = propose(logits, order="margin")
    np.testing.assert_allclose(margin.score, first - other, rtol=1e-4)
    drawn = propose(logits, order="random")
    assert ((drawn.score >= 0) & (drawn.score < 1)).all() and len(np.unique(drawn.score)) == 6
    assert (second < best).all()


def test_scores_of_the_sampled_distribution_are_tempered_and_truncated():
    logits = RNG.normal(size=(1, 5, 7))
    kept = np.sort(logits[..., :6] / 0.5, axis=-1)[..., -2:]
    p = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    found = propose(logits, scores="sampled", temperature=0.5, top_k=2)
    ranks = (logits[0, np.arange(5), found.tokens[0]] == logits[0, :, :6].max(-1)).astype(int)
    np.testing.assert_allclose(found.probability[0], p[0, np.arange(5), ranks], rtol=1e-5)


def test_truncation_keeps_the_smallest_set_that_reaches_top_p():
    p = np.array([0.4, 0.05, 0.3, 0.25])
    logits = jnp.log(p)[None, None]
    for top_p, kept in ((0.39, [0]), (0.41, [0, 2]), (0.71, [0, 2, 3]), (0.99, [0, 1, 2, 3])):
        cut = unmasking.truncate(logits, 0, top_p)[0, 0]
        assert np.flatnonzero(np.isfinite(cut)).tolist() == kept
    assert np.isfinite(unmasking.truncate(logits, 3, 1.0)[0, 0]).tolist() == [1, 0, 1, 1]
    # What is left after top-k is the whole that top_p takes its share of.
    assert np.isfinite(unmasking.truncate(logits, 2, 0.6)[0, 0]).tolist() == [1, 0, 1, 0]
    assert unmasking.truncate(logits, 9, 1.0) is logits


def test_suppressed_tokens_leave_the_distribution_and_deferred_ones_come_last():
    logits = np.log(np.array([[[0.5, 0.3, 0.2, 1e-9], [0.1, 0.6, 0.3, 1e-9]]]))
    suppressed = propose(logits, suppress=(0,))
    assert suppressed.tokens.tolist() == [[1, 1]]
    np.testing.assert_allclose(suppressed.probability, [[0.6, 0.6 / 0.9]], rtol=1e-5)
    deferred = propose(logits, defer=(0,))
    assert deferred.tokens.tolist() == [[0, 1]]
    np.testing.assert_allclose(deferred.probability, [[0, 0.6 / 0.9]], rtol=1e-5)
    for order in ("confidence", "entropy", "random"):
        assert propose(logits, defer=(0,), order=order).score[0, 0] == -np.inf


def choose(score, candidates, quota=1, share=0.5, probability=None, **changes):
    score = jnp.asarray(score)
    probability = score if probability is None else jnp.asarray(probability)
    proposal = unmasking.Proposal(jnp.zeros(score.shape, int), probability, score)
    picked = unmasking.choose(
        proposal, jnp.asarray(candidates, bool), settings(**changes), quota, share
    )
    return picked.astype(int).tolist()


def test_a_threshold_commits_all_that_are_sure_or_the_quota():
    score, all_of_them = [[0.9, 0.2, 0.8, 0.95]], [[1, 1, 1, 0]]
    assert choose(score, all_of_them, threshold=0.7) == [[1, 0, 1, 0]]
    assert choose(score, all_of_them, threshold=0.85) == [[1, 0, 0, 0]]
    assert choose(score, all_of_them, quota=2, threshold=0.85) == [[1, 0, 1, 0]]
    assert choose(score, all_of_them, threshold=0.99) == [[1, 0, 0, 0]]
    by_probability = choose([[-3.0, -1.0]], [[1, 1]], probability=[[0.6, 0.4]], threshold=0.5)
    assert by_probability == [[1, 0]]


def test_independent_commits_hang_on_each_positions_own_draw():
    assert choose([[0.1, 0.6, 0.9]], [[1, 1, 0]], order="independent") == [[0, 1, 0]]
    assert choose([[-np.inf, 0.0]], [[1, 1]], share=1.0, order="independent") == [[1, 1]]


def test_an_order_temperature_draws_positions_by_their_scores():
    logits = np.log(np.array([[[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]]))
    rows = np.broadcast_to(logits[0], (400, 2, 3))
    wins = (np.argmax(propose(rows, order_temperature=0.1).score, -1) == 0).sum()
    assert abs(wins / 400 - 1 / (1 + np.exp((0.5 - 0.7) / 0.1))) < 0.06


def test_most_confident_takes_candidates_only_and_ties_from_the_left():
    scores = jnp.array([[0.9, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    candidates = jnp.array([[False, True, True, True], [True, False, False, False]])
    picked = unmasking.most_confident(scores, candidates, 2)
    assert picked.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_a_candidate_without_any_score_still_comes_before_what_is_none():
    scores = jnp.array([[-jnp.inf, 0.5, -jnp.inf]])
    picked = unmasking.most_confident(scores, jnp.array([[True, False, True]]), 1)
    assert picked.tolist() == [[True, False, False]]


def test_text_ends_at_the_first_eos():
    tokens = np.array([[5, 1, 6, 1], [1, 5, 5, 5], [5, 5, 5, 5]])
    assert unmasking.text_lengths(tokens, 1).tolist() == [1, 0, 4]
