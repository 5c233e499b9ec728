"""The dense backbone behind the trunk/head protocol."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models.attention import attend
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.training import flops
from memdlm_jax.typing import Context

CONFIG = LLaDAConfig(
    vocab_size=20, width=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_features=24,
    mask_token_id=1, max_length=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return LLaDA(CONFIG)


@pytest.fixture(scope="module")
def theta(model):
    return jax.jit(model.init)(jax.random.key(0))


TOKENS = jnp.arange(14).reshape(2, 7)


@functools.partial(jax.jit, static_argnames=("model", "split"))
def logits(model, theta, phi=None, split=2, valid=None, position_ids=None, tokens=TOKENS):
    context = Context(valid, position_ids)
    hidden = model.trunk(theta, tokens, context, split=split)
    last = fast_weights.head_with_memory(model, theta, phi, hidden, context, split=split)
    return model.readout(theta, last)


def test_remat_does_not_change_the_model(model, theta):
    for layers in (None, 2):
        remat = LLaDA(dataclasses.replace(CONFIG, remat="full", remat_layers=layers))
        np.testing.assert_array_equal(logits(remat, theta), logits(model, theta))


def test_so_many_layers_are_computed_again(theta):
    def count(**remat):
        model = LLaDA(dataclasses.replace(CONFIG, **remat))
        loss = functools.partial(lambda model, theta: logits(model, theta).sum(), model)
        return flops.matmul_flops(jax.grad(loss), theta)

    none, one, two, all_three = (
        count(), *(count(remat="full", remat_layers=n) for n in (1, 2)), count(remat="full")
    )  # fmt: skip
    assert none < one < two and two - one == one - none == all_three - two
    with pytest.raises(ValueError, match=r"remat_layers=4 must be in 1 .. num_layers=3"):
        dataclasses.replace(CONFIG, remat_layers=4)


def test_zero_fast_weights_are_the_identity_to_the_bit(model, theta):
    phi = fast_weights.init(jax.random.key(1), model, MemoryConfig(rank=4), groups=1)
    phi = jax.tree.map(lambda leaf: leaf[0], phi)
    hidden = jax.jit(functools.partial(model.trunk, split=2))(theta, TOKENS)
    head = jax.jit(functools.partial(model.head, split=2))
    np.testing.assert_array_equal(head(theta, phi, hidden), head(theta, None, hidden))


def test_every_position_sees_every_valid_one_and_no_other(model, theta):
    valid = jnp.ones_like(TOKENS, bool).at[:, 5:].set(False)
    base = logits(model, theta, valid=valid)

    def moved(position):
        changed = logits(model, theta, valid=valid, tokens=TOKENS.at[:, position].set(19))
        return jnp.abs(changed - base)[:, 0].max()

    assert moved(6) == 0
    assert moved(4) > 1e-4


def test_only_relative_positions_matter(model, theta):
    shifted = jnp.arange(7)[None] + jnp.array([[3], [11]])
    np.testing.assert_allclose(
        logits(model, theta, position_ids=shifted), logits(model, theta), atol=1e-5
    )


def test_attend_equals_a_loop():
    query, key, value = (
        jax.random.normal(jax.random.key(i), (2, 5, heads, 4)) for i, heads in enumerate((6, 2, 2))
    )
    ours = attend(query, key, value, None)
    for b, i, h in np.ndindex(2, 5, 6):
        scores = np.asarray(key[b, :, h // 3] @ query[b, i, h]) / 2
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(ours[b, i, h], weights @ value[b, :, h // 3], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "width=16 must be num_heads=3 times an even"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"mask_token_id": 20}, "mask_token_id=20"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"width": -16}, "width=-16"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
