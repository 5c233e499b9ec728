"""A mixture of two experts whose second gets no token: zero gradients everywhere in its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.typing import EVERYTHING
from tests.memory import tiny
from tests.memory.tiny import ROWS, batch_of, settings

pytestmark = pytest.mark.usefixtures("wide")


class Experts(tiny.Tiny):
    """The up-projection is one of two experts': ``up`` for even tokens, ``other`` for odd ones."""

    def init(self, seed):
        other = np.random.default_rng(seed + 50).normal(
            size=(self.num_layers, self.width, self.hidden)
        )
        return super().init(seed) | {"other": jnp.asarray(other) * 0.6}

    def trunk(self, theta, tokens, context=EVERYTHING, *, split):
        # The route travels in an extra feature that no layer changes.
        odd = (tokens % 2).astype(theta["up"].dtype)[..., None]
        x = super().trunk(theta, tokens, context, split=0)
        return self._run(theta, None, jnp.concatenate([x, odd], -1), context.attend, 0, split)

    def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
        return self._run(theta, phi, hidden, context.attend, split, self.num_layers)[..., :-1]

    def _run(self, theta, phi, x, valid, first, end):
        x, odd = x[..., :-1], x[..., -1:]
        for n in range(first, end):
            memory = (
                {name: self._fast(phi, name, n - first) for name in ("up", "other", "down")}
                if phi is not None
                else dict.fromkeys(("up", "other", "down"), lambda x: 0.0)
            )
            seen = valid[..., None].astype(x.dtype)
            mean = (x * seen).sum(1, keepdims=True) / jnp.maximum(seen.sum(1, keepdims=True), 1)
            x = x + jnp.tanh(x * mean) @ theta["mix"][n]
            even = jnp.tanh(x @ theta["up"][n] + memory["up"](x * (1 - odd)))
            up = jnp.where(
                odd > 0, jnp.tanh(x @ theta["other"][n] + memory["other"](x * odd)), even
            )
            x = x + up @ theta["down"][n] + memory["down"](up)
        return jnp.concatenate([x, odd], -1)

    def _fast(self, phi, name, layer):
        return jax.tree.map(lambda leaf: leaf[layer], phi["mlp"][name]["delta"])

    def adaptable(self, split=0):
        return super().adaptable(split) | {
            "mlp/other": (self.num_layers - split, self.width, self.hidden)
        }


@pytest.mark.parametrize(
    ("mode", "clip"),
    [
        ("first_order", "local"), ("trunk_stopped", "global"),
        ("exact", "local"), ("exact", "global"), ("exact", "none"),
    ],
)  # fmt: skip
def test_an_expert_that_gets_no_token(mode, clip):
    """Its inner gradient is exactly zero at every step, where a norm has no derivative."""
    model = Experts()
    theta = model.init(0)
    tokens = np.random.default_rng(0).integers(1, 5, (ROWS, tiny.LENGTH)) * 2
    batch = dataclasses.replace(batch_of(0), tokens=jnp.asarray(tokens))
    rate = 0.05 if clip == "none" else 0.1
    config = settings(mode, "example", clip=clip, learning_rate=rate)
    given = tiny.draw(config, batch, model=model)

    @jax.jit
    def loss_and_gradient(theta):
        def loss(theta):
            return tiny.outer(config, theta, given, model=model)

        return jax.value_and_grad(loss, has_aux=True)(theta)

    (value, sums), gradient = loss_and_gradient(theta)
    assert np.isfinite(value) and not sums.inner.skipped.any()
    idle = sums.phi["mlp"]["other"]["delta"]
    assert not idle.B.any() and (idle.A == given.phi["mlp"]["other"]["delta"].A).all()
    assert not gradient["other"].any() and gradient["up"].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if mode != "exact":
        return
    for seed in range(5):
        rng = np.random.default_rng(seed)
        direction = {name: rng.normal(size=leaf.shape) for name, leaf in theta.items()}

        def at(step, direction=direction):
            moved = {name: leaf + step * direction[name] for name, leaf in theta.items()}
            return float(loss_and_gradient(moved)[0][0])

        h = 3e-5
        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found = sum(float(np.vdot(gradient[name], direction[name])) for name in theta)
        assert found == pytest.approx(expected, rel=1e-6)
