"""The head at some positions is the head, picked at these positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.objective import head_at
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.training import flops
from memdlm_jax.typing import EVERYTHING, Context
from tests.models.small import FAMILIES, TOKENS, theta_of

AT = jnp.array([[0, 3, 8, 8], [1, 0, 5, 2]])
VALID = jnp.ones(TOKENS.shape, bool).at[1, -2:].set(False)


def random_phi(model, split, modules=("attention", "mlp")):
    """Two groups of fast weights on everything in these modules that can carry them."""
    memory = MemoryConfig(
        rank=2, alpha=4.0, layer_fraction=1 - (split + 0.1) / model.num_layers,
        target_modules=modules,
    )  # fmt: skip
    phi = jax.eval_shape(lambda key: fast_weights.init(key, model, memory, 2), jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape).astype(x.dtype)), phi)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("split", [0, 2, 3])
def test_head_at_is_the_head_at_these_positions(name, split):
    model = FAMILIES[name].with_config(remat="full" if split == 0 else "none")
    theta = theta_of(model)
    if split == 0:
        # With memory in every layer; who sees whom may differ from query to query.
        phi, positions = random_phi(model, split), None
        attend = VALID[:, None, :] & jnp.tril(jnp.ones((9, 9), bool))
    else:
        phi, attend = None, VALID
        positions = jnp.stack([jnp.arange(9), jnp.arange(9) + 3])

    @jax.jit
    def run(theta, phi, attend, positions):
        context = Context(attend, positions)
        hidden = model.trunk(theta, TOKENS, context, split=split)
        rest = (hidden, context)
        head = functools.partial(fast_weights.head_with_memory, model, theta, phi, *rest)
        everywhere = head(split=split)
        return head(split=split, at=AT), jnp.take_along_axis(everywhere, AT[..., None], axis=1)

    got, expected = run(theta, phi, attend, positions)
    assert got.shape == (2, 4, 16)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("split", [1, 2])
def test_what_stands_before_fast_weights_can_be_run_apart(name, split):
    model = FAMILIES[name]
    theta = theta_of(model)
    phi = random_phi(model, split, ("mlp",))
    position_ids = jnp.stack([jnp.arange(9), jnp.arange(9) + 3])

    @jax.jit
    def run(theta, phi):
        rest = (Context(VALID, position_ids),)
        hidden = model.trunk(theta, TOKENS, *rest, split=split)
        entered = model.enter(theta, hidden, AT, *rest, split=split)
        head = functools.partial(fast_weights.head_with_memory, model, theta, split=split, at=AT)
        found = [head(memory, entered, *rest, entered=True) for memory in (None, phi)]
        return entered, found, [head(memory, hidden, *rest) for memory in (None, phi)]

    entered, found, expected = run(theta, phi)
    assert entered.shape == (2, 9 if split == 1 else 4, 16)
    assert np.abs(found[1] - found[0]).max() > 0.01, "the fast weights must matter"
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_only_a_memory_behind_the_first_attention_can_be_entered():
    model = FAMILIES["llada"]
    for modules, can in ((("mlp",), True), (("down_proj",), True), (("mlp", "q_proj"), False)):
        memory = MemoryConfig(layer_fraction=0.3, target_modules=modules)
        assert fast_weights.can_enter(model, memory) == can
    with pytest.raises(TypeError, match="entered=True, but object is no EfficientDenoiser"):
        head_at(object(), None, None, TOKENS, AT, EVERYTHING, split=1, entered=True)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_those_of_the_head(remat):
    model = FAMILIES["dream"].with_config(remat=remat)
    theta, phi = theta_of(model), random_phi(model, 1)

    def total(theta, phi, at):
        context = Context(VALID)
        hidden = model.trunk(theta, TOKENS, context, split=1)
        last = fast_weights.head_with_memory(model, theta, phi, hidden, context, split=1, at=at)
        last = last if at is not None else jnp.take_along_axis(last, AT[..., None], axis=1)
        return jnp.sum(jnp.sin(last))

    ours, want = (jax.jit(jax.grad(total, (0, 1)))(theta, phi, at) for at in (AT, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, want)


def test_the_last_layer_runs_at_the_wanted_positions_alone():
    model = FAMILIES["llada"]
    theta = theta_of(model)
    hidden = jnp.zeros((2, 9, 16))

    def count(at):
        return flops.matmul_flops(
            lambda h: fast_weights.head_with_memory(
                model, theta, None, h, EVERYTHING, split=2, at=at
            ),
            hidden,
        )

    positions, wanted, width = 2 * 9, 2 * 1, 16
    attention = model.config.attention()
    kv = 2 * positions * width * 2 * attention.num_kv_heads * attention.head_dim
    per_wanted = 2 * (2 * width * width + 3 * width * 24)
    scores = 2 * 2 * 9 * width
    assert count(jnp.zeros((2, 1), jnp.int32)) == kv + wanted * (per_wanted + scores)


def test_a_denoiser_without_head_at_runs_its_head():
    class Plain:
        def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
            return hidden * split

    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    found = fast_weights.head_with_memory(
        Plain(), None, None, hidden, EVERYTHING, split=2, at=jnp.array([[3], [0]])
    )
    np.testing.assert_array_equal(found, 2 * np.stack([hidden[0, 3:4], hidden[1, 0:1]]))
