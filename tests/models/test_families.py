"""What all backbones have in common, on a small model of each family."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models import attention
from memdlm_jax.models.config import runs_of
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.typing import Denoiser
from tests.models.small import FAMILIES, MOE, TOKENS, logits, small, theta_of

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = small(request.param)
    return model, theta_of(model)


def test_answers_the_protocol(family):
    assert isinstance(family[0], Denoiser)


def test_the_split_does_not_change_the_model(family):
    model, theta = family
    whole = logits(model, theta, split=model.num_layers)
    for split in (0, 1, model.num_layers - 1):
        np.testing.assert_allclose(logits(model, theta, split=split), whole, atol=1e-6)


def _cuts(jaxpr):
    """Shapes that are sliced out of arrays, anywhere in a program."""
    found = []
    for one in jaxpr.eqns:
        if one.primitive.name == "slice":
            found.append(one.outvars[0].aval.shape)
        for value in one.params.values():
            found += _cuts(value.jaxpr) if hasattr(value, "jaxpr") else []
    return found


def test_beside_a_cache_layers_are_those_of_the_model_and_no_stack_is_cut(family):
    """A part of a stack would be a copy, at every step of decoding."""
    model, theta = family

    def both(theta, split):
        hidden, _ = model.trunk_with_cache(theta, TOKENS, split=split)
        return model.head_with_cache(theta, None, hidden, split=split)[0]

    split = model.num_layers - 1
    want = model.head(theta, None, model.trunk(theta, TOKENS, split=split), split=split)
    found = jax.jit(both, static_argnums=1)(theta, split)
    np.testing.assert_allclose(found, want, atol=1e-6)
    stacks = [leaf.shape[1:] for run in runs_of(model.config) for leaf in jax.tree.leaves(
        theta[run.name]) if leaf.ndim > 2]  # fmt: skip
    program = jax.make_jaxpr(both, static_argnums=1)(theta, split).jaxpr
    assert stacks and not {shape[1:] for shape in _cuts(program)} & set(stacks)
    plain = jax.make_jaxpr(lambda theta: model.trunk(theta, TOKENS, split=split))(theta).jaxpr
    assert {shape[1:] for shape in _cuts(plain)} & set(stacks)


def test_remat_changes_no_gradient():
    plain = small("llada_moe")
    theta = theta_of(plain)

    def loss(remat):
        model = plain.with_config(remat=remat)
        return jax.jit(jax.grad(lambda theta: jnp.sum(logits(model, theta) ** 2)))(theta)

    expected = loss("none")
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for remat in ("full", "dots"):
        found = loss(remat)
        same = jax.tree.map(lambda a, b: jnp.abs(a - b).max() <= 1e-6 * scale, found, expected)
        assert jax.tree.all(same)


def test_remat_of_dots_keeps_products_and_full_keeps_nothing():
    """Told by what the backward pass of the trunk takes from the forward pass."""
    theta = jax.eval_shape(small("llada_moe").init, jax.random.key(0))

    def saved(remat):
        model = small("llada_moe").with_config(remat=remat)

        def residuals(theta):
            return jax.vjp(lambda t: model.trunk(t, TOKENS, split=3), theta)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, theta)))

    assert saved("full") < saved("dots") < saved("none")


def test_the_program_does_not_grow_with_depth(family):
    model, _ = family

    def equations(layers):
        deep = model.with_config(num_layers=layers)
        theta = jax.eval_shape(deep.init, jax.random.key(0))
        text = jax.jit(lambda t: logits(deep, t, split=layers - 1)).lower(theta).as_text()
        return text.count("\n")

    assert equations(12) == equations(4)


def test_compute_in_bfloat16_keeps_logits_and_norms_in_float32(family):
    model, theta = family
    narrow = model.with_config(dtype="bfloat16")
    out = logits(narrow, theta)
    assert out.dtype == jnp.float32
    hidden = jax.eval_shape(lambda theta: narrow.trunk(theta, TOKENS, split=1), theta)
    assert hidden.dtype == jnp.bfloat16
    wide = logits(model, theta)
    assert 0 < jnp.abs(out - wide).mean() < 0.15 * jnp.abs(wide).mean() + 0.05


def test_fast_weights_act_like_a_merged_matrix(family):
    """(W + scale A B) in the base equals the adapted forward pass, in every adaptable matrix.

    In float64: the two round differently, and by how much depends on the processor.
    """
    model, theta = family
    with jax.enable_x64(True):
        model = model.with_config(dtype="float64", param_dtype="float64")
        assert_adapted_equals_merged(model, jax.tree.map(lambda x: x.astype(float), theta))


def assert_adapted_equals_merged(model, theta):
    every = tuple(dict.fromkeys(path.split("/")[-1] for path in model.adaptable()))
    config = MemoryConfig(rank=2, layer_fraction=0.99, target_modules=every)
    phi = fast_weights.init(jax.random.key(1), model, config, groups=1)
    phi = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, float), phi
    )
    runs = {run.name: run for run in runs_of(model.config)}
    merged, count = jax.tree.map(jnp.copy, theta), 0
    for path, delta in jax.tree_util.tree_leaves_with_path(
        phi, is_leaf=fast_weights.is_fast_weight
    ):
        names = [entry.key for entry in path]
        stack = merged[names[0]] if names[0] in runs else merged["layers"]
        for name in names[1 if names[0] in runs else 0 : -1]:
            stack = stack[name]
        # The head of layer_fraction 0.99 begins with layer 0.
        stack["kernel"] = stack["kernel"] + delta.scale * (delta.A @ delta.B)[0]
        count += 1
    assert count == len(model.adaptable())
    adapted = logits(model, theta, phi, split=0)
    expected = logits(model, merged, split=0)
    np.testing.assert_allclose(adapted, expected, rtol=0, atol=1e-12)
    assert jnp.abs(adapted - logits(model, theta)).max() > 0.01


def test_fast_weights_sit_in_the_head_alone(family):
    model, _ = family
    last = model.adaptable(model.num_layers - 1)
    assert last and all(shape[0] == 1 for shape in last.values())
    names = {path.split("/")[-2] for path in last}
    assert "router" not in names
    if type(model).__name__ in ("LLaDAMoE", "LLaDA2"):
        assert {len(shape) for path, shape in last.items() if "/experts/" in path} == {4}


def test_padding_is_seen_by_nobody(family):
    model, theta = family
    valid = jnp.ones(TOKENS.shape, bool).at[:, -2:].set(False)
    before = logits(model, theta, valid=valid)
    after = logits(model, theta, valid=valid, tokens=TOKENS.at[:, -1].set(3))
    # Dream reads the logits of a token at its left neighbour: the last column moves by itself.
    np.testing.assert_array_equal(before[:, :-2], after[:, :-2])


def test_block_causal_attention_sees_no_later_block(family):
    model, theta = family
    block = model.with_config(attention_block=3)
    moved = TOKENS.at[:, 6].set(5)
    before, after = logits(block, theta), logits(block, theta, tokens=moved)
    reach = 6 + (type(model).__name__ == "Dream")
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (jnp.abs(before - after)[:, reach] > 1e-6).any()
    explicit = jnp.asarray(attention.block_causal(TOKENS.shape[1], 3))
    explicit = jnp.broadcast_to(explicit, (TOKENS.shape[0], *explicit.shape))
    np.testing.assert_array_equal(logits(model, theta, valid=explicit), before)


def test_masks_of_block_diffusion():
    with np.load(GOLDEN / "masks.npz") as masks:
        np.testing.assert_array_equal(attention.block_diffusion(12, 4), masks["bd_train_n12_bs4"])
        np.testing.assert_array_equal(attention.block_causal(16, 4), masks["block_causal_16_bs4"])


def test_dream_gives_each_token_the_state_before_it():
    model = small("dream")
    theta = theta_of(model)
    raw = logits(model.with_config(shift=False), theta)
    shifted = logits(model, theta)
    np.testing.assert_array_equal(shifted[:, 1:], raw[:, :-1])
    np.testing.assert_array_equal(shifted[:, 0], raw[:, 0])


def test_runs_of_two_kinds_have_a_stack_each():
    model = small("llada_moe").with_config(num_layers=5, dense_layers=(0, 3))
    runs = runs_of(model.config)
    assert [(run.name, run.length, run.mixture) for run in runs] == [
        ("layers_0", 1, False), ("layers_1", 2, True), ("layers_3", 1, False),
        ("layers_4", 1, True),
    ]  # fmt: skip
    paths = {path.split("/")[0] for path in model.adaptable(split=2)}
    assert paths == {"layers_1", "layers_3", "layers_4"}
    assert model.adaptable(split=2)["layers_1/mlp/experts/up_proj"][0] == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llada_8b", 8_015_581_184),
        ("llada_moe_7b_a1b", 7_356_880_896),
        ("llada2_0_mini", 16_255_643_392),
        ("llada2_1_mini", 16_255_643_392),
        ("dream_7b", 7_615_616_512),
    ],
)
def test_published_sizes(name, count):
    theta = jax.eval_shape(PUBLISHED[name].init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == count


def test_fast_weights_of_the_published_mini_model():
    """Rank 32 in the last two layers: about 126 M values per row (paper, section 5)."""
    model = PUBLISHED["llada2_1_mini"]
    phi = jax.eval_shape(
        lambda key: fast_weights.init(key, model, MemoryConfig(), groups=1), jax.random.key(0)
    )
    per_matrix = 32 * (2048 + 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(phi)) == 2 * 257 * 3 * per_matrix


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada2", {"rotary_channels": 3}, "rotary_channels=3 must be even"),
        ("llada2", {"router_groups": 3}, "groups=3 does not fit"),
        ("llada_moe", {"dense_layers": (9,)}, "dense_layers=.9,. must be layers below"),
        ("llada", {"remat": "some"}, "remat='some' must be one of"),
        ("dream", {"attention_block": -1}, "attention_block=-1 must be at least 0"),
    ],
)
def test_bad_configs(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name).with_config(**changes)


def test_an_unknown_mask_token_is_asked_for_when_it_is_needed():
    model = small("llada_moe").with_config(mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id=None"):
        _ = model.mask_token_id
    assert dataclasses.replace(MOE, mask_token_id=3).mask_token_id == 3
