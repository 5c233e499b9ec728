"""Grouped products of sorted rows on the CPU, block by block of rows.

XLA has no ragged product on the CPU: it computes every row with every group, from copies of all
rows for each. A loop over blocks of rows with one group each takes its place there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 16  # rows; near the fastest (measured: 8 to 256) from 1 to 512 rows per group


def wide_dtype(dtype: Any) -> Any:
    """Float32, or wider if ``dtype`` is: what sums run in."""
    return jnp.promote_types(dtype, jnp.float32)


def _blocks(num_rows: int, sizes: jax.Array) -> tuple[jax.Array, Callable]:
    """Divide sorted rows into blocks that start within one group.

    Returns:
        the number of blocks, and block number -> (group, first row, rows left of the group); a
        block overruns its group where less than a block is left.
    """
    groups = sizes.shape[0]
    counts = -(-sizes // BLOCK)
    first, start = jnp.cumsum(counts) - counts, jnp.cumsum(sizes) - sizes
    most = num_rows // BLOCK + min(groups, num_rows)
    group_of = jnp.repeat(jnp.arange(groups), counts, total_repeat_length=most)

    def block(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = group_of[number]
        skip = (number - first[group]) * BLOCK
        return group, start[group] + skip, sizes[group] - skip

    return jnp.sum(counts), block


def blocked_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Blocks ascend, so the rows that one computes past its group are overwritten by the next."""
    num_blocks, block = _blocks(x.shape[0], sizes)
    padded = jnp.pad(x, ((0, BLOCK), (0, 0)))

    def step(number: jax.Array, y: jax.Array) -> jax.Array:
        group, start, _ = block(number)
        taken = lax.dynamic_slice_in_dim(padded, start, BLOCK)
        part = jnp.matmul(taken, w[group], preferred_element_type=wide_dtype(x.dtype))
        return lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), start, 0)

    y = jnp.zeros((padded.shape[0], w.shape[2]), x.dtype)
    return lax.fori_loop(0, num_blocks, step, y)[: x.shape[0]]


def blocked_outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows past the group are set to zero on both sides, as they may hold infinities."""
    wide = wide_dtype(x.dtype)
    num_blocks, block = _blocks(x.shape[0], sizes)
    x_padded, y_padded = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (x, y))

    def step(number: jax.Array, w: jax.Array) -> jax.Array:
        group, start, left = block(number)
        keep = (jnp.arange(BLOCK) < left)[:, None]
        x_part, y_part = (
            jnp.where(keep, lax.dynamic_slice_in_dim(a, start, BLOCK), 0)
            for a in (x_padded, y_padded)
        )
        part = jnp.matmul(x_part.T, y_part, preferred_element_type=wide)
        return w.at[group].add(part)

    w = jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), wide)
    return lax.fori_loop(0, num_blocks, step, w).astype(x.dtype)
