"""How the decode loop reads the model: the whole canvas, or a part of it beside a cache."""

from collections.abc import Callable, Sequence
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.diffusion.canvas import Canvas
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.typing import Cache, Tokens


class Reader(Protocol):
    """The model as the loop sees it."""

    @property
    def lookback(self) -> int:
        """Columns that must stand before those that logits are wanted at."""
        ...

    def __call__(
        self,
        tokens: Tokens,
        first: int | Int[Array, ""],
        wanted: Int[Array, "c"],
        cache: Cache | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Float[Array, "b c v"], Cache | None]:
        """Read some columns of the canvas.

        Args:
            tokens: [b, q] what stands in them.
            first: number of the first one.
            wanted: indices into ``tokens`` at which logits are needed; nowhere else are any.
            cache: keys and values of the whole canvas; ``None`` if ``tokens`` is all of it.
            keep: return keys and values of ``tokens``, arrays [layers, b, ..., q, d].
        """
        ...


@flax.struct.dataclass
class _Uncached:
    """See ``from_predict``."""

    predict: Callable = flax.struct.field(pytree_node=False)
    lookback: int = flax.struct.field(pytree_node=False, default=0)

    def __call__(self, tokens, first, wanted, cache=None, *, keep=False):
        del first
        if cache is not None or keep:
            raise ValueError("decode.cache must be 'none': this model keeps no keys and values")
        return self.predict(tokens, wanted), None


def from_predict(predict: Callable[[Tokens, Int[Array, "c"]], Float[Array, "b c v"]]) -> Reader:
    """A reader without caches from any ``predict(canvas, columns) -> logits``."""
    return _Uncached(predict)


def empty_caches(
    readers: Sequence[Reader], canvas: Canvas, config: DecodeConfig
) -> tuple[Cache, ...]:
    """Caches of zeros, one per reader; none if nothing is to be cached."""
    if config.cache == "none":
        return ()

    def shapes(reader):
        return jax.eval_shape(lambda: reader(canvas.tokens, 0, jnp.arange(1), keep=True)[1])

    return tuple(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(reader)) for reader in readers
    )


def is_part(config: DecodeConfig, block: Int[Array, ""], step: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a step reads a part of the canvas, the rest being cached."""
    if config.cache == "none":
        return jnp.zeros((), bool)
    if config.attention == "full":
        return step > 0
    return (step > 0) | (block > 0)


def read_block(
    reader: Reader,
    canvas: Canvas,
    config: DecodeConfig,
    tokens: Tokens,
    block: Int[Array, ""],
    first: bool | Bool[Array, ""],
    cache: Cache | None,
) -> tuple[Float[Array, "b c v"], Cache | None]:
    """Logits at the current block, and the cache, renewed where a block begins.

    Args:
        reader: the model.
        canvas: where everything stands.
        config: block length, attention and kind of cache.
        tokens: [b, l] what stands on the canvas now.
        block: number of the current block.
        first: whether this is the block's first step; a program is smaller if that is a constant.
        cache: keys and values, arrays [layers, b, ..., l, d], or ``None``.
    """
    size, length = config.block_size, tokens.shape[1]
    begins = canvas.start + block * size

    def whole():
        at = begins + jnp.arange(size)
        return reader(tokens, 0, at, keep=config.cache != "none")

    def part(at, width: int, keep: bool = False):
        """Read ``width`` columns and those that they look back on."""
        width = min(width + reader.lookback, length)
        at = jnp.clip(at - reader.lookback, 0, length - width)
        columns = jax.lax.dynamic_slice_in_dim(tokens, at, width, 1)
        wanted = begins - at + jnp.arange(size)
        logits, own = reader(columns, at, wanted, cache, keep=keep)
        return logits, put(cache, own, at) if keep else cache

    def with_the_one_before():
        # Its keys and values were last computed with masks in it.
        return part(begins - size, 2 * size, keep=True)

    def with_all_behind():
        # Widths are powers of two, so that few programs serve all blocks.
        widths = _widths(config.num_blocks)
        which = jnp.searchsorted(jnp.array(widths), config.num_blocks - block)
        # Without the cache: what passes through a conditional is copied.
        reads = [lambda w=w: part(length - w * size, w * size)[0] for w in widths]
        return jax.lax.switch(which, reads), cache

    def begin_block():
        if config.attention == "full":
            return whole()
        return jax.lax.cond(block == 0, whole, with_the_one_before)

    def go_on():
        if (config.attention, config.cache) == ("full", "prefix"):
            return with_all_behind()
        return part(begins, size)

    if config.cache == "none":
        return whole()
    if isinstance(first, bool):
        return begin_block() if first else go_on()
    return jax.lax.cond(first, begin_block, go_on)


def put(cache: Cache, own: Cache, first: int | Int[Array, ""]) -> Cache:
    """Write the keys and values of consecutive columns into the cache of the whole canvas."""

    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), first, old.ndim - 2)

    return jax.tree.map(write, cache, own)


def _widths(blocks: int) -> list[int]:
    """1, 2, 4 .. and the number of blocks itself."""
    return [*(2**i for i in range((blocks - 1).bit_length())), blocks]
