"""Products that need not be taken: memory added to the base, and memory that is still empty."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import meta_gradient, shortcuts
from memdlm_jax.memory.fast_weights import Dense, LowRank
from memdlm_jax.memory.shortcuts import Fused
from memdlm_jax.models.layers import Linear
from memdlm_jax.training import flops
from tests.memory.test_backbones import BATCH, LITTLE
from tests.memory.tiny import assert_close
from tests.models.small import small

pytestmark = pytest.mark.usefixtures("wide")


def outer(config, is_fresh, remat="none"):
    """Loss, sums, gradient, and the FLOPs of all, in float64."""
    both, theta = program(config, is_fresh, remat)
    return jax.jit(both)(theta), flops.matmul_flops(both, theta)


def program(config, is_fresh, remat="none"):
    """(theta -> loss, sums and gradient), theta."""
    model = small("llada").with_config(dtype="float64", param_dtype="float64", remat=remat)
    theta = model.init(jax.random.key(0))
    phi, *states = meta_gradient.draw(
        jax.random.key(3), model, config, BATCH, LinearSchedule(0.5, "low_discrepancy")
    )
    phi = jax.tree.map(lambda leaf: leaf.astype(float), phi)

    def loss(theta):
        return meta_gradient.outer_loss(
            model, config, theta, phi, BATCH, *states, is_fresh=is_fresh
        )

    return jax.value_and_grad(loss, has_aux=True), theta


def test_one_memory_is_added_to_the_base(monkeypatch):
    """With derivatives in it, too."""
    config = dataclasses.replace(LITTLE, meta_gradient="exact", scope="global", rank=4, alpha=8.0)
    ours, fewer = outer(config, False)
    monkeypatch.setattr(meta_gradient, "_is_fused", lambda *_: False)
    plain, more = outer(config, False)
    assert_close(ours, plain, 1e-12)
    assert ours[0][1].phi_change > 1e-3
    assert fewer < more


def test_an_empty_memory_costs_less():
    """Two steps; only the first one begins with B = 0. Of three layers one stands under a scan."""
    config = dataclasses.replace(LITTLE, meta_gradient="first_order", steps=2, layer_fraction=1.0)
    ours, fewer = outer(config, True)
    plain, more = outer(config, False)
    assert_close(ours, plain, 1e-13)
    assert (ours[0][1].inner.gradient_norm > 1e-3).all()
    assert fewer < more


def test_an_empty_memory_costs_less_where_layers_run_again():
    config = dataclasses.replace(LITTLE, meta_gradient="first_order", layer_fraction=0.3)
    fewer, more = (flops.matmul_flops(*program(config, x, "full")) for x in (True, False))
    assert fewer < more


def test_the_exact_gradient_takes_nothing_for_granted():
    """Its inner gradient is differentiated in A, too."""
    config = dataclasses.replace(LITTLE, meta_gradient="exact")
    same, cost = (flops.matmul_flops(*program(config, fresh)) for fresh in (True, False))
    assert same == cost


@pytest.mark.parametrize(
    ("rows", "dtype", "added"),
    [(7, "float32", True), (6, "float32", False), (7, "bfloat16", False)],
)
def test_where_it_saves_nothing_or_would_be_rounded_it_stays_apart(rows, dtype, added):
    """8 x 24 pays from more than 6 rows on: rows (8 + 24) > 8 * 24."""
    rng = np.random.default_rng(0)
    a, b, kernel, x = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((8, 2), (2, 24), (8, 24), (rows, 8))
    )
    delta, x = Fused(LowRank(a, b, 2.0)), x.astype(dtype)
    linear = Linear(24, jax.nn.initializers.zeros, jnp.float32)
    apply = functools.partial(
        linear.apply, {"params": {"kernel": kernel}, "fast": {"delta": delta}}
    )
    products = [e for e in jax.make_jaxpr(apply)(x).eqns if e.primitive.name == "dot_general"]
    assert len(products) == (2 if added else 3)
    expected = x.astype(float) @ (kernel.astype(float) + 2 * a.astype(float) @ b.astype(float))
    tolerance = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(apply(x).astype(float), expected, tolerance, tolerance)


def test_experts_share_the_rows():
    a, b, kernel = jnp.ones((3, 8, 2)), jnp.ones((3, 2, 24)), jnp.ones((3, 8, 24))
    delta = Fused(LowRank(a, b, 0.5))
    assert delta.added_to(kernel, 3 * 6) is None
    np.testing.assert_array_equal(delta.added_to(kernel, 3 * 6 + 1), 2 * kernel)


def test_a_dense_memory_is_always_added():
    kernel = jnp.ones((3, 2))
    np.testing.assert_array_equal(Fused(Dense(2 * kernel)).added_to(kernel, 1), 3 * kernel)


def test_fresh_leaves_alone_what_it_does_not_know():
    known = LowRank(jnp.ones((1, 2, 3, 4)), jnp.zeros((1, 2, 4, 5)), 1.0)
    experts = LowRank(jnp.ones((1, 2, 6, 3, 4)), jnp.zeros((1, 2, 6, 4, 5)), 1.0)
    phi = {"a": known, "b": experts, "c": Dense(jnp.zeros((1, 2, 3, 5)))}
    found = shortcuts.fresh(phi)
    assert [type(leaf).__name__ for leaf in found.values()] == ["Fresh", "LowRank", "Dense"]
    assert jax.tree.structure(shortcuts.unwrapped(found)) == jax.tree.structure(phi)
