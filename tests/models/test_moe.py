"""Routers and dispatch against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memdlm_jax.models import moe
from memdlm_jax.models.moe import Mixture, MixtureSpec

SOFTMAX = MixtureSpec(num_experts=6, experts_per_token=2, features=5)
SIGMOID = MixtureSpec(
    num_experts=8, experts_per_token=3, features=5, shared_features=4, score="sigmoid",
    use_selection_bias=True, groups=4, kept_groups=2, renormalise=True, scale=2.5,
)  # fmt: skip
WIDTH, TOKENS = 7, 12


def chosen_by_hand(spec, logits, bias):
    """One token at a time: what the published routers do, step by step."""
    found = []
    for row in np.asarray(logits, np.float64):
        exponent = np.exp(row - row.max())
        scores = exponent / exponent.sum() if spec.score == "softmax" else 1 / (1 + np.exp(-row))
        ranked = scores + (0 if bias is None else np.asarray(bias))
        groups = ranked.reshape(spec.groups, -1)
        best = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
        kept = np.argsort(-best, kind="stable")[: spec.kept_groups]
        allowed = [e for e in range(spec.num_experts) if e // groups.shape[1] in kept]
        index = sorted(allowed, key=lambda e: -ranked[e])[: spec.experts_per_token]
        weights = scores[index]
        if spec.renormalise:
            weights = weights / weights.sum()
        found.append((index, weights * spec.scale))
    return np.array([i for i, _ in found]), np.array([w for _, w in found])


@pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_the_router_equals_a_loop(spec):
    logits = jax.random.normal(jax.random.key(0), (40, spec.num_experts)) * 2
    bias = None
    if spec.use_selection_bias:
        bias = jax.random.normal(jax.random.key(1), (spec.num_experts,)) * 0.5
    index, weights = moe.choose(spec, logits, bias)
    expected_index, expected_weights = chosen_by_hand(spec, logits, bias)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    if spec.score == "softmax":
        assert (weights.sum(-1) < 0.99).all(), "raw probabilities do not sum to 1"


def test_the_bias_chooses_and_does_not_weigh():
    logits = jnp.zeros((1, 8)).at[0, 0].set(3.0)
    bias = jnp.zeros(8).at[7].set(5.0)
    spec = dataclasses.replace(SIGMOID, experts_per_token=1, groups=1, kept_groups=1)
    index, weights = moe.choose(spec, logits, bias)
    assert index.item() == 7
    assert weights.item() == pytest.approx(0.5 * 2.5)  # one weight alone is not divided by itself


def test_the_choice_has_no_derivative_and_the_weights_have():
    logits = jax.random.normal(jax.random.key(0), (3, 8))
    bias = jnp.linspace(0, 0.1, 8)

    def total(logits, bias):
        return jnp.sum(moe.choose(SIGMOID, logits, bias)[1] * jnp.arange(3.0))

    by_logits, by_bias = jax.grad(total, (0, 1))(logits, bias)
    assert not by_bias.any() and by_logits.any()


def mixture(spec, dtype=jnp.float32):
    init = nn.initializers.normal(0.5)
    module = Mixture(spec, init, init, dtype)
    x = jax.random.normal(jax.random.key(0), (2, TOKENS // 2, WIDTH))
    return module, module.init(jax.random.key(1), x), x


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(spec, variables, x):
    """Every token through its experts, one after the other."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    tokens = np.asarray(x, np.float64).reshape(-1, WIDTH)
    logits = tokens @ params["router"]["gate"]["kernel"]
    index, weights = chosen_by_hand(spec, logits, params["router"].get("selection_bias"))

    def ffn(part, token, *expert):
        kernels = [params[part][n]["kernel"] for n in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = (kernel[expert] for kernel in kernels)
        return (silu(token @ gate) * (token @ up)) @ down

    out = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        for e, w in zip(index[t], weights[t], strict=True):
            out[t] += w * ffn("experts", token, e)
        if spec.shared_features:
            out[t] += ffn("shared_experts", token)
    return out.reshape(x.shape)


@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
@pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_the_mixture_equals_a_loop(spec, dispatch):
    module, variables, x = mixture(dataclasses.replace(spec, dispatch=dispatch))
    with jax.default_matmul_precision("highest"):
        y = module.apply(variables, x)
    np.testing.assert_allclose(y, by_hand(spec, variables, x), atol=2e-5)


def test_a_sigmoid_router_takes_float32_whatever_the_activations():
    module, variables, x = mixture(SIGMOID, jnp.bfloat16)
    narrow = x.astype(jnp.bfloat16)
    _, sown = module.apply(variables, narrow, mutable=["intermediates"])
    logits = sown["intermediates"]["router"]["router_logits"][0]
    kernel = variables["params"]["router"]["gate"]["kernel"].astype(jnp.float32)
    assert logits.dtype == jnp.float32
    expected = narrow.astype(jnp.float32).reshape(-1, WIDTH) @ kernel
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_token_pays_for_its_own_experts_only():
    """The traced program multiplies k experts a token, the dense one all of them."""
    from memdlm_jax.training.flops import matmul_flops

    spec = dataclasses.replace(SOFTMAX, num_experts=64)
    module, variables, x = mixture(spec)
    dense = Mixture(dataclasses.replace(spec, dispatch="dense"), *(module.kernel_init,) * 2, None)

    def flops(module):
        return matmul_flops(lambda v, x: module.apply(v, x), variables, x)

    experts = 2 * 3 * WIDTH * spec.features * TOKENS * spec.experts_per_token
    rest = 2 * WIDTH * 64 * TOKENS + 2 * TOKENS * spec.experts_per_token * WIDTH
    assert flops(module) == experts + rest
    assert flops(dense) > 20 * flops(module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "groups=3 does not fit num_experts=8"),
        ({"kept_groups": 5}, "kept_groups=5 does not fit"),
        ({"experts_per_token": 5}, "experts_per_token=5 does not fit"),
        ({"features": 0}, "features=0 must be at least 1"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIGMOID, **changes)
