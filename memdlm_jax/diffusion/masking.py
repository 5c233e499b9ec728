"""Masks with static shapes: Bernoulli masks of the forward process, masks of exact size by rank."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memdlm_jax.typing import Key, Mask, Tokens


def bernoulli_mask(key: Key, maskable: Mask, ratio: Float[Array, "b"]) -> Mask:
    """Mask each maskable position with probability ``ratio`` of its row, independently."""
    return maskable & (jax.random.uniform(key, maskable.shape) < ratio[..., None])


def choose_exactly(key: Key, candidates: Mask, count: Int[Array, "b"]) -> Mask:
    """Choose ``count`` of each row's candidates, every subset being equally likely.

    Args:
        key: PRNG key.
        candidates: [b, l] bool.
        count: [b] int32; a row with fewer candidates has all of them chosen.

    Returns:
        [b, l] bool, a subset of ``candidates``.
    """
    return candidates & (random_ranks(key, candidates) < count[:, None])


def random_ranks(key: Key, candidates: Mask) -> Int[Array, "b l"]:
    """Each candidate's place, from 0, in an order of its row's candidates drawn uniformly.

    Other positions come after all candidates. A float32 uniform has 2^23 values, so in a row of
    32k tokens some 64 pairs have equal scores; 32 further random bits put them in order.
    """
    scores = jnp.where(candidates, jax.random.uniform(key, candidates.shape), jnp.inf)
    ties = jax.random.bits(jax.random.fold_in(key, 1), candidates.shape)
    places = jnp.broadcast_to(jnp.arange(candidates.shape[-1]), candidates.shape)
    *_, order = jax.lax.sort((scores, ties, places), num_keys=2)
    return jnp.argsort(order, axis=-1)


def apply_mask(tokens: Tokens, mask: Mask, mask_token_id: int) -> Tokens:
    """Put the mask token where ``mask`` is True."""
    return jnp.where(mask, jnp.asarray(mask_token_id, tokens.dtype), tokens)
