"""Ask probes with their context in view or taken away, each row with a memory of its own."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import canvas as canvases
from memdlm_jax.diffusion.canvas import Canvas
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import retrieval_probes, systems
from memdlm_jax.evaluation.retrieval_probes import Condition, Probe
from memdlm_jax.evaluation.systems import System
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.inference.memory_reader import MemoryReader
from memdlm_jax.typing import Key, Phi, Theta

Memory = Literal["off", "on", "control"]
Written = Literal["prompt", "context"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
MEMORIES: tuple[Memory, ...] = get_args(Memory)


@dataclasses.dataclass(frozen=True)
class Run:
    """How probes are asked.

    Attributes:
        decode: sampler of the answers; its window must hold every response.
        max_length: longest canvas, prompt and window together, in tokens.
        written: what goes into memory, the whole prompt or the context alone.
        seed: of the memory's draws and the sampling noise; row i has those that
            ``systems.batches`` gives to prompt i.
        batch_size: rows at a time.
    """

    decode: DecodeConfig
    max_length: int
    written: Written = "prompt"
    seed: int = 0
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one system said under one condition with one memory, in the order of the probes.

    Attributes:
        texts: the replies.
        at_once: [n] log-probability of the value tokens in nats, summed over a row's, with the
            whole response masked.
        left_to_right: [n] likewise, each with the response before it in view and the rest masked.
        tokens: [n] value tokens.
    """

    texts: list[str]
    at_once: Float[np.ndarray, "n"]
    left_to_right: Float[np.ndarray, "n"]
    tokens: Int[np.ndarray, "n"]


@flax.struct.dataclass
class Asked:
    """A batch of questions and their true responses.

    Attributes:
        tokens: [b, p] int32 prompts, padded on the left.
        valid: [b, p] bool, False on padding.
        invisible: [b, 2] int32, of each row's own tokens the first that nobody attends to and the
            one behind the last.
        response: [b, c] int32, padded on the right.
        length: [b] int32, tokens of each response.
    """

    tokens: Int[Array, "b p"]
    valid: Bool[Array, "b p"]
    invisible: Int[Array, "b 2"]
    response: Int[Array, "b c"]
    length: Int[Array, "b"]


def hide(canvas: Canvas, asked: Asked) -> Canvas:
    """The canvas with what is invisible hidden from attention, every position kept."""
    own = canvas.position_ids
    hidden = (own >= asked.invisible[:, :1]) & (own < asked.invisible[:, 1:])
    return dataclasses.replace(canvas, valid=canvas.valid & ~hidden)


def scored_canvas(asked: Asked, config: DecodeConfig, mask_token_id: int) -> Canvas:
    """Questions and masks in the place of the responses; it ends with them, as training rows do."""
    canvas = hide(canvases.lay_out(asked.tokens, asked.valid, config, mask_token_id), asked)
    end = canvas.start + canvas.offset + asked.length
    ours = jnp.arange(canvas.tokens.shape[1]) < end[:, None]
    return dataclasses.replace(canvas, valid=canvas.valid & ours)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ask(
    generator: Generator, passes: int, theta: Theta, keys: Key, phi: Phi, asked: Asked
) -> tuple[Decoded, Float[Array, "b c"], Float[Array, "b c"]]:
    """Decode the answers, and score the true ones; compiled once per shape.

    Nothing is written while decoding, whatever ``memory.adapt_every`` says: what phi knew before
    is the question. The scores are of the model's own distribution: temperature and guidance are
    the decoder's.

    Args:
        generator: who answers; with a memory, ``phi`` is it, and stays as it is.
        passes: places of the response to score from left to right.
        theta: base parameters.
        keys: [b] one PRNG key per row, of the sampling noise.
        phi: fast weights, one group per row, or ``None``.
        asked: questions and responses.

    Returns:
        (answers, log-probabilities of the response's tokens when all are masked, and when those
        before are in view; the latter are zero from place ``passes`` on).
    """
    prompts = Prompts(keys, asked.tokens, asked.valid)
    progress = generation.start(generator, theta, prompts, phi=phi)
    progress = dataclasses.replace(progress, canvas=hide(progress.canvas, asked))
    progress = generation.advance(generator, theta, progress, generator.config.num_blocks)
    scores = _log_probabilities(generator, passes, theta, phi, asked)
    return generation.finish(generator, progress), *scores


def _log_probabilities(generator: Generator, passes: int, theta, phi, asked: Asked):
    """See ``ask``."""
    denoiser, config, size = generator.denoiser, generator.config, asked.response.shape[1]
    canvas = scored_canvas(asked, config, denoiser.mask_token_id)
    reader = MemoryReader(denoiser, theta, phi, generator.split, canvas, config)
    own = jnp.arange(size)
    places = canvas.offset[:, None] + own
    spread = config.block_size - 1 if config.alignment == "row" else 0
    window = canvas.start + jnp.arange(min(size + spread, canvas.fillable.shape[1]))

    def read(shown):
        seen = own < jnp.minimum(shown, asked.length)[:, None]
        filling = jnp.where(seen, asked.response, denoiser.mask_token_id)
        put = jax.vmap(lambda row, at, new: row.at[at].set(new))
        logits, _ = reader(put(canvas.tokens, canvas.start + places, filling), 0, window)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), places[..., None], axis=1)
        return jnp.take_along_axis(log_p, asked.response[..., None], axis=-1)[..., 0]

    one_by_one = jax.lax.map(lambda i: read(i)[:, i], jnp.arange(passes))
    at_once = read(0)
    return at_once, jnp.zeros_like(at_once).at[:, :passes].set(one_by_one.T)


_write = jax.jit(generation.write, static_argnums=0)


def generator_of(system: System, memory: Memory, decode: DecodeConfig) -> Generator:
    """Who answers: the system, without its memory if that is off."""
    return Generator(system.denoiser, None if memory == "off" else system.inner_loop, decode)


def memories(system: System) -> tuple[Memory, ...]:
    """What a system is probed with: ``off`` alone if it has no memory."""
    return MEMORIES if system.memory else MEMORIES[:1]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Numbers of the rows of a batch.

    Attributes:
        places: [b] indices of probes; a short last batch repeats its last row.
        count: rows that are no repeats.
        keys: [b] PRNG keys, of the memory's draws and the sampling noise.
    """

    places: Int[np.ndarray, "b"]
    count: int
    keys: Key


def batches(count: int, run: Run) -> Iterator[Rows]:
    """Rows batch by batch; all batches have one shape."""
    size, root = min(run.batch_size, count), jax.random.key(run.seed)
    for start in range(0, count, size):
        places = np.minimum(np.arange(start, start + size), count - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, places)
        yield Rows(places, min(size, count - start), keys)


class Writer:
    """Writes the memories of a batch."""

    def __init__(
        self,
        system: System,
        memory: Memory,
        probes: Sequence[Probe],
        others: Sequence[Probe],
        run: Run,
        pad_token_id: int,
    ):
        """Lay out what is to be written; the prompts of both have one width.

        Raises:
            ValueError: a text is longer than ``run.max_length`` and is not written in pieces.
        """
        self._system, self._generator = system, generator_of(system, memory, run.decode)
        self._texts = None
        if memory == "off":
            return
        texts = [[retrieval_probes.written(p, run.written) for p in x] for x in (probes, others)]
        longest = max(map(len, itertools.chain(*texts)))
        settings = system.memory
        if longest > run.max_length and not (settings and settings.prompt_chunk):
            raise ValueError(
                f"the longest text to be written has {longest} tokens; it must have at most "
                f"max_length={run.max_length}, or memory.prompt_chunk writes it in pieces"
            )
        chosen = texts[memory == "control"]
        self._texts = canvases.pad_left(chosen, systems.rounded(longest), pad_token_id)

    def write(self, rows: Rows) -> Phi:
        """One group per row; ``None`` with memory off."""
        if self._texts is None:
            return None
        system, (tokens, valid) = self._system, self._texts
        prompts = Prompts(rows.keys, tokens[rows.places], valid[rows.places])
        return _write(self._generator, system.theta, prompts, system.learned)[0]


def answer(
    system: System,
    memory: Memory,
    probes: Sequence[Probe],
    others: Sequence[Probe],
    run: Run,
    tokenizer: Tokenizer,
    conditions: Sequence[Condition] = CONDITIONS,
    report: Callable[[int], Any] = lambda questions: None,
) -> dict[Condition, Answers]:
    """Write every row's memory once and ask its question under every condition.

    A row's result depends on the seed, its number and its probes, never on its neighbours.

    Args:
        system: who answers.
        memory: ``off``; ``on``, written on the row's own text; or ``control``, on that of the
            probe of the same number in ``others``.
        probes: the questions, n of them.
        others: n probes whose text does not hold the asked values; only ``control`` needs them.
        run: sampler, lengths and seed.
        tokenizer: pads, and spells the replies.
        conditions: what becomes of the context.
        report: called after every batch with its number of questions.

    Raises:
        FloatingPointError: the scores are not finite.
        ValueError: the probes do not match the others, or something has no room.
    """
    _check_pairs(system, memory, probes, others)
    run = dataclasses.replace(run, decode=systems.stopping(run.decode, tokenizer))
    laid = {
        condition: lay_out(probes, condition, system, run, tokenizer.pad_id)
        for condition in conditions
    }
    generator = generator_of(system, memory, run.decode)
    writer = Writer(system, memory, probes, others, run, tokenizer.pad_id)
    passes = 1 + max(place for probe in probes for place in probe.scored)
    found: dict[Condition, list] = {condition: [] for condition in conditions}
    for rows in batches(len(probes), run):
        phi = writer.write(rows)
        for condition, asked in laid.items():
            here = jax.tree.map(lambda leaf, at=rows.places: leaf[at], asked)
            said = ask(generator, passes, system.theta, rows.keys, phi, here)
            decoded, *scores = jax.device_get(said)
            _check_finite(system, condition, memory, *scores)
            texts = systems.replies(tokenizer, decoded, run.decode.stop).texts
            found[condition].append([x[: rows.count] for x in (texts, *scores)])
            report(rows.count)
    return {condition: _answers(parts, probes) for condition, parts in found.items()}


def _check_pairs(
    system: System, memory: Memory, probes: Sequence[Probe], others: Sequence[Probe]
) -> None:
    if not probes:
        raise ValueError("probes is empty: there is nothing to ask")
    if memory != "off" and system.memory is None:
        raise ValueError(f"{system.name} has no memory: memory={memory!r} must be 'off'")
    if memory == "control":
        if len(others) != len(probes):
            raise ValueError(f"{len(others)} others: one for each of {len(probes)} probes is asked")
        for row, (probe, other) in enumerate(zip(probes, others, strict=True)):
            if retrieval_probes.conflict(probe.passage, other.passage):
                raise ValueError(
                    f"others[{row}] holds a value of probes[{row}]: it must have other values"
                )


def _check_finite(system: System, condition: Condition, memory: Memory, *scores) -> None:
    if not all(np.isfinite(score).all() for score in scores):
        raise FloatingPointError(
            f"{system.name}: log-probabilities are not finite ({condition}, memory {memory}): the "
            "weights are damaged, or memory.learning_rate is too large"
        )


def _answers(parts: Sequence, probes: Sequence[Probe]) -> Answers:
    """Batches in one; of the scores only those of value tokens."""
    texts, at_once, left_to_right = (list(itertools.chain(*x)) for x in zip(*parts, strict=True))
    chosen = [list(probe.scored) for probe in probes]

    def summed(scores):
        pairs = zip(scores, chosen, strict=True)
        return np.array([np.sum(row[places], dtype=np.float64) for row, places in pairs])

    return Answers(texts, summed(at_once), summed(left_to_right), np.array(list(map(len, chosen))))


def lay_out(
    probes: Sequence[Probe], condition: Condition, system: System, run: Run, pad_token_id: int
) -> Asked:
    """All questions under one condition.

    Raises:
        ValueError: a response is longer than the decoder's window, a prompt leaves no room for
            it, or has ids that the model lacks.
    """
    asked = [retrieval_probes.asked(p, condition, system.denoiser.mask_token_id) for p in probes]
    prompts, responses = [q.tokens for q in asked], [p.response for p in probes]
    systems.check_tokens(system.denoiser, [*prompts, *responses], run.decode)
    lengths = np.array(list(map(len, responses)), np.int32)
    window, longest = run.decode.length, max(map(len, prompts))
    if lengths.max() > window:
        raise ValueError(
            f"decode.length={window} must be at least {lengths.max()}: so many tokens has the "
            "longest response, its end included"
        )
    # Blocks that are counted from the row's start are whole at its end.
    whole = run.decode.block_size if run.decode.alignment == "row" else 1
    room = run.max_length // whole * whole - window
    if longest > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens with its context {condition}; it must have "
            f"at most {room} (max_length={run.max_length} less decode.length={window})"
        )
    tokens, valid = canvases.pad_left(prompts, min(room, systems.rounded(longest)), pad_token_id)
    response = np.full((len(probes), lengths.max()), pad_token_id, np.int32)
    for row, ids in enumerate(responses):
        response[row, : len(ids)] = ids
    invisible = np.array([q.invisible for q in asked], np.int32)
    return Asked(*map(jnp.asarray, (tokens, valid, invisible, response, lengths)))
