"""The FLOP count of a traced program, against hand counts."""

import jax
import jax.numpy as jnp
import pytest

from memdlm_jax.models.grouped import grouped_matmul, grouped_outer
from memdlm_jax.training.flops import matmul_flops
from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.speed import Speed, peak_flops
from tests.training import tiny


def test_a_scan_counts_as_often_as_it_runs():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    assert matmul_flops(scanned, x, w) == 5 * 2 * 3 * 4 * 4
    gradient = jax.grad(lambda w: jax.jit(jax.checkpoint(scanned))(x, w).sum())
    assert matmul_flops(gradient, w) >= 3 * 5 * 2 * 3 * 4 * 4


def test_what_nothing_depends_on_does_not_count():
    def function(x):
        def body(carry, _):
            unread = x @ carry[1]
            return (x @ carry[0], unread), None

        return jax.lax.scan(body, (x, x), length=3)[0][0]

    assert matmul_flops(function, jnp.ones((4, 4))) == 3 * 2 * 4**3


def test_a_conditional_counts_its_costliest_branch():
    def function(x, flag):
        return jax.lax.cond(flag, lambda: x @ x, lambda: x)

    assert matmul_flops(function, jnp.ones((4, 4)), True) == 2 * 4**3


def test_a_ragged_product_counts_each_row_once():
    def loss(x, w):
        return (jax.lax.ragged_dot(x, w, jnp.array([1, 2, 3])) ** 2).sum()

    x, w = jnp.ones((6, 4)), jnp.ones((3, 4, 5))
    assert matmul_flops(loss, x, w) == 2 * 6 * 4 * 5
    assert matmul_flops(jax.grad(loss, (0, 1)), x, w) == 3 * 2 * 6 * 4 * 5


def test_a_grouped_product_counts_each_row_once():
    def loss(x, w):
        return (grouped_matmul(x, w, jnp.array([2, 0, 0, 1, 2, 2])) ** 2).sum()

    x, w = jnp.ones((6, 4)), jnp.ones((3, 4, 5))
    assert matmul_flops(loss, x, w) == 2 * 6 * 4 * 5
    assert matmul_flops(jax.grad(loss, (0, 1)), x, w) == 3 * 2 * 6 * 4 * 5
    assert matmul_flops(jax.vmap(loss, (0, None)), jnp.ones((7, 6, 4)), w) == 7 * 2 * 6 * 4 * 5

    def outer(x, y):
        return grouped_outer(x, y, jnp.zeros(6, int), num_groups=3)

    assert matmul_flops(outer, x, jnp.ones((6, 5))) == 2 * 6 * 4 * 5


def test_utilisation_is_of_the_devices_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") is None
    steps = CompiledSteps(tiny.setup(), lambda length: length)
    for peak in (0.0, 1e9):
        speed = Speed(steps, peak)
        speed.count(tiny.fresh_state(), tiny.batch(rows=2, length=8))
        rates = speed.since_last_report(9)
        assert ("speed/model_flop_utilisation" in rates) == (peak > 0)
    devices = len(jax.local_devices())
    expected = rates["speed/matmul_flops_per_second"] / 1e9 / devices
    assert rates["speed/model_flop_utilisation"] == pytest.approx(expected)


def test_without_a_count_the_step_is_not_traced(monkeypatch):
    steps = CompiledSteps(tiny.setup(tiny.MEMORY), lambda length: length)
    monkeypatch.setattr(steps, "inner_loop_share", None)
    speed = Speed(steps, 1e9, count_flops=False)
    speed.count(tiny.fresh_state(), tiny.batch(rows=2, length=8))
    assert list(speed.since_last_report(9)) == ["speed/tokens_per_second"]


def test_model_flops_leave_out_what_remat_computes_again():
    setup = tiny.setup(tiny.MEMORY)
    again = setup.denoiser.with_config(remat="full", vocab_chunk=7)
    found = [
        CompiledSteps(setup.with_denoiser(d), lambda length: length)
        .inner_loop_share(tiny.fresh_state(), tiny.batch(rows=2, length=8))
        for d in (setup.denoiser, again)
    ]  # fmt: skip
    assert found[0] == found[1]


def test_the_plain_step_is_three_times_its_forward_products():
    steps = CompiledSteps(tiny.setup(), lambda length: length)
    batch = tiny.batch(rows=2, length=8)
    flops, share = steps.inner_loop_share(tiny.fresh_state(), batch)
    layer = 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32  # q, o; k, v with one head of two; SwiGLU
    attention = 2 * 8 * 16  # scores and values, per token
    forward = 2 * 2 * 8 * (2 * (layer + attention) + 16 * 40)
    assert flops == 3 * forward and share == 0.0


def test_the_inner_loop_has_its_share():
    steps = CompiledSteps(tiny.setup(tiny.MEMORY), lambda length: length)
    _, share = steps.inner_loop_share(tiny.fresh_state(), tiny.batch(rows=2, length=8))
    assert 0.2 < share < 0.8
