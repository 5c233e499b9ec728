"""A small model of each family, for tests of what they have in common."""

import functools

import jax
import jax.numpy as jnp

from memdlm_jax.memory import fast_weights
from memdlm_jax.models.dream import Dream, DreamConfig
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.llada2 import LLaDA2, LLaDA2Config
from memdlm_jax.models.llada_moe import LLaDAMoE, LLaDAMoEConfig
from memdlm_jax.typing import Context

_SIZES = dict(vocab_size=20, width=16, num_layers=3, mask_token_id=1, max_length=32)
MOE = LLaDAMoEConfig(
    **_SIZES, num_heads=4, num_kv_heads=4, hidden_features=24, num_experts=6, experts_per_token=2,
    expert_features=8,
)  # fmt: skip
_LLADA2 = LLaDA2Config(
    **_SIZES, num_heads=4, num_kv_heads=2, hidden_features=24, head_dim=8, num_experts=8,
    experts_per_token=2, expert_features=8, router_groups=4, kept_router_groups=2,
    rotary_channels=4,
)  # fmt: skip
_DENSE = dict(**_SIZES, num_heads=4, num_kv_heads=2, hidden_features=24)
FAMILIES = {
    "llada": LLaDA(LLaDAConfig(**_DENSE)),
    "llada_moe": LLaDAMoE(MOE),
    "llada2": LLaDA2(_LLADA2),
    "dream": Dream(DreamConfig(**_DENSE)),
}
TOKENS = jnp.arange(18).reshape(2, 9) % 17 + 2


def small(name):
    return FAMILIES[name]


@functools.cache
def theta_of(model):
    """Parameters of a model, drawn once: compiling what draws them is most of the time."""
    return jax.jit(model.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("model", "split"))
def logits(model, theta, phi=None, split=2, valid=None, tokens=TOKENS):
    context = Context(valid)
    hidden = model.trunk(theta, tokens, context, split=split)
    last = fast_weights.head_with_memory(model, theta, phi, hidden, context, split=split)
    return model.readout(theta, last)
