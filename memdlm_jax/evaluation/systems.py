"""The three systems under comparison, and how each answers prompts."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import canvas, unmasking
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.inference import data_parallel, generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import (
    InnerLoop,
    InnerParameters,
    InnerStep,
    inner_loop_for,
)
from memdlm_jax.typing import Denoiser, Phi, Theta

NAMES = ("mdlm", "memdlm_train_only", "memdlm")


@dataclasses.dataclass(frozen=True)
class System:
    """A trained denoiser and whether it writes prompts into memory.

    Attributes:
        name: ``mdlm`` (trained without memory), ``memdlm_train_only`` (trained with it, which is
            then thrown away) or ``memdlm`` (rebuilt from each prompt; paper, section 4.5).
        denoiser: the backbone.
        theta: base parameters.
        inner_loop: writes prompts into memory, on the same denoiser; ``None`` decodes without
            memory.
        learned: learned parts of the inner loop, if it has any.
    """

    name: str
    denoiser: Denoiser
    theta: Theta
    inner_loop: InnerLoop | None = None
    learned: InnerParameters | None = None

    @property
    def memory(self) -> MemoryConfig | None:
        """Settings of the inner loop, ``None`` without memory."""
        return None if self.inner_loop is None else self.inner_loop.config

    def with_memory(self, memory: MemoryConfig | None) -> "System":
        """The same weights, writing prompts with other settings; ``None`` writes nothing."""
        return dataclasses.replace(self, inner_loop=inner_loop_for(self.denoiser, memory))


def three_systems(
    denoiser: Denoiser,
    mdlm_theta: Theta,
    memdlm_theta: Theta,
    memory: MemoryConfig,
    learned: InnerParameters | None = None,
) -> tuple[System, System, System]:
    """The comparison of the paper from two trained thetas; the last two systems share theirs."""
    return (
        System("mdlm", denoiser, mdlm_theta),
        System("memdlm_train_only", denoiser, memdlm_theta),
        System("memdlm", denoiser, memdlm_theta, InnerLoop(denoiser, memory), learned),
    )


@dataclasses.dataclass(frozen=True)
class Replies:
    """Answers of one system, in the order of the prompts.

    Attributes:
        texts: what stands before the first token that ends one.
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
    **settings,
) -> Replies:
    """Answer prompts in text; the other arguments are those of ``respond``."""
    config = stopping(config, tokenizer)
    settings = {"pad_token_id": tokenizer.pad_id} | settings
    return replies(tokenizer, respond(system, prompts, config, **settings), config.stop)


def stopping(config: DecodeConfig, tokenizer: Tokenizer) -> DecodeConfig:
    """Let decoding stop where the text ends: at ``config.stop`` and the tokenizer's ends.

    The text is complete when the block that ends it is: no later block changes it.
    """
    ends = sorted({tokenizer.eos_id, tokenizer.end_of_turn_id} - {*config.stop})
    return dataclasses.replace(config, stop=(*config.stop, *ends))


def replies(tokenizer: Tokenizer, decoded: Decoded, ends: Sequence[int]) -> Replies:
    """The texts of decoded windows, each up to the first of the tokens that end one."""
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
    **settings,
) -> Decoded:
    """Answer every prompt at once; the other arguments are those of ``batches``.

    Returns:
        ``Decoded`` with numpy leaves [n, config.length].
    """
    return _joined(list(batches(system, prompts, config, **settings)))


def batches(
    system: System,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    *,
    seed: int,
    pad_token_id: int,
    max_length: int,
    batch_size: int = 8,
    phi: Phi = None,
    record: bool = False,
    numbers: Sequence[int] | None = None,
    width: int = 0,
) -> Iterator[Decoded]:
    """Answer prompts batch by batch; compiled once for all batches of one width.

    A row's answer depends on the seed, its number and its prompt, never on its neighbours.

    Args:
        system: who answers.
        prompts: n sequences of token ids.
        config: sampler settings.
        seed: of the memory's draws and the sampling noise.
        pad_token_id: fills the columns before short prompts.
        max_length: longest canvas, prompt and answer together, in tokens.
        batch_size: rows decoded at a time, divided over the devices of this process; the last
            batch repeats its last row to fill up.
        phi: a memory that was written before, of one group, for all prompts; none is written.
        record: keep the window after every step.
        numbers: of the prompts, which their draws hang on; ``None`` counts them.
        width: columns that prompts are padded to, at least; calls of one width share a compilation,
            and what is written into memory in pieces is cut alike in all of them.

    Yields:
        ``Decoded`` with numpy leaves [rows, config.length].

    Raises:
        ValueError: a prompt is empty or leaves no room for the answer, or there is none.
    """
    room = _room(config, max_length)
    check_tokens(system.denoiser, prompts, config)
    longest = max(map(len, prompts), default=0)
    context = None
    chunk = system.memory.prompt_chunk if system.memory else 0
    if longest > room or (chunk and width > room):
        if not chunk:
            raise ValueError(
                f"the longest prompt has {longest} tokens; it must have at most {room} "
                f"(max_length={max_length} less decode.length={config.length}). With memory, "
                "memory.prompt_chunk lets longer ones be written in pieces, and their end be shown"
            )
        if chunk > max_length:
            raise ValueError(f"memory.prompt_chunk={chunk} must be at most max_length={max_length}")
        if phi is None:
            context = canvas.pad_left(prompts, rounded(max(longest, width)), pad_token_id)
        prompts = [prompt[-room:] for prompt in prompts]
        longest = room
    columns = min(room, rounded(max(longest, width)))
    tokens, valid = canvas.pad_left(prompts, columns, pad_token_id)
    generator = Generator(system.denoiser, system.inner_loop, config)
    n, root = len(prompts), jax.random.key(seed)
    counted = np.arange(n) if numbers is None else np.asarray(numbers)
    batch_size = min(batch_size, n)
    devices = jax.local_devices()[:batch_size]
    theta, learned = data_parallel.replicate((system.theta, system.learned), devices)
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), n - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, counted[rows])
        written = None if context is None else (context[0][rows], context[1][rows])
        some = Prompts(keys, tokens[rows], valid[rows], written)
        decoded = data_parallel.generate(generator, theta, some, learned, phi, record=record)
        found = _first_rows(jax.device_get(decoded), n - start)
        if not np.isfinite(found.confidence).all():
            cause = ", or memory.learning_rate is too large" if system.memory else ""
            raise FloatingPointError(
                f"{system.name}: logits are not finite among the prompts from number {start} on: "
                f"the weights are damaged{cause}"
            )
        yield found


def _room(config: DecodeConfig, max_length: int) -> int:
    """Columns that a prompt may have beside the answer's window."""
    # Blocks that are counted from the row's start are whole at its end.
    whole = config.block_size if config.alignment == "row" else 1
    room = max_length // whole * whole - config.length
    if room < 1:
        raise ValueError(
            f"decode.length={config.length} leaves no room for a prompt in max_length={max_length}"
        )
    return room


def check_tokens(
    denoiser: Denoiser, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> None:
    """Refuse token ids that the model does not have; does nothing if its vocabulary is unknown.

    Raises:
        ValueError: an id is not below the size of the vocabulary, or all tokens are suppressed.
    """
    size = getattr(getattr(denoiser, "config", None), "vocab_size", None)
    if size is None:
        return
    for field in ("stop", "suppress", "defer", "guidance_keep"):
        for token in getattr(config, field):
            if token >= size:
                raise ValueError(f"decode.{field} has {token}, which must be below {size}")
    if len({*config.suppress, denoiser.mask_token_id}) == size:
        raise ValueError("decode.suppress has every token: none is left to generate")
    for row, prompt in enumerate(prompts):
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < size:
            raise ValueError(
                f"prompts[{row}] has ids from {min(prompt)} to {max(prompt)}; they "
                f"must lie in [0, {size})"
            )


def write_context(
    system: System, tokens: Sequence[int], seed: int, pad_token_id: int
) -> tuple[Phi, InnerStep]:
    """Write one text into memory, to be asked about with ``batches(phi=...)``.

    Args:
        system: whose memory it is.
        tokens: ids of the text.
        seed: of the memory's draws.
        pad_token_id: fills up the row.

    Returns:
        (phi of one group, record of the inner steps, numpy leaves).
    """
    row = canvas.pad_left([tokens], rounded(len(tokens)), pad_token_id)
    generator = Generator(system.denoiser, system.inner_loop, DecodeConfig())
    prompts = Prompts(jax.random.key(seed)[None], *row)
    write = jax.jit(generation.write, static_argnums=0)
    return jax.device_get(write(generator, system.theta, prompts, system.learned))


def rounded(length: int) -> int:
    """A multiple of 16, so that tasks of like length share a compilation."""
    return -(-length // 16) * 16


def _first_rows(decoded: Decoded, n: int) -> Decoded:
    return jax.tree.map(lambda leaf: leaf[:n] if np.ndim(leaf) else leaf, decoded)


def _joined(parts: Sequence[Decoded]) -> Decoded:
    """Batches in one; counts of passes are added up."""

    def join(*leaves):
        return np.concatenate(leaves) if np.ndim(leaves[0]) else np.sum(leaves)

    return jax.tree.map(join, *parts)
