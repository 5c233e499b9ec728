"""Answer prompts: write them into memory, decode, and perhaps go on writing while decoding.

``generate`` is compiled as one program. ``start``, ``advance`` and ``finish`` are the same in
pieces, for those who look on or put something in between.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion import canvas as canvases
from memdlm_jax.diffusion import decode, objective
from memdlm_jax.diffusion.canvas import Canvas
from memdlm_jax.diffusion.decode import Decoded, State
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.inference.memory_reader import MemoryReader
from memdlm_jax.memory import written
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters, InnerStep
from memdlm_jax.typing import Denoiser, Key, Phi, Theta


@dataclasses.dataclass(frozen=True)
class Generator:
    """Denoiser, memory and sampler: everything that a compiled program is made for.

    Attributes:
        denoiser: the backbone.
        inner_loop: writes prompts into memory, on the same denoiser; ``None`` for no memory.
        config: sampler settings.
    """

    denoiser: Denoiser
    inner_loop: InnerLoop | None
    config: DecodeConfig

    def __post_init__(self):
        if self.inner_loop is not None and self.inner_loop.denoiser != self.denoiser:
            raise ValueError("inner_loop.denoiser must be the denoiser that generates")

    @property
    def split(self) -> int:
        """Number of trunk layers."""
        if self.inner_loop is None:
            return objective.plain_split(self.denoiser)
        return self.inner_loop.split

    @property
    def adapt_every(self) -> int:
        """Blocks between further writing while decoding; 0 for none."""
        return 0 if self.inner_loop is None else self.inner_loop.config.adapt_every


@flax.struct.dataclass
class Prompts:
    """Prompts to answer.

    Attributes:
        keys: [b] one PRNG key per row.
        tokens: [b, p] int32, padded on either side; an array of jax or numpy, as all here.
        valid: [b, p] bool, False on padding.
        written: (tokens [b, c], valid [b, c]) to write into memory instead of the prompts.
    """

    keys: Key
    tokens: Any
    valid: Any
    written: tuple[Any, Any] | None = None


@flax.struct.dataclass
class Progress:
    """A generation under way.

    Attributes:
        keys: [b] PRNG keys of the noise.
        memory_keys: [b] PRNG keys of what memory draws while decoding.
        canvas: prompts and windows.
        state: where the decode loop is.
        phi: fast weights, one group per row or one for all, or ``None``.
    """

    keys: Key
    memory_keys: Key
    canvas: Canvas
    state: State
    phi: Phi


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("record",))
def generate(
    generator: Generator,
    theta: Theta,
    prompts: Prompts,
    learned: InnerParameters | None = None,
    phi: Phi = None,
    *,
    record: bool = False,
) -> Decoded:
    """Write the prompts into memory, if there is one, and decode; compiled once per shape.

    A row's answer depends on its key and its prompt, never on its neighbours or on padding.

    Args:
        generator: model, memory and sampler.
        theta: base parameters.
        prompts: what to answer.
        learned: learned parts of the inner loop.
        phi: memory that was written before, one group per row or one for all; then nothing is
            written.
        record: keep the window after every step.
    """
    progress = start(generator, theta, prompts, learned, phi, record=record)
    blocks = generator.config.num_blocks
    every = generator.adapt_every
    if not every:
        return finish(generator, advance(generator, theta, progress, blocks))

    def segment(progress, until):
        progress = advance(generator, theta, progress, until)
        done = (until >= blocks) | jnp.all(progress.state.finished)
        write = functools.partial(write_on, generator, theta, learned=learned)
        return jax.lax.cond(done, lambda p: p, write, progress), None

    untils = jnp.arange(every, blocks + every, every)
    return finish(generator, jax.lax.scan(segment, progress, untils)[0])


def write(
    generator: Generator, theta: Theta, prompts: Prompts, learned: InnerParameters | None = None
) -> tuple[Phi, InnerStep]:
    """Write prompts into memory as ``generate`` does with the same keys.

    The result can be given to ``generate`` again and again, for other questions on the same text.

    Returns:
        (phi with one group per row, record of the inner steps).

    Raises:
        ValueError: the generator has no memory.
    """
    memory_keys, _ = jnp.unstack(jax.vmap(jax.random.split)(prompts.keys), axis=1)
    # Draws are by column: with its padding at the end, a prompt has the columns it has alone.
    rows = (prompts.tokens, prompts.valid) if prompts.written is None else prompts.written
    rows = canvases.move_left(*rows)
    return written.write_prompts(memory_keys, _loop(generator), theta, *rows, learned)


def start(
    generator: Generator,
    theta: Theta,
    prompts: Prompts,
    learned: InnerParameters | None = None,
    phi: Phi = None,
    *,
    record: bool = False,
) -> Progress:
    """Write, lay out the canvas, and stop before the first step; arguments as in ``generate``."""
    if generator.inner_loop is None and not (phi is None and prompts.written is None):
        raise ValueError("inner_loop=None: there is no memory for phi or for prompts.written")
    if generator.inner_loop is not None and phi is None:
        phi, _ = write(generator, theta, prompts, learned)
    if generator.adapt_every:  # From here on every row writes in its own.
        rows = len(prompts.tokens)
        phi = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), phi)
    memory_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(prompts.keys), axis=1)
    mask = generator.denoiser.mask_token_id
    canvas = canvases.lay_out(prompts.tokens, prompts.valid, generator.config, mask)
    loop = loop_of(generator, theta, canvas, noise_keys, phi)
    return Progress(noise_keys, memory_keys, canvas, loop.begin(record=record), phi)


def loop_of(generator: Generator, theta: Theta, canvas: Canvas, keys: Key, phi: Phi) -> decode.Loop:
    """The decode loop of this model with this memory."""
    d, config = generator.denoiser, generator.config
    readers = _readers(generator, theta, canvas, phi)
    return decode.Loop(readers, keys, canvas, config, d.mask_token_id)


def _readers(generator: Generator, theta: Theta, canvas: Canvas, phi: Phi) -> list[MemoryReader]:
    d, config = generator.denoiser, generator.config
    reader = MemoryReader(
        d, theta, phi, generator.split, canvas, config, keep_hidden=_keeps_hidden(generator)
    )
    if config.guidance == 0:
        return [reader]
    return [reader, dataclasses.replace(reader, unprompted=True)]


def _keeps_hidden(generator: Generator) -> bool:
    # Under full attention the cache is made anew at every block, and phi changes between blocks.
    return generator.adapt_every > 0 and generator.config.attention == "block_causal"


def _loop(generator: Generator) -> InnerLoop:
    if generator.inner_loop is None:
        raise ValueError("inner_loop=None: there is no memory to write into")
    return generator.inner_loop


def advance(generator: Generator, theta: Theta, progress: Progress, until) -> Progress:
    """From the beginning of a block, take steps until another begins or all rows are finished."""
    loop = loop_of(generator, theta, progress.canvas, progress.keys, progress.phi)
    return dataclasses.replace(progress, state=loop.run(progress.state, until))


def advance_one_step(generator: Generator, theta: Theta, progress: Progress) -> Progress:
    """Take one step."""
    loop = loop_of(generator, theta, progress.canvas, progress.keys, progress.phi)
    return dataclasses.replace(progress, state=loop.step(progress.state))


def write_on(
    generator: Generator,
    theta: Theta,
    progress: Progress,
    learned: InnerParameters | None = None,
) -> Progress:
    """Further inner steps on prompt and committed text, between two blocks.

    Beyond the paper, which names it as future work. The trunk's keys and values stay cached.
    """
    canvas, state = progress.canvas, progress.state
    reached = canvas.start + state.block * generator.config.block_size
    behind = jnp.arange(state.tokens.shape[1]) < reached
    # The last condition is for rows that stopped early.
    committed = canvas.valid & behind & (state.tokens != generator.denoiser.mask_token_id)
    tokens, committed = canvases.move_left(state.tokens, committed)
    keys = jax.vmap(jax.random.fold_in, (0, None))(progress.memory_keys, 1 + state.block)
    phi, _ = written.write_prompts(
        keys, _loop(generator), theta, tokens, committed, learned, progress.phi
    )
    if state.caches and _keeps_hidden(generator):
        readers = _readers(generator, theta, canvas, phi)
        pairs = zip(readers, state.caches, strict=True)
        state = dataclasses.replace(state, caches=tuple(r.renewed(cache) for r, cache in pairs))
    return dataclasses.replace(progress, phi=phi, state=state)


def finish(generator: Generator, progress: Progress) -> Decoded:
    """The answers out of the canvas."""
    loop = loop_of(generator, None, progress.canvas, progress.keys, progress.phi)
    return loop.finish(progress.state)


_start = jax.jit(start, static_argnums=(0,), static_argnames=("record",))
_one_step = jax.jit(advance_one_step, static_argnums=(0,))
_write_on = jax.jit(write_on, static_argnums=(0,))


def watch(
    generator: Generator,
    theta: Theta,
    prompts: Prompts,
    learned: InnerParameters | None = None,
    phi: Phi = None,
    *,
    record: bool = False,
) -> Iterator[Decoded]:
    """``generate`` step by step: the canvas before the first step and after each one.

    Positions that are not committed yet hold mask tokens. The last item is what ``generate``
    returns.
    """
    progress = _start(generator, theta, prompts, learned, phi, record=record)
    yield jax.device_get(_seen(generator, progress))
    updates = 0

    def is_over(state: State) -> bool:
        return bool(state.block >= generator.config.num_blocks or np.all(state.finished))

    while not is_over(progress.state):
        progress = _one_step(generator, theta, progress)
        if generator.adapt_every and not is_over(progress.state):
            due = int(progress.state.block) // generator.adapt_every
            if due > updates:
                progress, updates = _write_on(generator, theta, progress, learned), due
        yield jax.device_get(_seen(generator, progress))


@functools.partial(jax.jit, static_argnums=(0,))
def _seen(generator: Generator, progress: Progress) -> Decoded:
    seen = finish(generator, progress)
    # Before the end, positions that were not decoded keep their mask tokens.
    done = jnp.all(progress.state.finished)
    columns = progress.canvas.offset[:, None] + jnp.arange(generator.config.length)
    window = progress.state.tokens[:, progress.canvas.start :]
    raw = jnp.take_along_axis(window, columns, axis=1)
    return dataclasses.replace(seen, tokens=jnp.where(done, seen.tokens, raw))
