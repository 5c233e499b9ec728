"""Who answers in a chat: a loaded model folder, watched and timed step by step."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.data.example import Example, Message
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import canvas
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.evaluation.systems import prompt_ids
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory.inner_loop import InnerParameters, InnerStep
from memdlm_jax.typing import Key, Mask, Phi, Theta, Tokens

UNBOUNDED = 1 << 30
"""More tokens than any conversation has."""

WIDTH = 64
"""Prompts are padded to multiples of this, so that growing conversations share programs."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What memory took in one turn.

    Attributes:
        compiling: seconds of compilation, part of neither of the others.
        writing: seconds in which the prompt was written.
        decoding: seconds in which the reply was decoded step by step, without showing it.
        weights: fast weights.
        size: their bytes.
        losses: of every inner step, before it; ``None`` where the step was left out.
    """

    compiling: float
    writing: float
    decoding: float
    weights: int
    size: int
    losses: list[float | None]

    def __str__(self) -> str:
        """One line."""
        share = 100 * self.writing / (self.writing + self.decoding)
        losses = ", ".join("left out" if x is None else f"{x:.4f}" for x in self.losses)
        compiled = f"; compiled in {self.compiling:.1f} s, not counted" if self.compiling else ""
        return (
            f"memory: writing {self.writing:.4f} s, decoding {self.decoding:.4f} s, share of "
            f"writing {share:.1f} %; {self.weights:,} fast weights, {self.size / 1e6:.3f} MB; "
            f"inner loss {losses}{compiled}"
        )


def losses_of(record: InnerStep) -> list[float | None]:
    """Loss of every inner step of the only row; pieces that the prompt does not have are left out.

    Args:
        record: leaves [steps, 1] or [pieces, steps, 1].
    """
    pairs = zip(np.ravel(record.loss).tolist(), np.ravel(record.skipped).tolist(), strict=True)
    return [None if skipped else loss for loss, skipped in pairs if skipped or loss == loss]


def fit(tokenizer: Tokenizer, turns: Sequence[Message], room: int) -> tuple[list[int], int]:
    """Ids of the conversation without as many oldest exchanges as it takes, and turns left out.

    Raises:
        ValueError: not even the last message fits, or the chat template refuses it.
    """
    ids: list[int] = []
    for first in range(0, len(turns), 2):
        ids = encoded(tokenizer, turns[first:])
        if len(ids) <= room:
            return ids, first
    raise ValueError(
        f"the message takes {len(ids)} tokens; it must have at most {room}, or max_length be larger"
    )


def encoded(tokenizer: Tokenizer, turns: Sequence[Message]) -> list[int]:
    """Ids of a conversation that ends with the opening of the model's turn, however long."""
    return prompt_ids(tokenizer, Example(tuple(turns), "?", "the chat", "chat"), UNBOUNDED)


def padded(tokenizer: Tokenizer, ids: Sequence[int], most: int) -> tuple[Tokens, Mask]:
    """Tokens and validity of one prompt, [1, p], with p a multiple of ``WIDTH`` or ``most``."""
    width = min(most, -(-len(ids) // WIDTH) * WIDTH)
    tokens, valid = canvas.pad_left([ids], width, tokenizer.pad_id)
    return jnp.asarray(tokens), jnp.asarray(valid)


class Answerer:
    """One generator with its weights; keeps what it has compiled."""

    def __init__(self, generator: Generator, theta: Theta, learned: InnerParameters | None):
        """Keep who answers.

        Args:
            generator: model, memory and sampler.
            theta: base parameters.
            learned: learned parts of the inner loop.
        """
        self.generator, self.theta, self.learned = generator, theta, learned
        self._writers: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._warm: set[tuple[int, ...]] = set()

    def answer(
        self,
        keys: Key,
        prompt: tuple[Tokens, Mask],
        written: tuple[Tokens, Mask],
        show: Callable[[Decoded], None],
        phi: Phi = None,
    ) -> tuple[Decoded, Phi, Cost | None]:
        """Write, if there is a memory, and decode.

        Args:
            keys: [1] PRNG key.
            prompt: (tokens [1, p], valid [1, p]).
            written: the same of what is written into memory.
            show: called with what stands there before the first step and after each.
            phi: a memory that was written before; then nothing is written.

        Returns:
            (the answer with its history, fast weights, what memory took); ``None`` for the last
            one where nothing was written, and for the last two without memory.
        """
        if self.generator.inner_loop is None:
            return self._decode(keys, prompt, None, show)[0], None, None
        if phi is not None:
            return self._decode(keys, prompt, phi, show)[0], phi, None
        arguments = self.theta, Prompts(keys, *written), self.learned
        writer, compiling = self._writer(arguments)
        began = time.perf_counter()
        phi, record = jax.block_until_ready(writer(*arguments))
        writing = time.perf_counter() - began
        compiling += self._warm_up(keys, prompt, phi)
        decoded, decoding = self._decode(keys, prompt, phi, show)
        leaves = jax.tree.leaves(phi)
        weights, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
        losses = losses_of(record)
        return decoded, phi, Cost(compiling, writing, decoding, weights, size, losses)

    def _writer(self, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], float]:
        """``generation.write``, compiled for these shapes, and seconds that this took now."""
        shape, began = arguments[1].tokens.shape, time.perf_counter()
        if shape in self._writers:
            return self._writers[shape], 0.0
        write = jax.jit(generation.write, static_argnums=(0,))
        self._writers[shape] = write.lower(self.generator, *arguments).compile()
        # A program's first run takes longer than its others.
        jax.block_until_ready(self._writers[shape](*arguments))
        return self._writers[shape], time.perf_counter() - began

    def _warm_up(self, keys: Key, prompt: tuple[Tokens, Mask], phi: Phi) -> float:
        """Compile the decoding for this shape by its first steps; seconds that this took."""
        shape, began = prompt[0].shape, time.perf_counter()
        if shape in self._warm:
            return 0.0
        # Writing while decoding happens between blocks: only a whole run compiles it.
        few = None if self.generator.adapt_every else 3
        for _ in itertools.islice(self._steps(keys, prompt, phi), few):
            pass
        self._warm.add(shape)
        return time.perf_counter() - began

    def _steps(self, keys: Key, prompt: tuple[Tokens, Mask], phi: Phi) -> Iterator[Decoded]:
        prompts = Prompts(keys, *prompt)
        return generation.watch(self.generator, self.theta, prompts, self.learned, phi, record=True)

    def _decode(
        self,
        keys: Key,
        prompt: tuple[Tokens, Mask],
        phi: Phi,
        show: Callable[[Decoded], None],
    ) -> tuple[Decoded, float]:
        """The answer, and the seconds that it took without ``show``."""
        steps, seconds = self._steps(keys, prompt, phi), 0.0
        last: Any = None
        while True:
            began = time.perf_counter()
            decoded = next(steps, None)
            seconds += time.perf_counter() - began
            if decoded is None:
                return last, seconds
            last = decoded
            show(decoded)
