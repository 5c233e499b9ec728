"""Outer adapters: what they compute, what they hit, how they merge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.models import lora
from memdlm_jax.models.lora import Adapted, LoraConfig
from memdlm_jax.models.quantize import quantize, quantized_tree
from memdlm_jax.parameters import merged, partition
from tests.models.small import FAMILIES, logits, small, theta_of

CONFIG = LoraConfig(rank=2, alpha=3.0, dropout=0.0)


@functools.cache
def adapted_of(name):
    """A model, its plain theta, and one with adapters, fresh and with B that is not zero."""
    model = small(name)
    theta = theta_of(model)
    fresh = add(theta, model, CONFIG)
    return model, theta, fresh, perturbed(fresh)


@pytest.fixture(scope="module", params=FAMILIES)
def adapted(request):
    return adapted_of(request.param)


@functools.partial(jax.jit, static_argnums=(1, 2))
def add(theta, model, config):
    return lora.add(jax.random.key(1), model, theta, config)


def perturbed(theta):
    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("/kernel/B"):
            return x
        return jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape) * 0.3, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, theta)


def test_fresh_adapters_are_the_identity_to_the_bit(adapted):
    model, theta, fresh, _ = adapted
    np.testing.assert_array_equal(logits(model, fresh), logits(model, theta))


def test_adapters_act_like_merged_matrices(adapted):
    model, theta, _, changed = adapted
    with jax.default_matmul_precision("highest"):
        found, expected = logits(model, changed), logits(model, jax.jit(lora.merge)(changed))
    np.testing.assert_allclose(found, expected, atol=5e-5)
    assert jnp.abs(found - logits(model, theta)).max() > 0.01


def test_all_linear_is_what_peft_hits(adapted):
    model, theta, fresh, _ = adapted
    hit = {p for p, leaf in lora.kernels(fresh).items() if isinstance(leaf, Adapted)}
    left = set(lora.kernels(theta)) - hit
    routers = {path for path in left if "/router/" in path}
    assert left == routers
    assert bool(routers) == (type(model).__name__ == "LLaDA2")
    assert not isinstance(fresh.get("unembedding"), Adapted)


# LLaDA2 has dense layers, experts and a router without an adapter.
@pytest.mark.parametrize("name", ["dream", "llada2"])
def test_a_quantised_base_stays_quantised(name):
    model, theta, *_ = adapted_of(name)
    narrow = quantized_tree(theta, "int8", lambda p: p.endswith("kernel") and "router" not in p, 8)
    changed = perturbed(add(narrow, model, CONFIG))
    with jax.default_matmul_precision("highest"):
        found, expected = logits(model, changed), logits(model, jax.jit(lora.merge)(changed))
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_partition_and_merged_are_inverse(adapted):
    *_, changed = adapted
    parts = partition(changed, lora.is_adapter)
    assert set(parts.trainable) == {
        f"{path}/{side}"
        for path, leaf in lora.kernels(changed).items()
        if isinstance(leaf, Adapted)
        for side in "AB"
    }
    assert jax.tree.structure(merged(parts)) == jax.tree.structure(changed)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, merged(parts), changed))


@pytest.mark.parametrize("name", ["dream", "llada_moe"])
def test_a_partitioned_theta_is_the_same_model(name):
    model, *_, changed = adapted_of(name)
    parts = partition(changed, lora.is_adapter)
    np.testing.assert_array_equal(logits(model, parts), logits(model, changed))


def test_targets_by_parts_of_paths():
    model = small("llada_moe")
    theta = jax.eval_shape(model.init, jax.random.key(0))

    def hit(*modules):
        config = dataclasses.replace(CONFIG, target_modules=modules)
        return [path.removeprefix("layers/") for path in lora.targets(model, theta, config)]

    assert hit("q_proj", "router") == [
        "attention/q_proj/kernel", "mlp/router/gate/kernel"
    ]  # fmt: skip
    assert hit("mlp/experts/up_proj") == ["mlp/experts/up_proj/kernel"]
    with pytest.raises(ValueError, match=r"target_modules has 'ff_out', which no matrix"):
        hit("q_proj", "ff_out")


def test_the_router_of_llada2_takes_no_adapter():
    model = small("llada2")
    theta = jax.eval_shape(model.init, jax.random.key(0))
    config = dataclasses.replace(CONFIG, target_modules=("router",))
    with pytest.raises(ValueError, match="its router is no linear layer"):
        lora.targets(model, theta, config)


def test_scale():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, use_rslora=True).scale == 2.0


def test_twice_is_refused():
    model = small("llada")
    theta = lora.add(jax.random.key(0), model, theta_of(model), CONFIG)
    with pytest.raises(ValueError, match="carries an adapter already"):
        lora.add(jax.random.key(0), model, theta, CONFIG)


class TestDropout:
    def matrices(self, stack=()):
        base = jnp.zeros((*stack, 6, 4))
        a = jnp.ones((*stack, 6, 2))
        return Adapted(base, a, jnp.ones((*stack, 2, 4)), scale=0.5, dropout=0.25)

    def test_inputs_are_dropped_and_the_rest_scaled_up(self):
        adapted = dataclasses.replace(self.matrices(), key=jax.random.key(3))
        y = adapted(jnp.ones((1000, 6)), jnp.matmul)
        # Each row: kept inputs / 0.75, summed by A, by B over rank 2, times 0.5.
        kept = jax.random.bernoulli(jax.random.key(3), 0.75, (1000, 6)).sum(1)
        np.testing.assert_allclose(y[:, 0], kept / 0.75, rtol=1e-5)

    def test_every_matrix_and_layer_draws_alone(self):
        theta = {"layers": {n: {"kernel": self.matrices((3,))} for n in ("up", "down")}}
        dropped = lora.with_dropout(theta, jax.random.key(0))
        keys = [jax.random.key_data(dropped["layers"][n]["kernel"].key) for n in ("up", "down")]
        assert len({tuple(key) for key in np.concatenate(keys).tolist()}) == 6
        again = lora.with_dropout(theta, jax.random.key(0))
        assert (jax.random.key_data(again["layers"]["up"]["kernel"].key) == keys[0]).all()

    def test_without_dropout_nothing_changes(self):
        plain = dataclasses.replace(self.matrices((3,)), dropout=0.0)
        theta = {"layers": {"up": {"kernel": plain}}}
        assert lora.with_dropout(theta, jax.random.key(0))["layers"]["up"]["kernel"].key is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must be in \[0, 1\)"),
        ({"target_modules": ()}, r"lora.target_modules=\(\) must be non-empty"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_merging_keeps_the_dtype_of_the_base():
    kernel = jax.random.normal(jax.random.key(0), (3, 8, 4), jnp.bfloat16)
    a, b = jnp.ones((3, 8, 2)), jnp.ones((3, 2, 4))
    theta = {"layers": {"up": {"kernel": Adapted(kernel, a, b, scale=0.25)}}}
    found = lora.merge(theta)["layers"]["up"]["kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, (kernel.astype(jnp.float32) + 0.5).astype(jnp.bfloat16))
    narrow = {"layers": {"up": {"kernel": quantize(kernel, "int8", 8)}}}
    assert lora.merge(narrow)["layers"]["up"]["kernel"].dtype == jnp.float32
