"""The structured initialisation: an ordinary tree that retrieves before any training."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.models import induction
from memdlm_jax.models.attention import rotary
from memdlm_jax.models.induction import InductionInit
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

CONFIG = LLaDAConfig(
    vocab_size=200, width=128, num_layers=4, num_heads=4, num_kv_heads=4, hidden_features=64,
    mask_token_id=1, max_length=64, tied=True,
)  # fmt: skip
MODEL = LLaDA(CONFIG)
COMPILED = types.SimpleNamespace(config=CONFIG, init=jax.jit(MODEL.init))
ROWS, PAIRS = 64, 8
BARE = InductionInit(offsets=(-1,), spreads=(0.0,), noise=0.0, mlp_gain=0.0)
"""The circuit alone: every positional head looks one token back, nothing else is in the way."""


@pytest.fixture(scope="module")
def drawn():
    return induction.init(jax.random.key(0), COMPILED, InductionInit())


@pytest.fixture(scope="module")
def bare():
    return induction.init(jax.random.key(0), COMPILED, BARE)


def test_same_tree_shapes_and_dtypes_as_the_ordinary_init(drawn):
    plain = jax.eval_shape(MODEL.init, jax.random.key(0))
    assert jax.tree.structure(drawn) == jax.tree.structure(plain)
    for ours, ordinary in zip(jax.tree.leaves(drawn), jax.tree.leaves(plain), strict=True):
        assert (ours.shape, ours.dtype) == (ordinary.shape, ordinary.dtype)
        assert np.isfinite(ours).all()


def test_keeps_the_dtype_of_the_parameters():
    def init(key):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), COMPILED.init(key))

    narrow = types.SimpleNamespace(config=CONFIG, init=init)
    theta = induction.init(jax.random.key(0), narrow, InductionInit())
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype(jnp.bfloat16)}


def test_the_key_decides(drawn):
    again, other = (induction.init(jax.random.key(k), COMPILED, InductionInit()) for k in (0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(drawn)))
    assert (other["embedding"] != drawn["embedding"]).any()
    queries = (theta["layers"]["attention"]["q_proj"]["kernel"] for theta in (other, drawn))
    assert not np.array_equal(*queries)


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ({"matching_layers": (2, 4)}, {}, r"matching_layers=\(2, 4\)"),
        ({"matching_layers": ()}, {}, r"matching_layers=\(\)"),
        ({"positional_layer": 2}, {}, "positional_layer=2"),
        ({"positional_layer": -1}, {}, "positional_layer=-1"),
        ({}, {"num_layers": 3}, "num_layers=3"),
        ({}, {"tied": False}, "tied model"),
        ({}, {"num_kv_heads": 2}, "num_kv_heads == num_heads"),
        ({"written_channels": 122}, {}, "written_channels=122"),
        ({"written_channels": 3}, {}, "written_channels=3 must hold num_heads=4"),
        ({"written_channels": 80}, {"num_heads": 1, "num_kv_heads": 1}, "written_channels=80"),
        ({"written_channels": 4}, {"width": 16}, "no rotary channel"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(settings, config, message):
    model = LLaDA(dataclasses.replace(CONFIG, **config))
    with pytest.raises(ValueError, match=message):
        induction.init(jax.random.key(0), model, InductionInit(**settings))


@pytest.fixture(scope="module")
def lists():
    """(tokens [rows, l], position of the right value, the values): random lists and a question.

    ``. . . k1 v1 . . . k2 v2 ... . . kj <mask>``: the mask stands where vj would.
    """
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(np.arange(10, 200))[: 5 * PAIRS + 4] for _ in range(ROWS)])
    asked = rng.integers(PAIRS, size=ROWS)
    tokens[:, -2] = tokens[np.arange(ROWS), 5 * asked + 3]
    tokens[:, -1] = CONFIG.mask_token_id
    return jnp.asarray(tokens), 5 * asked + 4, tokens[:, 4 : 5 * PAIRS : 5]


@jax.jit
def attention_from_the_mask(theta, tokens):
    """[layers, rows, heads, l]: where the last position looks, layer by layer."""
    looks = []
    for layer in range(CONFIG.num_layers):
        hidden = MODEL.trunk(theta, tokens, split=layer)
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], theta["layers"]["attention"])
        size = jnp.sqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + CONFIG.norm_epsilon)

        def project(name, x=hidden / size, own=own):
            heads = (x @ own[name]["kernel"]).reshape(*x.shape[:2], CONFIG.num_heads, -1)
            return rotary(heads, jnp.arange(x.shape[1])[None], CONFIG.rope_theta)

        query, key = project("q_proj")[:, -1], project("k_proj")
        scores = jnp.einsum("bhd,blhd->bhl", query, key) / query.shape[-1] ** 0.5
        looks.append(jax.nn.softmax(scores))
    return jnp.stack(looks)


def at_the_right_value(theta, lists):
    """[matching layers, heads]: mean attention from the mask to the value asked for."""
    tokens, right, _ = lists
    looks = np.asarray(attention_from_the_mask(theta, tokens))
    return looks[2:][:, np.arange(ROWS), :, right].mean(0)


def test_positional_heads_look_at_their_offsets(bare, drawn, lists):
    tokens = lists[0]
    for theta, offsets in ((bare, (-1, -1, -1, -1)), (drawn, InductionInit().offsets[:2])):
        looks = np.asarray(attention_from_the_mask(theta, tokens))[0].mean(0)
        for head, offset in enumerate(offsets):
            assert looks[head].argmax() == tokens.shape[1] - 1 + offset
            assert looks[head].max() > 0.3


def test_matching_heads_find_the_value_before_any_training(bare, lists):
    """Every head of the bare circuit; on average over draws, also under the noise of training."""
    chance = 1 / lists[0].shape[1]
    assert at_the_right_value(bare, lists).min() > 4 * chance
    keys = [jax.random.key(k) for k in range(4)]
    noisy = [induction.init(key, COMPILED, InductionInit()) for key in keys]
    plain = [COMPILED.init(key) for key in keys]
    ours, ordinary = (
        np.mean([at_the_right_value(theta, lists) for theta in thetas]) / chance
        for thetas in (noisy, plain)
    )
    assert ours > 1.5 > 1.2 > ordinary


def test_the_value_found_is_copied(bare, lists):
    """The bare circuit ranks the right value first among eight about every second time."""
    tokens, right, values = lists
    hidden = MODEL.trunk(bare, tokens, split=CONFIG.num_layers)
    logits = np.asarray(MODEL.readout(bare, hidden[:, -1:]))[:, 0]
    best = np.take_along_axis(logits, values, axis=1).argmax(-1)
    found = values[np.arange(ROWS), best] == np.asarray(tokens)[np.arange(ROWS), right]
    assert found.mean() > 2.5 / PAIRS
