"""A denoiser small enough to check by brute force, and the outer loss on it."""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Anchor
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import meta_gradient
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.training.step import step_keys
from memdlm_jax.typing import EVERYTHING, Batch, Phi

ROWS, LENGTH = 4, 8


class Tiny:
    """A denoiser of the protocol in plain ``jnp``: two layers of token mixing and a tanh MLP."""

    num_layers, mask_token_id, vocabulary, width, hidden = 2, 0, 9, 6, 8

    def init(self, seed):
        rng = np.random.default_rng(seed)
        d, h, n = self.width, self.hidden, self.num_layers
        shapes = {"mix": (n, d, d), "up": (n, d, h), "down": (n, h, d)}
        shapes |= {"embedding": (self.vocabulary, d), "place": (LENGTH, d), "out": (d, 9)}
        shapes |= {"gain": (d,)}
        return {name: jnp.asarray(rng.normal(size=s)) * 0.6 for name, s in shapes.items()}

    def trunk(self, theta, tokens, context=EVERYTHING, *, split):
        x = theta["embedding"][tokens] + theta["place"]
        return self._layers(theta, None, x, context.attend, 0, split)

    def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
        return self._layers(theta, phi, hidden, context.attend, split, self.num_layers)

    def _layers(self, theta, phi, x, valid, first, end):
        seen = valid[..., None].astype(x.dtype)
        for n in range(first, end):
            mean = jnp.sum(x * seen, 1, keepdims=True) / jnp.maximum(seen.sum(1, keepdims=True), 1)
            x = x + jnp.tanh(x * mean) @ theta["mix"][n]
            up = jnp.tanh(x @ theta["up"][n] + _fast(phi, "up", n - first, x))
            x = x + up @ theta["down"][n] + _fast(phi, "down", n - first, up)
        return x

    def normalise(self, theta, last_hidden):
        return last_hidden * (1 + theta["gain"])

    def readout(self, theta, last_hidden):
        return self.normalise(theta, last_hidden) @ theta["out"]

    def adaptable(self, split=0):
        n, d, h = self.num_layers - split, self.width, self.hidden
        return {"mlp/up": (n, d, h), "mlp/down": (n, h, d)}


def _fast(phi, name, layer, x):
    if phi is None:
        return 0.0
    return jax.tree.map(lambda leaf: leaf[layer], phi["mlp"][name]["delta"])(x)


MODEL = Tiny()
CONFIG = MemoryConfig(
    learning_rate=0.1,
    clip_norm=0.4,
    rank=3,
    alpha=6.0,
    layer_fraction=0.5,
    target_modules=("mlp",),
)


def settings(mode, scope, **others):
    return dataclasses.replace(CONFIG, meta_gradient=mode, scope=scope, **others)


def batch_of(seed):
    """Rows with prompts of several lengths; the last is padded."""
    tokens = np.random.default_rng(seed).integers(1, MODEL.vocabulary, (ROWS, LENGTH))
    maskable = np.arange(LENGTH) >= np.array([2, 0, 5, 3])[:, None]
    valid = np.ones((ROWS, LENGTH), bool)
    valid[3, 7:] = maskable[3, 7:] = False
    return Batch(*map(jnp.asarray, (tokens, maskable, valid)))


class Given(NamedTuple):
    """Everything random of one step: phi_0, clean rows, anchor and trajectory."""

    phi: Phi
    batch: Batch
    anchor: Anchor
    trajectory: Trajectory


def draw(config, batch, corruption=None, seed=1, model=MODEL, **places):
    """Everything random of one step, with float64 fast weights."""
    schedule = LinearSchedule(0.5, "low_discrepancy")
    phi_key, anchor_key, mask_key, dropout_key = step_keys(jax.random.key(seed))
    anchor = objective.draw_anchor(anchor_key, batch, model.mask_token_id, corruption or schedule)
    keys = phi_key, mask_key, dropout_key
    phi, trajectory = InnerLoop(model, config).draw(keys, batch, anchor, schedule, **places)
    return Given(jax.tree.map(lambda leaf: leaf.astype(float), phi), batch, anchor, trajectory)


def outer(config, theta, given, learned=None, model=MODEL, **others):
    """(outer loss, sums) of what ``draw`` gave."""
    return meta_gradient.outer_loss(
        InnerLoop(model, config), theta, learned, given.phi, given.trajectory, given.anchor,
        **others,
    )  # fmt: skip


@functools.cache
def compiled(config):
    """(theta, given, report) -> ((loss, sums), gradient in theta)."""

    def loss(theta, given, report):
        return outer(config, theta, given, with_memory_off=report)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(config, theta, given, report=True):
    """Outer loss, sums and gradient on what ``draw`` gave."""
    return compiled(config)(theta, Given(*given), np.bool_(report))


def assert_close(ours, theirs, tolerance):
    """Every leaf within ``tolerance`` of its largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, a), b in pairs:
        bound = tolerance * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=str(path))


@contextlib.contextmanager
def float64():
    """64-bit types."""
    with jax.enable_x64(True):
        yield
