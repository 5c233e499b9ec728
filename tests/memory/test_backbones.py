"""The inner loop and the meta-gradient on every family of backbones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import fast_weights, meta_gradient
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.written import write_prompt
from memdlm_jax.models import lora
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.quantize import quantized_tree
from memdlm_jax.parameters import Partitioned, partition
from memdlm_jax.training.step import step_keys
from memdlm_jax.typing import Batch
from tests.models.small import FAMILIES, TOKENS, small, theta_of

BATCH = Batch(
    tokens=TOKENS,
    maskable=jnp.arange(9)[None] >= jnp.array([[2], [4]]),
    valid=jnp.ones((2, 9), bool),
)
CONFIG = MemoryConfig(rank=2, alpha=4.0, layer_fraction=0.4, learning_rate=0.1)
# One inner step and one adapted layer: programs that are differentiated twice compile slowly.
LITTLE = dataclasses.replace(CONFIG, steps=1, layer_fraction=0.3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def write(model, config, theta, tokens=TOKENS, valid=BATCH.valid):
    return write_prompt(jax.random.key(1), InnerLoop(model, config), theta, tokens, valid)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = small(request.param)
    return model, theta_of(model)


def test_the_prompt_is_learnt(family):
    """Two steps on one state lower its loss in every row, experts included."""
    model, theta = family
    config = dataclasses.replace(
        CONFIG, masking="no_progressive", epochs=2, learning_rate=0.3, prompt_mask_ratio=0.6
    )
    phi, record = write(model, config, theta)
    assert not record.skipped.any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(phi))
    assert (record.loss[1] < record.loss[0]).all()


def outer(model, config, theta, dtype=None):
    """Outer loss as a function of theta on drawn states."""
    schedule, loop = LinearSchedule(0.5, "low_discrepancy"), InnerLoop(model, config)
    phi_key, anchor_key, *keys = step_keys(jax.random.key(3))
    anchor = objective.draw_anchor(anchor_key, BATCH, model.mask_token_id, schedule)
    phi, trajectory = loop.draw((phi_key, *keys), BATCH, anchor, schedule)
    if dtype:
        phi = jax.tree.map(lambda leaf: leaf.astype(dtype), phi)
    return lambda theta: meta_gradient.outer_loss(loop, theta, None, phi, trajectory, anchor)[0]


def test_training_with_memory_has_finite_gradients(family):
    model, theta = family
    gradient = jax.jit(jax.grad(outer(model, LITTLE, theta)))(theta)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def doubled(model, theta):
    wide = model.with_config(dtype="float64", param_dtype="float64")
    return wide, jax.tree.map(lambda leaf: leaf.astype("float64"), theta)


@pytest.mark.usefixtures("wide")
def test_exact_gradients_through_experts_equal_the_dense_oracle():
    """Per-example fast weights on every expert, differentiated twice, in float64.

    The oracle computes all experts and needs neither sorting, nor grouping, nor our primitives.
    """
    config = dataclasses.replace(LITTLE, meta_gradient="exact")
    model = small("llada_moe")
    model, theta = doubled(model, theta_of(model))
    found, expected = (
        jax.jit(jax.grad(outer(one, config, theta, "float64")))(theta)
        for one in (model, model.with_config(dispatch="dense"))
    )
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.usefixtures("wide")
def test_a_row_adapts_whatever_stands_beside_it():
    """Experts of all rows are computed together; what a row writes is its own."""
    model = small("llada_moe")
    model, theta = doubled(model, theta_of(model))

    both = write(model, LITTLE, theta)[0]
    # Beside nothing but padding.
    alone = write(model, LITTLE, theta, TOKENS, BATCH.valid.at[1].set(False))[0]
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6, atol=1e-9)
    assert any(
        (a[1] != b[1]).any() for a, b in zip(*map(jax.tree.leaves, (both, alone)), strict=True)
    )


class TestFrozenBase:
    """Adapters over a frozen base: only they get a gradient, and it is the right one."""

    @pytest.fixture
    def model(self):
        return small("llada")

    def adapted(self, model, narrow):
        theta = theta_of(model)
        if narrow:
            theta = quantized_tree(theta, "int8", lambda p: p.endswith("up_proj/kernel"), 8)
        return lora.add(jax.random.key(1), model, theta, LoraConfig(rank=2, dropout=0.0))

    @pytest.mark.parametrize("mode", ["first_order", "exact"])
    def test_gradients_are_those_of_the_whole_theta(self, model, mode):
        config = dataclasses.replace(LITTLE, meta_gradient=mode)
        theta = self.adapted(model, narrow=False)
        theta = jax.tree.map(lambda leaf: leaf + 0.01, theta)
        parts = partition(theta, lora.is_adapter)
        loss = outer(model, config, theta)
        whole = partition(jax.jit(jax.grad(loss))(theta), lora.is_adapter).trainable

        def frozen_loss(trainable):
            return loss(Partitioned(trainable, parts.frozen))

        found = jax.jit(jax.grad(frozen_loss))(parts.trainable)
        scale = max(jnp.abs(leaf).max() for leaf in whole.values())
        assert found.keys() == whole.keys() and scale > 0
        for name in whole:
            np.testing.assert_allclose(found[name], whole[name], atol=3e-5 * scale)

    def test_exact_gradients_over_codes(self, model):
        """Codes have no derivative, in the inner rule's backward pass neither."""
        config = dataclasses.replace(LITTLE, meta_gradient="exact")
        theta = self.adapted(model, narrow=True)
        theta = lora.with_dropout(theta, jax.random.key(5))
        parts = partition(theta, lora.is_adapter)
        loss = outer(model, config, theta)

        @jax.jit
        def gradient(trainable):
            return jax.grad(lambda t: loss(Partitioned(t, parts.frozen)))(trainable)

        found = gradient(parts.trainable)
        assert all(jnp.isfinite(leaf).all() for leaf in found.values())
        assert sum(bool(leaf.any()) for leaf in found.values()) >= len(found) // 2

    def test_fast_weights_sit_on_top_of_adapters(self, model):
        theta = self.adapted(model, narrow=True)
        phi, record = write(model, CONFIG, theta)
        assert not record.skipped.any()
        assert fast_weights.number_of_groups(phi) == 2
