"""Who shares a memory: every row its own, or one for all rows of all devices."""

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.evaluation import parity
from memdlm_jax.memory import trajectory
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.meta_gradient import outer_loss
from tests.memory import tiny
from tests.memory.tiny import MODEL, ROWS, Given, assert_close, batch_of, draw, run, settings

GOLDEN = Path(__file__).parents[1] / "golden"


pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture(scope="module")
def shared():
    """One memory for the batch."""
    return draw(settings("exact", "global"), batch_of(0))


@pytest.fixture(scope="module")
def own():
    """A memory for every row."""
    return draw(settings("exact", "example"), batch_of(0))


class TestOwnMemoryOfEveryRow:
    def test_equals_a_loop_over_rows(self, theta, own):
        """Sums, so that sum / maskable is sum_i M_i L_i / sum_i M_i with L_i per token of row i."""
        config = settings("exact", "example")
        (loss, sums), gradient = run(config, theta, own)
        parts = []
        for i in range(ROWS):
            row = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], own)
            parts.append(run(config, theta, row))
            alone = parts[-1][0][1]
            assert_close(alone.inner.loss[:, 0], sums.inner.loss[:, i], 1e-12)
            phi_in_batch = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], sums.phi)
            assert_close(alone.phi, phi_in_batch, 1e-12)
        maskable = own.anchor.maskable.tolist()
        per_token = [
            float(row_loss) / m for ((row_loss, _), _), m in zip(parts, maskable, strict=True)
        ]
        combined = np.dot(per_token, maskable) / sum(maskable)
        assert float(loss) / sum(maskable) == pytest.approx(combined, rel=1e-13)
        total = jax.tree.map(lambda *leaves: sum(leaves), *(g for _, g in parts))
        assert_close(gradient, total, 1e-12)

    def test_does_not_depend_on_the_other_rows(self, theta, own):
        """Reversed rows give reversed results; row 1 keeps its own beside other neighbours."""
        config = settings("exact", "example")
        (_, sums), gradient = run(config, theta, own)
        turned = jax.tree.map(lambda leaf: leaf[::-1], own)
        (_, backward), same_gradient = run(config, theta, turned)
        assert_close(backward.phi, jax.tree.map(lambda leaf: leaf[::-1], sums.phi), 1e-12)
        assert_close(backward.inner.loss, sums.inner.loss[:, ::-1], 1e-12)
        assert_close(same_gradient, gradient, 1e-11)

        others = draw(config, batch_of(7), seed=1)
        mixed = jax.tree.map(lambda mine, other: other.at[1].set(mine[1]), own, others)
        (_, beside), _ = run(config, theta, mixed)
        first, again = (jax.tree.map(lambda leaf: leaf[1], x.phi) for x in (sums, beside))
        assert_close(again, first, 1e-12)
        assert not np.allclose(beside.inner.loss[0, 0], sums.inner.loss[0, 0])

    def test_recorded_rows(self):
        """The public code's batch of three, a memory per row (tests/golden/README.md)."""
        recorded = {case.name: case for case in parity.load_folder(GOLDEN)[0]}
        together, alone = recorded["default_f64"], recorded["b1_row0_f64"]
        config = dataclasses.replace(parity.memory_config(together), scope="example")
        states = parity.whole_trajectory(together)
        rescaled = [
            dataclasses.replace(state, weight=trajectory.normalised(
                jnp.asarray(weight), jnp.asarray(mask.sum(-1)), groups=3
            ))
            for state, weight, mask in zip(
                states.states, together.arrays["step_weight"], together.arrays["step_loss_mask"],
                strict=True,
            )
        ]  # fmt: skip
        states = dataclasses.replace(states, states=tuple(rescaled))
        phi = parity.fast_weights_of(together, "fast/0")
        phi = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), phi)
        loop = InnerLoop(parity.denoiser_of(together), config)
        loss, sums = jax.jit(functools.partial(outer_loss, loop))(
            parity.theta_of(together), None, phi, states, parity.anchor_of(together)
        )
        assert float(loss) == pytest.approx(7.269143, abs=5e-7)
        losses = sums.inner.loss[:, 0], alone.arrays["inner_loss"]
        first_row = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[:1], sums.phi))
        theirs = jax.tree.leaves(parity.fast_weights_of(alone, "fast/2"))
        assert parity.worst([losses, *zip(first_row, theirs, strict=True)]) <= 1e-9


@pytest.mark.parametrize("mode", ["first_order", "exact"])
def test_global_memory_over_two_devices_equals_one(theta, shared, two_devices, mode):
    """``pmap`` over two simulated devices; targets are unevenly spread over them."""
    (loss, sums), gradient = run(settings(mode, "global"), theta, shared)
    counts = np.asarray(shared[3].states[0].targets.present.sum(-1)).reshape(2, -1).sum(-1)
    assert counts[0] != counts[1]
    theirs = {name.removeprefix(mode + "/"): x for name, x in two_devices.items() if mode in name}
    assert theirs["loss"].sum() == pytest.approx(float(loss), rel=1e-12)
    for device in range(2):
        np.testing.assert_allclose(theirs["inner"][device], sums.inner.loss, rtol=1e-12)
        for i, leaf in enumerate(jax.tree.leaves(sums.phi)):
            np.testing.assert_allclose(theirs[f"phi{i}"][device], leaf, rtol=1e-11)
    for name, leaf in gradient.items():
        assert_close(theirs[f"gradient_{name}"].sum(0), leaf, 1e-12)


@pytest.fixture(scope="module")
def two_devices(shared, tmp_path_factory):
    """What ``on_two_devices`` finds in a process of its own."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "given.pickle").write_bytes(pickle.dumps(jax.tree.map(np.asarray, shared)))
    code = f"from tests.memory import test_scope as t; t.on_two_devices({str(folder)!r})"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)
    return dict(np.load(folder / "found.npz"))


def on_two_devices(folder):
    """Save loss, phi and gradient of each device with one memory shared over both."""
    assert jax.device_count() == 2
    phi, *given = pickle.loads(Path(folder, "given.pickle").read_bytes())
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), given)
    found = {}
    for mode in ("first_order", "exact"):
        on_device = jax.pmap(
            functools.partial(share_of_a_device, settings(mode, "global")),
            "devices",
            in_axes=(None, Given(None, 0, 0, 0)),
        )
        (loss, sums), gradient = on_device(MODEL.init(0), Given(phi, *halves))
        found |= {f"{mode}/loss": loss, f"{mode}/inner": sums.inner.loss}
        found |= {f"{mode}/phi{i}": x for i, x in enumerate(jax.tree.leaves(sums.phi))}
        found |= {f"{mode}/gradient_{name}": g for name, g in gradient.items()}
    np.savez(Path(folder, "found.npz"), **found)


def share_of_a_device(config, theta, given):
    def loss(theta):
        return tiny.outer(config, theta, given, with_memory_off=False, axis_name="devices")

    return jax.value_and_grad(loss, has_aux=True)(theta)
