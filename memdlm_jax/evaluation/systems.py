"""The three systems under comparison, and how each answers prompts."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import canvas, unmasking
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.memory import generation
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.generation import Generator
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.typing import Denoiser, Theta

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
    record: bool = False,
) -> Replies:
    """Answer prompts in text; the other arguments are those of ``respond``.

    Decoding stops where the text ends; ``config.stop`` says otherwise. Tokens of ``config.stop``
    do not end the text by themselves.
    """
    ends = sorted({tokenizer.eos_id, tokenizer.end_of_turn_id})
    if not config.stop:
        # A row's text is complete when the block that ends it is: no later block changes it.
        config = dataclasses.replace(config, stop=tuple(ends))
    decoded = respond(
        system, prompts, config, seed=seed, pad_token_id=tokenizer.pad_id, max_length=max_length,
        batch_size=batch_size, record=record,
    )  # fmt: skip
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
    record: bool = False,
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
        record: keep the window after every step.

    Returns:
        ``Decoded`` with numpy leaves [n, config.length].

    Raises:
        ValueError: a prompt is empty or leaves no room for the answer, or there is none.
    """
    room = max_length - config.length
    longest = max(map(len, prompts), default=0)
    context = None
    if longest > room:
        chunk = system.memory.prompt_chunk if system.memory else 0
        if not chunk:
            raise ValueError(
                f"the longest prompt has {longest} tokens; it must have at most {room} "
                f"(max_length={max_length} less decode.length={config.length}). With memory, "
                "memory.prompt_chunk lets longer ones be written in pieces, and their end be shown"
            )
        if chunk > max_length:
            raise ValueError(f"memory.prompt_chunk={chunk} must be at most max_length={max_length}")
        context = canvas.pad_left(prompts, _rounded(longest), pad_token_id)
        prompts = [prompt[-room:] for prompt in prompts]
        longest = room
    tokens, valid = canvas.pad_left(prompts, min(room, _rounded(longest)), pad_token_id)
    generator = Generator(system.denoiser, system.memory, config)
    n, root, parts = len(prompts), jax.random.key(seed), []
    batch_size = min(batch_size, n)
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), n - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, rows)
        written = None if context is None else (context[0][rows], context[1][rows])
        decoded = generation.generate(
            generator, system.theta, keys, tokens[rows], valid[rows], system.inner,
            context=written, record=record,
        )  # fmt: skip
        parts.append(jax.device_get(decoded))
    return _joined(parts, n)


def _rounded(length: int) -> int:
    """A multiple of 16, so that tasks of like length share a compilation."""
    return -(-length // 16) * 16


def _joined(parts: Sequence[Decoded], n: int) -> Decoded:
    """The first n rows of the batches in one; counts of passes are added up."""

    def rows(name):
        return np.concatenate([getattr(part, name) for part in parts])[:n]

    names = ["tokens", "commit_step", "confidence", "steps"]
    names += ["history"] * (parts[0].history is not None)
    whole, partial = (np.sum([getattr(p, name) for p in parts]) for name in ("whole", "parts"))
    joined = {name: rows(name) for name in names}
    return dataclasses.replace(parts[0], **joined, whole=whole, parts=partial)
