"""Our numbers against those of the public code (tests/golden/README.md)."""

import functools

import jax
import jax.numpy as jnp
import pytest

from memdlm_jax.memory import meta_gradient
from tests.memory import golden

CASES = ["default_f64", "b1_row0_f64", "clip_off_f64", "adapter_full_f64", "K1_f64", "default_f32"]


@functools.cache
def replay(case, mode="first_order"):
    """(outer loss, sums, gradient) of one recorded case under one meta-gradient."""
    arrays, settings = golden.load(case)
    model, config = golden.denoiser(settings), golden.memory_config(settings, meta_gradient=mode)
    batch = golden.batch(arrays)
    phi = golden.as_phi(golden.phi_after(arrays, 0, settings), settings)
    anchor, trajectory = golden.states(arrays, settings)

    @jax.jit
    def run(theta):
        def loss(theta):
            total, sums = meta_gradient.outer_loss(
                model, config, theta, phi, batch, anchor, trajectory
            )
            return total / batch.maskable.sum(), sums

        return jax.value_and_grad(loss, has_aux=True)(theta)

    (loss, sums), gradient = run(golden.base_theta(settings))
    return loss, sums, golden.published_names(gradient, model.num_layers)


def tolerance(case):
    return 1e-9 if case.endswith("f64") else 2e-5


@pytest.mark.parametrize("case", CASES)
class TestFirstOrder:
    @pytest.fixture(autouse=True)
    def dtype(self, case):
        with jax.enable_x64(case.endswith("f64")):
            yield

    def test_losses(self, case):
        arrays, _ = golden.load(case)
        loss, sums, _ = replay(case)
        assert golden.relative(loss, arrays["outer_loss"]) <= tolerance(case)
        assert golden.relative(sums.inner.loss[:, 0], arrays["inner_loss"]) <= tolerance(case)
        norms = sums.inner.gradient_norm[:, 0]
        assert golden.relative(norms, arrays["inner_grad_norm"]) <= tolerance(case)
        assert not sums.inner.skipped.any()

    def test_fast_weights(self, case):
        arrays, settings = golden.load(case)
        _, sums, _ = replay(case)
        final = golden.phi_after(arrays, settings["num_inner_updates"], settings)
        for module, leaves in final.items():
            for name, theirs in leaves.items():
                ours = getattr(sums.phi["mlp"][module]["delta"], name)[0]
                assert golden.relative(ours, theirs) <= tolerance(case), (module, name)

    def test_gradient_of_every_parameter(self, case):
        arrays, _ = golden.load(case)
        _, _, gradient = replay(case)
        names = {k.removeprefix("outer_grad/") for k in arrays if k.startswith("outer_grad/")}
        assert names == set(gradient)
        for name in names:
            theirs = arrays[f"outer_grad/{name}"]
            assert golden.relative(gradient[name], theirs) <= tolerance(case), name


def test_memory_off_is_the_plain_model(float64):
    arrays, settings = golden.load("default_f64")
    model, theta = golden.denoiser(settings), golden.base_theta(settings)
    hidden = model.trunk(theta, jnp.asarray(arrays["x_t"]), split=2)
    logits = model.readout(theta, model.head(theta, None, hidden, split=2))
    assert golden.relative(logits, arrays["base_logits_xt"]) <= 1e-12


@pytest.mark.parametrize("case", ["second_order_b1_clip1_f64", "second_order_b3_clipoff_f64"])
def test_exact_meta_gradient(case, float64):
    arrays, _ = golden.load(case)
    loss, _, gradient = replay(case, "exact")
    assert golden.relative(loss, arrays["outer_loss"]) <= 1e-9
    for name, ours in gradient.items():
        assert golden.relative(ours, arrays[f"meta_grad/{name}"]) <= 1e-8, name
