import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import unmasking


@pytest.mark.parametrize(
    ("count", "steps", "quotas"),
    [(8, 4, [2, 2, 2, 2]), (16, 6, [3, 3, 3, 3, 2, 2]), (5, 5, [1] * 5), (7, 1, [7])],
)
def test_quotas_give_the_remainder_to_the_first_steps(count, steps, quotas):
    assert unmasking.even_quotas(count, steps) == quotas


@pytest.mark.parametrize("steps", [0, 5])
def test_a_step_without_commits_is_refused(steps):
    with pytest.raises(ValueError, match=rf"steps={steps} must lie in \[1, 4\]"):
        unmasking.even_quotas(4, steps)


def test_the_mask_token_is_never_proposed():
    logits = jnp.zeros((2, 3, 5)).at[..., 4].set(50.0).at[0, :, 2].set(1.0)
    keys = jax.random.split(jax.random.key(0), 2)
    for temperature in (0.0, 1.0):
        tokens = unmasking.propose(keys, logits, temperature, mask_token_id=4)
        assert not (tokens == 4).any()
    assert unmasking.propose(keys, logits, 0.0, 4).tolist() == [[2, 2, 2], [0, 0, 0]]


def test_gumbel_proposals_follow_the_softmax_at_the_temperature():
    logits, temperature = jnp.array([0.3, -1.0, 1.2, 0.0]), 0.7
    many = jnp.broadcast_to(logits, (1, 40_000, 4))
    tokens = unmasking.propose(jax.random.split(jax.random.key(1), 1), many, temperature, 3)
    frequencies = np.bincount(tokens[0], minlength=4) / 40_000
    expected = jax.nn.softmax(logits[:3] / temperature)
    np.testing.assert_allclose(frequencies[:3], expected, atol=0.01)


def test_a_rows_noise_is_its_own():
    keys = jax.random.split(jax.random.key(2), 3)
    logits = jax.random.normal(jax.random.key(3), (3, 4, 9))
    together = unmasking.propose(keys, logits, 1.0, 8)
    alone = unmasking.propose(keys[2:], logits[2:], 1.0, 8)
    np.testing.assert_array_equal(together[2:], alone)


def test_confidence_is_the_probability_of_the_token():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    tokens = jnp.array([[0, 6, 3], [2, 2, 5]])
    expected = np.take_along_axis(jax.nn.softmax(logits), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(unmasking.confidence(logits, tokens), expected, rtol=1e-6)


def test_most_confident_takes_candidates_only_and_ties_from_the_left():
    scores = jnp.array([[0.9, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    candidates = jnp.array([[False, True, True, True], [True, False, False, False]])
    picked = unmasking.most_confident(scores, candidates, 2)
    assert picked.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_text_ends_at_the_first_eos():
    tokens = np.array([[5, 1, 6, 1], [1, 5, 5, 5], [5, 5, 5, 5]])
    assert unmasking.text_lengths(tokens, 1).tolist() == [1, 0, 4]
