"""Answer prompts: write them into memory, decode, and perhaps go on writing while decoding.

``generate`` is compiled as one program. ``start``, ``advance`` and ``finish`` are the same in
pieces, for those who look on or put something in between.
"""

import dataclasses
import functools
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memdlm_jax.diffusion import canvas as canvases
from memdlm_jax.diffusion import decode
from memdlm_jax.diffusion.canvas import Canvas
from memdlm_jax.diffusion.decode import Decoded, State
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.memory import fast_weights, prompt_memory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.fast_weights import LowRank
from memdlm_jax.memory.inner_loop import InnerStep
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.memory.reader import MemoryReader
from memdlm_jax.typing import Denoiser, Key, Mask, Phi, Theta, Tokens


@dataclasses.dataclass(frozen=True)
class Generator:
    """Who answers, and how; all that a compiled program is made for.

    Attributes:
        denoiser: the backbone.
        memory: how prompts are written, or ``None`` for no memory.
        config: sampler settings.
    """

    denoiser: Denoiser
    memory: MemoryConfig | None
    config: DecodeConfig

    @property
    def split(self) -> int:
        """Number of trunk layers."""
        if self.memory is None:
            return fast_weights.plain_split(self.denoiser)
        return fast_weights.split_of(self.denoiser, self.memory)

    @property
    def adapt_every(self) -> int:
        """Blocks between further writing while decoding; 0 for none."""
        return 0 if self.memory is None else self.memory.adapt_every


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
    keys: Key,
    prompts: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
    phi: Phi = None,
    context: tuple[Tokens, Mask] | None = None,
    *,
    record: bool = False,
) -> Decoded:
    """Write the prompts into memory, if there is one, and decode; compiled once per shape.

    A row's answer depends on its key and its prompt, never on its neighbours or on padding.

    Args:
        generator: who answers.
        theta: base parameters.
        keys: [b] one PRNG key per row.
        prompts: [b, p] int32, padded on either side.
        valid: [b, p] bool, False on padding.
        inner: the learned inner loop's parameters.
        phi: memory that was written before, one group per row or one for all; then nothing is
            written.
        context: (tokens [b, c], valid [b, c]) to be written in the place of the prompts.
        record: keep the window after every step.
    """
    progress = start(generator, theta, keys, prompts, valid, inner, phi, context, record=record)
    blocks = generator.config.num_blocks
    every = generator.adapt_every
    if not every:
        return finish(generator, advance(generator, theta, progress, blocks))

    def segment(progress, until):
        progress = advance(generator, theta, progress, until)
        done = (until >= blocks) | jnp.all(progress.state.finished)
        write = functools.partial(write_on, generator, theta, inner=inner)
        return jax.lax.cond(done, lambda p: p, write, progress), None

    untils = jnp.arange(every, blocks + every, every)
    return finish(generator, jax.lax.scan(segment, progress, untils)[0])


def write(
    generator: Generator,
    theta: Theta,
    keys: Key,
    tokens: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
) -> tuple[Phi, InnerStep]:
    """Write prompts into memory as ``generate`` does with the same keys.

    The result can be given to ``generate`` again and again, for other questions on the same text.

    Returns:
        (phi with one group per row, record of the inner steps).

    Raises:
        ValueError: the generator has no memory.
    """
    memory_keys, _ = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    # Draws are by column: with its padding behind it, a prompt has the columns it has alone.
    tokens, valid = canvases.move_left(tokens, valid)
    return prompt_memory.write_prompts(
        memory_keys, generator.denoiser, _memory_of(generator), theta, tokens, valid, inner
    )


def start(
    generator: Generator,
    theta: Theta,
    keys: Key,
    prompts: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
    phi: Phi = None,
    context: tuple[Tokens, Mask] | None = None,
    *,
    record: bool = False,
) -> Progress:
    """Write, lay out the canvas, and stop before the first step; arguments as in ``generate``."""
    if generator.memory is None and not (phi is None and context is None):
        raise ValueError("memory=None: there is no memory for phi or a context")
    if generator.memory is not None and phi is None:
        written = (prompts, valid) if context is None else context
        phi, _ = write(generator, theta, keys, *written, inner)
    if generator.adapt_every:  # From here on every row writes in its own.
        phi = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(prompts), *x.shape[1:])), phi)
    memory_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    mask = generator.denoiser.mask_token_id
    canvas = canvases.lay_out(prompts, valid, generator.config, mask)
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


def _memory_of(generator: Generator) -> MemoryConfig:
    if generator.memory is None:
        raise ValueError("memory=None: there is no memory to write into")
    return generator.memory


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
    inner: InnerParameters | None = None,
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
    phi, _ = prompt_memory.write_prompts(
        keys,
        generator.denoiser,
        _memory_of(generator),
        theta,
        tokens,
        committed,
        inner,
        progress.phi,
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
    keys: Key,
    prompts: Tokens,
    valid: Mask,
    inner: InnerParameters | None = None,
    phi: Phi = None,
    context: tuple[Tokens, Mask] | None = None,
    *,
    record: bool = False,
) -> Iterator[Decoded]:
    """``generate`` step by step: what stands there before the first step and after each one.

    Masks stand where nothing has been committed yet. The last item is what ``generate`` returns.
    """
    progress = _start(generator, theta, keys, prompts, valid, inner, phi, context, record=record)
    yield jax.device_get(_seen(generator, progress))
    written = 0
    while not np.all(progress.state.finished):
        progress = _one_step(generator, theta, progress)
        block = int(progress.state.block)
        if generator.adapt_every and not np.all(progress.state.finished):
            due = block // generator.adapt_every
            if due > written:
                progress, written = _write_on(generator, theta, progress, inner), due
        yield jax.device_get(_seen(generator, progress))


@functools.partial(jax.jit, static_argnums=(0,))
def _seen(generator: Generator, progress: Progress) -> Decoded:
    seen = finish(generator, progress)
    # Until the end, nothing stands in for what was not decoded.
    done = jnp.all(progress.state.finished)
    columns = progress.canvas.offset[:, None] + jnp.arange(generator.config.length)
    window = progress.state.tokens[:, progress.canvas.start :]
    raw = jnp.take_along_axis(window, columns, axis=1)
    return dataclasses.replace(seen, tokens=jnp.where(done, seen.tokens, raw))


def describe(phi: Phi) -> dict[str, dict[str, Float[Array, "groups layers"]]]:
    """What a memory holds, matrix by matrix.

    Returns:
        path -> {``norm``: Frobenius norm of the change that it makes to the matrix, [groups,
        layers, (experts)]; ``rank``: its effective rank, the exponential of the entropy of its
        normalised squared singular values, likewise; 0 where it changes nothing}.
    """
    leaves = jax.tree_util.tree_flatten_with_path(phi, is_leaf=fast_weights.is_fast_weight)[0]
    found = {}
    for path, delta in leaves:
        name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        found[name] = _spectrum(delta)
    return found


def _spectrum(delta) -> dict[str, jax.Array]:
    if isinstance(delta, LowRank):
        # The singular values of A B from two small triangles: the product may be a large matrix.
        left = jnp.linalg.qr(delta.A, mode="r")
        right = jnp.linalg.qr(jnp.swapaxes(delta.B, -1, -2), mode="r")
        small = left @ jnp.swapaxes(right, -1, -2) * delta.scale
    else:
        small = delta.W
    squares = jnp.linalg.svd(small, compute_uv=False) ** 2
    total = jnp.sum(squares, axis=-1)
    p = squares / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)
    return {"norm": jnp.sqrt(total), "rank": jnp.where(total > 0, jnp.exp(entropy), 0.0)}
