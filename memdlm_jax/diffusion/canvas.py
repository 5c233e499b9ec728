"""Prompts of different lengths on one canvas, the windows to be filled in the same columns."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.typing import Mask, Tokens


@flax.struct.dataclass
class Canvas:
    """What is decoded on: padding, prompt, window; and padding again where a window is shorter.

    Attributes:
        tokens: [b, l] int32, with masks in the window.
        valid: [b, l] bool, False on padding.
        position_ids: [b, l] int32, counted from each row's first token; 0 on padding before it.
        fillable: [b, w] bool, positions of the window that are generated; the window may begin
            with the end of a prompt.
        offset: [b] int32, where in the window the answer begins.
        start: first column of the window.
    """

    tokens: Tokens
    valid: Mask
    position_ids: Tokens
    fillable: Bool[Array, "b w"]
    offset: Int[Array, "b"]
    start: int = flax.struct.field(pytree_node=False)


def lay_out(prompts: Tokens, valid: Mask, config: DecodeConfig, mask_token_id: int) -> Canvas:
    """Put the prompts on a canvas so that all rows' blocks stand in the same columns.

    Every row gets what it gets alone, wherever its padding was: nobody sees padding, and positions
    are counted from the row's own first token.

    Args:
        prompts: [b, p] int32, each padded on the left, on the right, or on both sides.
        valid: [b, p] bool, False on padding; at least one True a row, side by side.
        config: window, blocks and their alignment.
        mask_token_id: id of the mask token.
    """
    block, by_row = config.block_size, config.alignment == "row"
    first, count = jnp.argmax(valid, axis=1), jnp.sum(valid, axis=1, dtype=jnp.int32)
    offset = count % block if by_row else jnp.zeros_like(count)
    start = prompts.shape[1] // block * block if by_row else prompts.shape[1]
    # What a row has of blocks is what it has alone; the last one may be longer than was asked for.
    window = -(-(offset + config.length) // block) * block
    # [b, l]: which of its own tokens, counted from 0, a row has in each column.
    own = jnp.arange(start + config.num_blocks * block) - (start - (count - offset))[:, None]
    end = (count - offset + window)[:, None]
    seen = (own >= 0) & (own < end)
    source = jnp.clip(first[:, None] + own, 0, prompts.shape[1] - 1)
    given = jnp.take_along_axis(prompts.astype(jnp.int32), source, axis=1)
    masked = seen & (own >= count[:, None])
    tokens = jnp.where(masked, mask_token_id, jnp.where(seen, given, 0))
    positions = jnp.maximum(own, 0).astype(jnp.int32)
    return Canvas(tokens, seen, positions, masked[:, start:], offset, start)


def pad_left(
    prompts: Sequence[Sequence[int]], width: int, pad_token_id: int
) -> tuple[Int[np.ndarray, "b p"], Bool[np.ndarray, "b p"]]:
    """Put prompts of different lengths into one array, ending in the same column.

    Args:
        prompts: token ids.
        width: columns p.
        pad_token_id: fills the columns before a prompt.

    Returns:
        (tokens [b, p] int32, valid [b, p] bool: False on padding).

    Raises:
        ValueError: there is no prompt, one is empty, or one is longer than ``width``.
    """
    if not len(prompts):
        raise ValueError("prompts is empty: there is nothing to decode")
    tokens = np.full((len(prompts), width), pad_token_id, np.int32)
    valid = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= width:
            raise ValueError(f"prompts[{row}] has {len(prompt)} tokens; it must have 1 to {width}")
        tokens[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    return tokens, valid


def move_left(tokens: Tokens, valid: Mask) -> tuple[Tokens, Mask]:
    """Shift every row so that it begins in column 0, its padding behind it; [b, p] each."""
    first = jnp.argmax(valid, axis=1)
    rolled = (jax.vmap(jnp.roll)(x, -first) for x in (tokens, valid))
    return tuple(rolled)  # type: ignore[return-value]
