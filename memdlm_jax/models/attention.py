"""Grouped-query attention with rotary positions, in both directions or under any mask."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax import partitioning
from memdlm_jax.models.layers import Initializer, Linear, RMSNorm

KeysAndValues = tuple[jax.Array, jax.Array]
"""Rotated keys and values, each [b, kv_heads, k, head_dim]."""


def rotary(
    x: jax.Array, position_ids: jax.Array, theta: float, channels: int | None = None
) -> jax.Array:
    """Rotate queries or keys by their positions (RoPE, rotate-half pairing of channels).

    Args:
        x: [b, l, heads, head_dim].
        position_ids: [b, l] or [1, l] int32.
        theta: base of the frequencies.
        channels: even; only so many first channels of a head turn, ``None`` for all.

    Returns:
        [b, l, heads, head_dim] in the dtype of ``x``; angles are taken in float32 or wider.
    """
    if channels is not None and channels < x.shape[-1]:
        turned = rotary(x[..., :channels], position_ids, theta)
        return jnp.concatenate([turned, x[..., channels:]], axis=-1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = position_ids[..., None, None].astype(wide) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """Entries of the second axis: [b | 1, l, ...] at positions [b, c] -> [b, c, ...]."""
    x = jnp.broadcast_to(x, (at.shape[0], *x.shape[1:]))
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    cached: KeysAndValues | None = None,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32 or wider.

    ``jax.nn.dot_product_attention`` takes the softmax in float32 whatever its inputs, which loses
    float64, and gives a query without keys their mean.

    Args:
        query: [b, l, heads, head_dim].
        key: [b, k, kv_heads, head_dim]; kv head j serves the query heads of its group.
        value: like ``key``.
        mask: who sees whom: bool [b, k] (the keys that every query sees) or [b | 1, l, k]; or a
            floating [b | 1, l, k], added to the scores; ``None`` for all. With ``cached`` its keys
            are those, and behind them ``key``.
        cached: further keys and values, heads before columns.

    Returns:
        [b, l, heads, head_dim] in the dtype of ``query``; zeros for a query that sees no key.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    rows, length, heads, size = query.shape
    # Heads before positions: the products are then plain batches of matrices. A mask is added, and
    # the division comes last: the scores are passed over less often. On a CPU, where both bind,
    # this takes a third of the time of a masked softmax between two einsums.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    kv_heads = key.shape[1]
    query = query.reshape(rows, kv_heads, -1, size)
    # Cached keys are not joined with the others, which would copy them at every step.
    parts = [(key, value)] if cached is None else [cached, (key, value)]
    bias, seen = _bias(mask, wide, heads // kv_heads)
    scores, at = [], 0
    for keys, _ in parts:
        product = jnp.einsum("bhqd,bhkd->bhqk", query, keys, preferred_element_type=wide)
        product = product * size**-0.5
        if bias is not None:
            product += bias[..., at : at + keys.shape[2]]
        scores.append(product)
        at += keys.shape[2]
    largest = functools.reduce(jnp.maximum, [jnp.max(x, -1, keepdims=True) for x in scores])
    largest = jax.lax.stop_gradient(largest)
    weights = [jnp.exp(x - largest) for x in scores]
    total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
    products = [
        jnp.einsum("bhqk,bhkd->bhqd", x.astype(v.dtype), v, preferred_element_type=wide)
        for x, (_, v) in zip(weights, parts, strict=True)
    ]
    mixed = functools.reduce(jnp.add, products) / total
    if seen is not None:
        mixed = jnp.where(seen, mixed, 0)
    mixed = mixed.astype(value.dtype).reshape(rows, heads, length, size)
    return jnp.swapaxes(mixed, 1, 2)


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The weights that ``attend`` mixes the values by, written out; for looking at, not for speed.

    Args:
        query: [b, q, heads, head_dim], of the positions that are looked at.
        key: [b, k, kv_heads, head_dim].
        mask: as in ``attend``, of these queries.

    Returns:
        [b, heads, q, k] float32 or wider; rows sum to 1, or to 0 for a query that sees no key.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    rows, length, heads, size = query.shape
    query, key = jnp.swapaxes(query, 1, 2), jnp.swapaxes(key, 1, 2)
    query = query.reshape(rows, key.shape[1], -1, size)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=wide) * size**-0.5
    bias, seen = _bias(mask, wide, heads // key.shape[1])
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    return weights.reshape(rows, heads, length, -1)


def _bias(mask: jax.Array | None, dtype, group: int) -> tuple[jax.Array | None, jax.Array | None]:
    """What is added to scores [b, kv_heads, group * l, k], and which queries see any key.

    The second is ``None`` where a query without keys keeps what softmax makes of it.
    """
    if mask is None:
        return None, None
    mask = mask[:, None, None, :] if mask.ndim == 2 else jnp.tile(mask, (1, group, 1))[:, None]
    if jnp.issubdtype(mask.dtype, jnp.floating):
        return mask.astype(dtype), None
    # Half of the least number: a score may be added without overflow.
    bias = jnp.where(mask, 0, jnp.finfo(dtype).min / 2).astype(dtype)
    return bias, jnp.any(mask, axis=-1, keepdims=True)


def sees_block(query_positions: jax.Array, key_positions: jax.Array, block: int) -> jax.Array:
    """Mask under which a token sees its own block and those before it, by positions.

    Args:
        query_positions: [b, q] int32; a row's positions count from its first token, so that
            padding before it does not move its blocks.
        key_positions: [b, k] int32.
        block: tokens of a block, at least 1.

    Returns:
        [b, q, k] bool.
    """
    return query_positions[:, :, None] // block >= key_positions[:, None, :] // block


def block_causal(length: int, block: int) -> np.ndarray:
    """Mask under which a token sees its own block and those before it.

    Blocks are counted from index 0 of the row (LLaDA2.0 decoding).

    Args:
        length: tokens of the row.
        block: tokens of a block, at least 1.

    Returns:
        [length, length] bool, query first.
    """
    number = np.arange(length) // block
    return number[:, None] >= number[None, :]


def block_diffusion(length: int, block: int) -> np.ndarray:
    """Mask of block-diffusion training over the concatenation of x_t and x_0 (arXiv 2503.09573).

    A noisy token sees its own noisy block and the clean blocks before it; a clean token sees the
    clean blocks up to its own.

    Args:
        length: tokens of x_0.
        block: tokens of a block, at least 1.

    Returns:
        [2 length, 2 length] bool, query first.
    """
    number = np.arange(length) // block
    same, before = number[:, None] == number[None, :], number[:, None] > number[None, :]
    return np.block([[same, before], [np.zeros_like(same), same | before]])


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What an attention layer is made of.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels of a head.
        rope_theta: base of the rotary frequencies.
        rotary_channels: first channels of a head that turn, even.
        norm_epsilon: of the norms of queries and keys.
        normalise_heads: RMSNorm over each head's queries and keys, before the rotation.
        use_bias: of the query, key and value maps.
        fused: one matrix gives all queries, then all keys, then all values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rotary_channels: int
    norm_epsilon: float
    normalise_heads: bool = False
    use_bias: bool = False
    fused: bool = False

    def features(self) -> dict[str, int]:
        """Output sizes of the input maps, by name."""
        query, other = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.fused:
            return {"query_key_value": query + 2 * other}
        return {"q_proj": query, "k_proj": other, "v_proj": other}


class Attention(nn.Module):
    """Multi-head attention under any mask; softmax in float32 or wider."""

    spec: AttentionSpec
    kernel_init: Initializer
    output_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        position_ids: jax.Array,
        cached: KeysAndValues | None = None,
        at: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysAndValues]:
        """Map [b, l, d] to [b, l, d] and the keys and values of x itself.

        ``mask`` and ``cached`` as in ``attend``. With ``at`` [b, c] only these positions ask: the
        first result is [b, c, d].
        """
        s = self.spec
        query, key, value = self._project(x, at)
        if s.normalise_heads:
            query = RMSNorm(s.norm_epsilon, self.param_dtype, name="q_norm")(query)
            key = RMSNorm(s.norm_epsilon, self.param_dtype, name="k_norm")(key)
        asking = position_ids if at is None else pick(position_ids, at)
        query = rotary(query, asking, s.rope_theta, s.rotary_channels)
        key = rotary(key, position_ids, s.rope_theta, s.rotary_channels)
        query = partitioning.constrain(query, "rows", "length", "heads", None)
        # Every query asks the keys of the whole row.
        key, value = (partitioning.constrain(x, "rows", None, "heads", None) for x in (key, value))
        # For ``Transformer.inspect``; without that collection nothing is kept or computed.
        for name, part in (("query", query), ("key", key), ("value", value)):
            self.sow("intermediates", f"sown_{name}", part)
        if at is not None and mask is not None and mask.ndim == 3:
            mask = pick(mask, at)
        mixed = attend(query, key, value, mask, cached).reshape(*query.shape[:2], -1)
        output = Linear(x.shape[-1], self.output_init, self.param_dtype, name="o_proj")
        return output(mixed), (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))

    def _project(self, x: jax.Array, at: jax.Array | None) -> list[jax.Array]:
        """Queries, at some positions alone if asked, keys and values, [b, l, heads, head_dim]."""
        s = self.spec
        some = x if at is None or s.fused else pick(x, at)
        projected = [
            Linear(size, self.kernel_init, self.param_dtype, s.use_bias, name=name)(
                some if name == "q_proj" else x
            )
            for name, size in s.features().items()
        ]
        if s.fused:
            query = s.num_heads * s.head_dim
            projected = jnp.split(projected[0], [query, query + s.num_kv_heads * s.head_dim], -1)
            if at is not None:
                projected[0] = pick(projected[0], at)
        return [y.reshape(*y.shape[:-1], -1, s.head_dim) for y in projected]
