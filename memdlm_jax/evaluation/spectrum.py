"""What a memory changes: the norm and the effective rank of each fast weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memdlm_jax.memory import fast_weights
from memdlm_jax.typing import Phi


def describe(phi: Phi) -> dict[str, dict[str, Float[Array, "groups layers"]]]:
    """What a memory changes, matrix by matrix.

    Returns:
        path -> {``norm``: Frobenius norm of the change that it makes to the matrix, [groups,
        layers, (experts)]; ``rank``: its effective rank, the exponential of the entropy of its
        normalised squared singular values, likewise; 0 where it changes nothing}.
    """
    return {path: _spectrum(delta) for path, delta in fast_weights.by_path(phi).items()}


def _spectrum(delta) -> dict[str, jax.Array]:
    if isinstance(delta, fast_weights.LowRank):
        # The singular values of A B from two small triangles: the product may be a large matrix.
        left = jnp.linalg.qr(delta.A, mode="r")
        right = jnp.linalg.qr(jnp.swapaxes(delta.B, -1, -2), mode="r")
        small = left @ jnp.swapaxes(right, -1, -2) * delta.scale
    else:
        small = delta.W
    squares = jnp.linalg.svd(small, compute_uv=False) ** 2
    total = jnp.sum(squares, axis=-1)
    p = squares / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)
    return {"norm": jnp.sqrt(total), "rank": jnp.where(total > 0, jnp.exp(entropy), 0.0)}
