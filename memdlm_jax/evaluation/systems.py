"""The three systems under comparison, and how each answers prompts."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import decode, unmasking
from memdlm_jax.diffusion.decode import DecodeConfig, Decoded
from memdlm_jax.memory import fast_weights, prompt_memory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.typing import Denoiser, Key, Mask, Phi, Theta, Tokens

NAMES = ("mdlm", "memdlm_train_only", "memdlm")


@dataclasses.dataclass(frozen=True)
class System:
    """A trained denoiser and whether it writes prompts into memory.

    Attributes:
        name: ``mdlm`` (trained without memory), ``memdlm_train_only`` (trained with it, which is
            then thrown away) or ``memdlm`` (rebuilt from each prompt; paper, section 4.5).
        denoiser: the backbone.
        theta: base parameters.
        memory: how a prompt is written; ``None`` decodes without memory.
        inner: the learned inner loop's parameters, if it was learned.
    """

    name: str
    denoiser: Denoiser
    theta: Theta
    memory: MemoryConfig | None = None
    inner: InnerParameters | None = None


def three_systems(
    denoiser: Denoiser,
    mdlm_theta: Theta,
    memdlm_theta: Theta,
    memory: MemoryConfig,
    inner: InnerParameters | None = None,
) -> tuple[System, System, System]:
    """The comparison of the paper from two trained thetas; the last two systems share theirs."""
    return (
        System("mdlm", denoiser, mdlm_theta),
        System("memdlm_train_only", denoiser, memdlm_theta),
        System("memdlm", denoiser, memdlm_theta, memory, inner),
    )


@dataclasses.dataclass(frozen=True)
class Replies:
    """Answers of one system, in the order of the prompts.

    Attributes:
        texts: what stands before the first token that ends a turn or the sequence.
        lengths: [n] tokens of each text.
        decoded: the whole windows, numpy leaves [n, length].
    """

    texts: list[str]
    lengths: np.ndarray
    decoded: Decoded


def reply(
    system: System,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    *,
    seed: int,
    max_length: int,
    batch_size: int = 8,
) -> Replies:
    """Answer prompts in text; the other arguments are those of ``respond``."""
    decoded = respond(
        system, prompts, config, seed=seed, pad_token_id=tokenizer.pad_id, max_length=max_length,
        batch_size=batch_size,
    )  # fmt: skip
    ends = {tokenizer.eos_id, tokenizer.end_of_turn_id}
    lengths = np.min([unmasking.text_lengths(decoded.tokens, end) for end in ends], axis=0)
    rows = zip(decoded.tokens, lengths, strict=True)
    return Replies([tokenizer.decode(row[:n]) for row, n in rows], lengths, decoded)


def prompt_ids(tokenizer: Tokenizer, example: Example, max_length: int) -> list[int]:
    """Ids of an example's prompt, encoded as in training; its response is not read.

    Raises:
        ValueError: the prompt is longer than ``max_length``, or there is none.
    """
    encoder = Encoder(tokenizer, EncodeConfig(max_length))
    row = encoder.encode(dataclasses.replace(example, response="?"))
    if isinstance(row, str):
        raise ValueError(
            f"the prompt of {example.group!r} does not fit max_length={max_length}: {row}"
        )
    if row.prompt_length == 0:
        raise ValueError(f"the prompt of {example.group!r} is empty; it must have some text")
    return row.tokens[: row.prompt_length].tolist()


def respond(
    system: System,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    *,
    seed: int,
    pad_token_id: int,
    max_length: int,
    batch_size: int = 8,
) -> Decoded:
    """Answer every prompt; compiled once for all batches of one width.

    A row's answer depends on the seed, its index and its prompt, never on its neighbours.

    Args:
        system: who answers.
        prompts: n sequences of token ids.
        config: sampler settings.
        seed: of the memory's draws and the sampling noise.
        pad_token_id: fills the columns before short prompts.
        max_length: longest canvas, prompt and answer together, in tokens.
        batch_size: rows decoded at a time; the last batch repeats its last row to fill up.

    Returns:
        ``Decoded`` with numpy leaves [n, config.length].

    Raises:
        ValueError: a prompt is empty or leaves no room for the answer, or there is none.
    """
    room = max_length - config.length
    longest = max(map(len, prompts), default=0)
    if longest > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens; it must have at most {room} "
            f"(max_length={max_length} less decode.length={config.length})"
        )
    # A multiple of 16, so that tasks of like length share a compilation.
    width = min(room, -(-longest // 16) * 16)
    tokens, valid = decode.pad_left(prompts, width, pad_token_id)
    n, root, parts = len(prompts), jax.random.key(seed), []
    batch_size = min(batch_size, n)
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), n - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, rows)
        parts.append(
            jax.device_get(
                respond_to_batch(
                    system.denoiser, system.memory, config, system.theta, keys,
                    tokens[rows], valid[rows], system.inner,
                )
            )
        )  # fmt: skip
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def respond_to_batch(
    denoiser: Denoiser,
    memory: MemoryConfig | None,
    config: DecodeConfig,
    theta: Theta,
    keys: Key,
    prompts: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
) -> Decoded:
    """Write the prompts into memory, if there is one, and decode.

    Args:
        denoiser: the backbone.
        memory: how prompts are written, or ``None``.
        config: sampler settings.
        theta: base parameters.
        keys: [b] one PRNG key per row.
        prompts: [b, p] int32, padded on the left.
        valid: [b, p] bool, False on padding.
        inner: the learned inner loop's parameters.
    """
    memory_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    phi, split = None, denoiser.num_layers
    if memory is not None:
        # Draws are by column: with its padding behind it, a prompt has the columns it has alone.
        padding = jnp.sum(~valid, axis=1)
        tokens, seen = (jax.vmap(jnp.roll)(x, -padding) for x in (prompts, valid))
        phi = write_prompts(memory_keys, denoiser, memory, theta, tokens, seen, inner)
        split = fast_weights.split_of(denoiser, memory)
    seen, position_ids = decode.canvas_layout(valid, config.length)

    def predict(canvas, columns):
        hidden = denoiser.trunk(theta, canvas, seen, position_ids, split=split)
        last = fast_weights.head_with_memory(
            denoiser, theta, phi, hidden, seen, position_ids, split=split
        )
        return denoiser.readout(theta, last[:, columns])

    return decode.decode(predict, noise_keys, prompts, config, denoiser.mask_token_id)


def write_prompts(
    keys: Key,
    denoiser: Denoiser,
    memory: MemoryConfig,
    theta: Theta,
    prompts: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
) -> Phi:
    """Write each row's prompt into fast weights of its own, with a key of its own.

    Args:
        keys: [b] one PRNG key per row.
        denoiser: the backbone.
        memory: how prompts are written.
        theta: base parameters.
        prompts: [b, p] int32, beginning in column 0.
        valid: [b, p] bool, False on what is not prompt.
        inner: the learned inner loop's parameters.

    Returns:
        Phi with one group per row.
    """

    def write(key, tokens, valid):
        rows = tokens[None], valid[None]
        phi, _ = prompt_memory.write_prompt(key, denoiser, memory, theta, *rows, inner=inner)
        return jax.tree.map(lambda leaf: leaf[0], phi)

    return jax.vmap(write)(keys, prompts, valid)
