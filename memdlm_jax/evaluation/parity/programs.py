"""The compiled programs of a replay, shared by all cases that differ in their arrays alone."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from memdlm_jax.diffusion import objective
from memdlm_jax.evaluation.parity.cases import Case
from memdlm_jax.evaluation.parity.inputs import denoiser_of
from memdlm_jax.memory import fast_weights, meta_gradient
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.llada import LLaDA
from memdlm_jax.typing import EVERYTHING, Context, Hidden, Phi, Theta, Tokens


@dataclasses.dataclass(frozen=True)
class EarlyLayers:
    """A denoiser cut off after its first layers, seen as if it were the whole.

    With a negative layer fraction -f the public code's ``distill_hidden`` compares hidden states
    after the first ``int(n f)`` layers, student's and teacher's both after the final norm, while
    the fast weights stay in the last layers.
    """

    whole: LLaDA
    layers: int

    @property
    def num_layers(self) -> int:
        """Layers of the whole denoiser, so that the split is the same."""
        return self.whole.num_layers

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self.whole.mask_token_id

    def trunk(
        self, theta: Theta, tokens: Tokens, context: Context = EVERYTHING, *, split: int
    ) -> Hidden:
        """Embed the tokens and run the layers below ``split`` that are left."""
        return self.whole.trunk(theta, tokens, context, split=min(split, self.layers))

    def head(
        self, theta: Theta, phi: Phi, hidden: Hidden, context: Context = EVERYTHING, *, split: int
    ) -> Hidden:
        """Run the layers from ``split`` on that are left, and the final norm."""
        if self.layers <= split:
            return self.whole.normalise(theta, hidden)
        left = theta | {"layers": jax.tree.map(lambda leaf: leaf[: self.layers], theta["layers"])}
        phi = jax.tree.map(lambda leaf: leaf[: self.layers - split], phi)
        last = self.whole.head(left, phi, hidden, context, split=split)
        return self.whole.normalise(theta, last)

    def normalise(self, theta: Theta, last_hidden: Hidden) -> Hidden:
        """Nothing: ``head`` has done it."""
        del theta
        return last_hidden

    def readout(self, theta: Theta, last_hidden: Hidden) -> jax.Array:
        """Logits of what ``head`` returns."""
        return jnp.matmul(last_hidden, self.whole.unembedding(theta))

    def adaptable(self, split: int = 0) -> Mapping[str, tuple[int, ...]]:
        """As the whole denoiser."""
        return self.whole.adaptable(split)


def early_layers(case: Case) -> EarlyLayers | None:
    """The shortened denoiser of a negative layer fraction, if the case's loss uses it."""
    fraction, denoiser = case.memory["mem_inner_layer_fraction"], denoiser_of(case)
    if fraction >= 0 or case.memory["mem_inner_loss_type"] != "distill_hidden":
        return None
    return EarlyLayers(denoiser, max(1, int(denoiser.num_layers * -fraction)))


@functools.cache
def single_update(denoiser, config: MemoryConfig, early: EarlyLayers | None):
    """(theta, phi, trajectory of one state) -> (phi, record, raw gradient), compiled once."""
    inner_loop = InnerLoop(denoiser if early is None else early, config)

    @jax.jit
    def update(theta, phi, one):
        rule = _Recording()
        phi, record = inner_loop.adapt(theta, None, phi, one, rule)
        return phi, record, rule.found[0]

    return update


class _Recording(meta_gradient.FirstOrder):
    """Keeps every inner gradient in ``found``."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "found", [])

    def gradient(self, loss):
        """The inner gradient, kept."""
        rule = super().gradient(loss)

        def recorded(*given):
            value, gradient = rule(*given)
            self.found.append(gradient)
            return value, gradient

        return recorded


@functools.cache
def outer_gradient(denoiser: LLaDA, config: MemoryConfig):
    """(theta, phi_0, anchor, trajectory) -> (loss, gradient in theta)."""
    inner_loop = InnerLoop(denoiser, config)

    @jax.jit
    def outer(theta, phi, anchor, states):
        def loss(theta):
            return meta_gradient.outer_loss(
                inner_loop, theta, None, phi, states, anchor, with_memory_off=False
            )[0]

        return jax.value_and_grad(loss)(theta)

    return outer


@functools.cache
def given_memory(denoiser: LLaDA, split: int):
    """(theta, phi, anchor) -> (loss, gradients in theta and phi, logits) with phi as it is."""

    @jax.jit
    def given(theta, phi, anchor):
        def loss(theta, phi):
            state = anchor.state
            hidden = denoiser.trunk(theta, state.tokens, split=split)
            last = fast_weights.head_with_memory(
                denoiser, theta, phi, hidden, EVERYTHING, split=split, at=state.targets.positions
            )
            return objective.state_loss(denoiser, theta, last, state)

        value, gradients = jax.value_and_grad(loss, (0, 1))(theta, phi)
        return value, gradients, logits_of(denoiser, split, theta, phi, anchor.state.tokens)

    return given


def logits_of(denoiser: LLaDA, split: int, theta: Theta, phi: Phi, tokens: Tokens) -> jax.Array:
    """Logits at all positions [b, l, v] with phi as it is, or without memory."""
    hidden = denoiser.trunk(theta, tokens, split=split)
    last = fast_weights.head_with_memory(denoiser, theta, phi, hidden, EVERYTHING, split=split)
    return denoiser.readout(theta, last)
