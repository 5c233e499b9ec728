"""Bidirectional grouped-query attention with rotary positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdlm_jax.models.layers import Initializer, Linear


def rotary(x: jax.Array, position_ids: jax.Array, theta: float) -> jax.Array:
    """Rotate queries or keys by their positions (RoPE, rotate-half pairing of channels).

    Args:
        x: [b, l, heads, head_dim].
        position_ids: [b, l] or [1, l] int32.
        theta: base of the frequencies.

    Returns:
        [b, l, heads, head_dim] in the dtype of ``x``; angles are taken in float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = position_ids[..., None, None].astype(wide) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None
) -> jax.Array:
    """Softmax attention over all valid keys; scores and softmax in float32 or wider.

    ``jax.nn.dot_product_attention`` takes the softmax in float32 whatever its inputs, which loses
    float64 parity; this is the same product without that cast, and it has second derivatives.

    Args:
        query: [b, l, heads, head_dim].
        key: [b, k, kv_heads, head_dim]; kv head j serves the query heads of its group.
        value: like ``key``.
        valid: [b, k] bool keys that are seen, or ``None`` for all.

    Returns:
        [b, l, heads, head_dim] in the dtype of ``query``.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    size = query.shape[-1]
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, size)
    scores = jnp.einsum("blkgd,bmkd->bkglm", grouped, key, preferred_element_type=wide)
    scores = scores * size**-0.5
    if valid is not None:
        scores = jnp.where(valid[:, None, None, None, :], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkglm,bmkd->blkgd", weights, value).reshape(query.shape)


class Attention(nn.Module):
    """Multi-head attention over all valid keys, in both directions; softmax in float32 or wider."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    kernel_init: Initializer
    output_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None, position_ids: jax.Array) -> jax.Array:
        """Map [b, l, d] to [b, l, d]; ``valid`` [b, l] bool marks the keys that are seen."""

        def project(name: str, heads: int) -> jax.Array:
            y = Linear(heads * self.head_dim, self.kernel_init, self.param_dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, self.head_dim)

        query = rotary(project("q_proj", self.num_heads), position_ids, self.rope_theta)
        key = rotary(project("k_proj", self.num_kv_heads), position_ids, self.rope_theta)
        value = project("v_proj", self.num_kv_heads)
        mixed = attend(query, key, value, valid).reshape(*x.shape[:-1], -1)
        return Linear(x.shape[-1], self.output_init, self.param_dtype, name="o_proj")(mixed)
