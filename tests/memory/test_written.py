"""Writing a prompt into memory: what is walked through, and what each row may depend on.

The public code's numbers are the ``inference`` case of ``tests/evaluation/test_parity.py``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.meta_gradient import FirstOrder
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.memory.written import write_prompt
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Batch, Context
from tests.models.small import small

MODEL = LLaDA(
    LLaDAConfig(
        vocab_size=20, width=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_features=24,
        mask_token_id=1, max_length=32,
    )
)  # fmt: skip
CONFIG = MemoryConfig(rank=3, alpha=6.0, layer_fraction=0.5, prompt_mask_ratio=0.4)
ROWS, LENGTH = 3, 12


@pytest.fixture(scope="module")
def theta():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    """(tokens, valid): row 1 is padded on the right, row 2 on the left."""
    tokens = np.random.default_rng(0).integers(2, 20, (ROWS, LENGTH)).astype(np.int32)
    valid = np.ones((ROWS, LENGTH), bool)
    valid[1, 8:] = valid[2, :3] = False
    return tokens, valid


@pytest.fixture(scope="module")
def write(theta):
    loop = InnerLoop(MODEL, CONFIG)
    return jax.jit(functools.partial(write_prompt, inner_loop=loop))


def written(write, theta, tokens, valid, key=0):
    """phi as one [rows, parameters] array, and the record."""
    phi, record = write(jax.random.key(key), theta=theta, tokens=tokens, valid=valid)
    assert fast_weights.number_of_groups(phi) == ROWS
    flat = [np.asarray(leaf).reshape(ROWS, -1) for leaf in jax.tree.leaves(phi)]
    return np.concatenate(flat, axis=1), record


def test_every_row_writes_its_own_memory(write, theta, prompts):
    tokens, valid = prompts
    phi, record = written(write, theta, tokens, valid)
    assert record.loss.shape == (2, ROWS) and not record.skipped.any()
    assert (record.loss > 0).all() and (record.gradient_norm > 0).all()
    assert len(np.unique(phi, axis=0)) == ROWS

    changed = tokens.copy()
    changed[1, :8] = tokens[1, :8][::-1]
    other, _ = written(write, theta, changed, valid)
    assert (other == phi).all(axis=1).tolist() == [True, False, True]


def test_padding_is_never_read(write, theta, prompts):
    tokens, valid = prompts
    phi, record = written(write, theta, tokens, valid)
    again, same = written(write, theta, np.where(valid, tokens, 7), valid)
    np.testing.assert_array_equal(again, phi)
    np.testing.assert_array_equal(same.loss, record.loss)


def test_a_row_of_padding_alone_is_harmless(write, theta, prompts):
    tokens, valid = prompts
    phi, record = written(write, theta, tokens, valid & np.array([[True], [True], [False]]))
    assert np.isfinite(phi).all() and record.loss[:, 2].tolist() == [0.0, 0.0]
    assert not record.skipped.any()


def test_the_key_draws_memory_and_masks(write, theta, prompts):
    first, one = written(write, theta, *prompts)
    second, two = written(write, theta, *prompts, key=1)
    assert (first != second).any(axis=1).all() and (one.loss != two.loss).all()


def test_masks_weights_and_targets_of_the_states(theta, monkeypatch):
    """Anchor Bernoulli(ratio) over valid tokens, pre-anchor 1.5 times as many, rows weigh alike."""
    monkeypatch.setattr(InnerLoop, "adapt", lambda *given: given)
    tokens = jnp.full((4, 600), 5, jnp.int32)
    valid = jnp.arange(600) < jnp.array([600, 500, 400, 300])[:, None]
    config = dataclasses.replace(CONFIG, prompt_mask_ratio=0.3)
    loop = InnerLoop(MODEL, config)
    given = write_prompt(jax.random.key(3), loop, theta, tokens, valid)
    phi, (before, anchor) = given[3], given[4].states
    assert fast_weights.number_of_groups(phi) == 4
    masks = [np.asarray(state.tokens) == MODEL.mask_token_id for state in (before, anchor)]
    assert not (masks[1] & ~masks[0]).any() and not (masks[0] & ~np.asarray(valid)).any()
    counts = [mask.sum(-1) for mask in masks]
    np.testing.assert_array_equal(counts[0], counts[1] * 3 // 2)
    np.testing.assert_allclose(counts[1] / valid.sum(-1), 0.3, atol=0.08)
    for state, count in zip((before, anchor), counts, strict=True):
        np.testing.assert_allclose(state.weight, 1 / count, rtol=1e-6)
        assert state.targets.present.sum(-1).tolist() == count.tolist()
        assert (np.asarray(state.targets.labels)[np.asarray(state.targets.present)] == 5).all()


def test_the_place_of_padding_does_not_matter(theta):
    """The same prompt and masks, padded at the end and, with positions to match, in the middle."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(2, 20, 8).astype(np.int32)
    masks = [rng.random(8) < share for share in (0.7, 0.4)]

    def placed(row, filler):
        return np.stack([np.r_[row, [filler] * 4], np.r_[row[:3], [filler] * 4, row[3:]]])

    tokens, valid = placed(prompt, 0), placed(np.ones(8, bool), False)
    positions = placed(np.arange(8, dtype=np.int32), 0)
    batch = Batch(*map(jnp.asarray, (tokens, valid, valid)))

    def state(mask):
        drawn = jnp.asarray(placed(mask, False)), jnp.full(2, 1 / mask.sum())
        return objective.draw_anchor(jax.random.key(0), batch, 1, lambda key, batch: drawn).state

    phi = fast_weights.init(jax.random.key(0), MODEL, CONFIG, 2)
    context = Context(jnp.asarray(valid), jnp.asarray(positions))
    trajectory = Trajectory(tuple(map(state, masks)), context, ends_at_anchor=False)
    adapt = functools.partial(InnerLoop(MODEL, CONFIG).adapt, rule=FirstOrder())
    adapted, record = jax.jit(adapt)(theta, None, phi, trajectory)
    np.testing.assert_allclose(record.loss[:, 0], record.loss[:, 1], rtol=1e-5)
    for leaf in jax.tree.leaves(adapted):
        np.testing.assert_allclose(leaf[0], leaf[1], atol=1e-5 * np.abs(leaf).max())


def test_a_model_that_predicts_the_next_token_never_masks_the_first(monkeypatch):
    """Dream reads the prediction of a token one position before it: the first has no such place."""
    monkeypatch.setattr(InnerLoop, "adapt", lambda *given: given)
    model = small("dream")
    assert model.lookback == 1
    tokens = jnp.full((2, 30), 5, jnp.int32)
    valid = jnp.arange(30) >= jnp.array([0, 4])[:, None]
    config = dataclasses.replace(CONFIG, prompt_mask_ratio=1.0)
    states = write_prompt(jax.random.key(0), InnerLoop(model, config), None, tokens, valid)[4]
    masked = np.asarray(states.states[-1].tokens == model.mask_token_id)
    np.testing.assert_array_equal(masked, valid & (jnp.cumsum(valid, -1) > 1))
    assert not masked[0, 0] and not masked[1, 4] and masked.sum() == 29 + 25
