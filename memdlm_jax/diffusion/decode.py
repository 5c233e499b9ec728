"""The denoising loop: blocks from left to right, a fixed number of commits per step."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.diffusion import unmasking
from memdlm_jax.typing import Key, Mask, Tokens


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Settings of LLaDA's sampler (Nie et al., arXiv 2502.09992).

    Attributes:
        length: tokens to generate.
        block_length: tokens of a block; blocks are filled one after the other.
        steps: denoising steps in all, the same number for every block.
        temperature: of the Gumbel noise on the logits; 0 takes the most probable token.
    """

    length: int = 128
    block_length: int = 32
    steps: int = 128
    temperature: float = 0.0

    def __post_init__(self):
        for name in ("length", "block_length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"decode.{name}={getattr(self, name)} must be at least 1")
        if self.length % self.block_length:
            raise ValueError(
                f"decode.block_length={self.block_length} must divide length={self.length}"
            )
        if self.steps % self.num_blocks:
            raise ValueError(
                f"decode.steps={self.steps} must be a multiple of the {self.num_blocks} blocks"
            )
        if self.steps > self.length:
            raise ValueError(
                f"decode.steps={self.steps} must be at most length={self.length}: "
                "every step commits a token"
            )
        if self.temperature < 0:
            raise ValueError(f"decode.temperature={self.temperature} must be at least 0")

    @property
    def num_blocks(self) -> int:
        """Blocks to fill."""
        return self.length // self.block_length


class Predict(Protocol):
    """The model as the loop sees it."""

    def __call__(self, canvas: Tokens, columns: Int[Array, "c"]) -> Float[Array, "b c v"]:
        """Logits at the given columns of the canvas; nowhere else are any needed."""
        ...


@flax.struct.dataclass
class Decoded:
    """What was generated, and how. A committed token never changes: ``history`` needs no more.

    Attributes:
        tokens: [b, length] int32, free of mask tokens.
        commit_step: [b, length] int32, the step at which each token was committed.
        confidence: [b, length] float32, probability of each token when it was committed.
    """

    tokens: Int[Array, "b l"]
    commit_step: Int[Array, "b l"]
    confidence: Float[Array, "b l"]


def decode(
    predict: Predict, keys: Key, prompts: Tokens, config: DecodeConfig, mask_token_id: int
) -> Decoded:
    """Fill a window of masks after the prompts; to be compiled, once per shape.

    Each step predicts the current block from the whole canvas, later blocks' masks included, and
    commits the step's quota of its most confident masked positions.

    Args:
        predict: the model.
        keys: [b] one PRNG key per row.
        prompts: [b, p] int32, padded on the left: the window stands in the same columns for all.
        config: sampler settings.
        mask_token_id: id of the mask token.

    Returns:
        ``Decoded``; what stands behind the first eos is still in it, see
        ``unmasking.text_lengths``.
    """
    prompts = prompts.astype(jnp.int32)
    prompt_length = prompts.shape[1]
    block_columns = jnp.arange(config.block_length)

    def step(decoded, now):
        canvas = jnp.concatenate([prompts, decoded.tokens], axis=1)
        logits = predict(canvas, prompt_length + now["start"] + block_columns)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, now["index"])
        tokens = unmasking.propose(step_keys, logits, config.temperature, mask_token_id)
        scores = unmasking.confidence(logits, tokens)
        block = jax.lax.dynamic_slice_in_dim(decoded.tokens, now["start"], tokens.shape[1], 1)
        commit = unmasking.most_confident(scores, block == mask_token_id, now["quota"])
        proposed = Decoded(tokens, jnp.full_like(tokens, now["index"]), scores)
        return _put(decoded, proposed, commit, now["start"]), None

    window = jnp.full((prompts.shape[0], config.length), mask_token_id, jnp.int32)
    empty = Decoded(window, jnp.zeros_like(window), jnp.zeros(window.shape, jnp.float32))
    return jax.lax.scan(step, empty, _plan(config))[0]


def _plan(config: DecodeConfig) -> dict[str, Int[np.ndarray, "s"]]:
    """Start of the block, quota and index of every step."""
    steps = config.steps // config.num_blocks
    quotas = unmasking.even_quotas(config.block_length, steps)
    index = np.arange(config.steps, dtype=np.int32)
    return {
        "start": index // steps * config.block_length,
        "quota": np.tile(np.array(quotas, np.int32), config.num_blocks),
        "index": index,
    }


def _put(decoded: Decoded, proposed: Decoded, commit: Bool[Array, "b c"], start) -> Decoded:
    """Write the committed proposals of a block into the window."""

    def write(old, new):
        block = jax.lax.dynamic_slice_in_dim(old, start, new.shape[1], 1)
        block = jnp.where(commit, new.astype(old.dtype), block)
        return jax.lax.dynamic_update_slice_in_dim(old, block, start, 1)

    return jax.tree.map(write, decoded, proposed)


def history(decoded: Decoded, mask_token_id: int) -> Int[np.ndarray, "s b l"]:
    """The window before the first step and after each one; [steps + 1, b, length] int32."""
    tokens, commit_step = np.asarray(decoded.tokens), np.asarray(decoded.commit_step)
    steps = np.arange(commit_step.max() + 2)[:, None, None]
    return np.where(commit_step < steps, tokens, np.int32(mask_token_id))


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


def canvas_layout(valid: Mask, length: int) -> tuple[Mask, Tokens]:
    """Valid mask and position ids of a left-padded canvas.

    Args:
        valid: [b, p] bool, False on the padding of the prompts.
        length: tokens to generate.

    Returns:
        (valid [b, p + length], position ids [b, p + length] int32 that count from 0 at each row's
        first token, so that every row sees what it sees alone).
    """
    window = jnp.ones((valid.shape[0], length), bool)
    valid = jnp.concatenate([valid, window], axis=1)
    return valid, jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
