"""A digest of an array that does not depend on how the array is divided over devices.

It is a sum over all entries, so each device adds up its own and only sums travel: no device or host
ever holds an array that is divided. It finds accidents and is no proof against forgery.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from memdlm_jax import processes

# Any numbers that differ. Of 32 bits each: damage passes with probability 2**-128.
_SEEDS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
BLOCK = 1 << 18
"""Entries that are hashed at a time, unless the last dimension alone has more."""


def digest(array: Any) -> str:
    """32 hexadecimal digits, equal iff (but for chance) all bits of two arrays of one shape are.

    A single entry that changes always changes it. Of several processes all have to call this, for
    the same arrays in the same order.
    """
    array = jnp.asarray(array)
    sums = processes.whole(_summing(array.sharding, array.ndim)(array))
    return sums.astype(">u4").tobytes().hex()


@functools.cache
def _summing(sharding: jax.sharding.Sharding, dimensions: int) -> Callable[[Array], Array]:
    """What sums an array that lies so: every device takes its own part."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(functools.partial(_sums, axes=((),) * dimensions))
    entries = [*sharding.spec, *(None,) * (dimensions - len(sharding.spec))]
    axes = tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries)
    return jax.jit(
        jax.shard_map(
            functools.partial(_sums, axes=axes), mesh=sharding.mesh, in_specs=sharding.spec,
            out_specs=PartitionSpec(), check_vma=False,
        )
    )  # fmt: skip


def _sums(part: Array, axes: tuple[tuple[str, ...], ...]) -> UInt32[Array, "4"]:
    """For each seed the sum, modulo 2**32, of a hash of every entry with its place.

    Args:
        part: what one device has of the array.
        axes: names of the mesh's axes that divide each dimension.
    """
    offsets = [
        jnp.uint32(jax.lax.axis_index(names) * size if names else 0)
        for names, size in zip(axes, part.shape, strict=True)
    ]
    zeros = jnp.zeros(len(_SEEDS), jnp.uint32)
    shape = part.shape or (1,)
    rows = part.reshape(int(np.prod(shape[:-1])), shape[-1])
    count = min(len(rows), max(1, BLOCK // max(1, shape[-1])))
    if not part.size:
        return zeros

    def add(number: Int[Array, ""], sums: UInt32[Array, "4"]) -> UInt32[Array, "4"]:
        # The last block begins earlier than its turn if too few are left: none is counted twice.
        first = jnp.minimum(number * count, len(rows) - count)
        row = first + jnp.arange(count)
        bits = _bits(jax.lax.dynamic_slice_in_dim(rows, first, count))
        inner = [jnp.arange(size) for size in bits.shape[1:]]
        outer = jnp.unravel_index(row, shape[:-1]) if shape[:-1] else ()
        known = [i.astype(jnp.uint32) for i in (*outer, *inner)]
        places = [i + o for i, o in zip(known, [*offsets, 0, 0], strict=False)]
        due = (row >= number * count).reshape(count, *(1,) * len(inner))
        return sums + jnp.stack([
            jnp.where(due, _mixed(_hashed(places, len(inner), seed) ^ bits), 0).sum(
                dtype=jnp.uint32
            )
            for seed in _SEEDS
        ])  # fmt: skip

    sums = jax.lax.fori_loop(0, -(-len(rows) // count), add, zeros)
    names = tuple(name for one in axes for name in one)
    return jax.lax.psum(sums, names) if names else sums


def _bits(array: Array) -> UInt32[Array, "..."]:
    """The bits of each entry; of 64-bit ones in two words on a further axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)


def _hashed(places: list[UInt32[Array, "..."]], inner: int, seed: int) -> UInt32[Array, "..."]:
    """A hash of every place of a block [rows, ...]; 32 bits could not count a large array.

    Args:
        places: of each dimension the indices: first [rows], then of the ``inner`` last ones [n].
        inner: how many of these there are.
        seed: to begin with.
    """
    found = jnp.full((1,), seed, jnp.uint32)
    for index in places[: len(places) - inner]:
        found = _mixed(found + index)
    for index in places[len(places) - inner :]:
        found = _mixed(found[..., None] + index)
    return found


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's last steps: one to one, and every bit depends on every other."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def sha256(array: Any) -> str:
    """Of the whole content, which is gathered: what checkpoints had before ``digest``."""
    content = np.ascontiguousarray(processes.whole(array)).reshape(-1).view(np.uint8)
    return hashlib.sha256(content.data).hexdigest()
