"""Log-likelihood of continuations given contexts, and multiple choice by it.

The likelihood is the Monte Carlo estimate of the MDLM bound that ``likelihood`` has for held-out
rows: the context is never masked, and with memory it is written first, once for all continuations
that share it. All draws hang on the seed and the context's tokens alone. So a score does not depend
on what else is scored, and the continuations of one context are compared on the same relative
draws: the same times, and the same random number for the position k tokens behind the context. Of
two continuations of equal length the same positions are masked; of a shorter one as large a share.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.data.sft import Row
from memdlm_jax.data.text import check_choice
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import masking, objective
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import exposure_bias, likelihood
from memdlm_jax.evaluation.likelihood import GOLDEN_RATIO, LikelihoodConfig, Written, up_to
from memdlm_jax.evaluation.systems import System, check_tokens
from memdlm_jax.typing import Batch, Denoiser, Key, Theta

Ids = Sequence[int]
Pair = tuple[Ids, Ids]
"""Token ids of a context, which may be empty, and of its continuation."""

Normalise = Literal["none", "token", "character", "byte"]

PUBLIC = LikelihoodConfig(samples=128)
"""As many masked copies as LLaDA's public evaluation takes (its ``mc_num``)."""

_NUMBERS = 4096
"""Times start from a row's number, which float32 has to hold with room for a fraction."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely one continuation is.

    Attributes:
        log_likelihood: estimate, in nats, of a lower bound of log p(continuation | context).
        standard_error: of the sampling of masks, in nats; 0 where there is only one mask, nan where
            there are more and a single one was drawn.
        is_greedy: whether greedy decoding gives this very continuation (see ``is_greedy``).
    """

    log_likelihood: float
    standard_error: float
    is_greedy: bool


def scores(
    system: System,
    pairs: Sequence[Pair],
    config: LikelihoodConfig = PUBLIC,
    *,
    pad_token_id: int,
    max_length: int,
    batch_size: int = 8,
) -> Iterator[tuple[int, Score]]:
    """Score continuations; rows of like length share a batch, and each shape compiles once.

    A continuation of one token has one mask, so it is read once, whatever ``config.samples``.

    Args:
        system: with memory, it writes each distinct context first, once.
        pairs: contexts and continuations.
        config: samples and seed.
        pad_token_id: fills short rows.
        max_length: longest canvas, context and continuation together, in tokens. Where memory is
            written in pieces (``memory.prompt_chunk``) a context may be longer: all of it is
            written, and its end is shown.
        batch_size: rows at a time, and contexts written at a time.

    Yields:
        (index of the pair, its score) as they come, in an order of their lengths.

    Raises:
        ValueError: a continuation is empty, does not fit, or has ids that the model does not have.
        FloatingPointError: what the model says is not finite.
    """
    rows = _rows(system, pairs, max_length)
    contexts = [tuple(context) for context, _ in pairs]
    batch_size = max(1, min(batch_size, len(pairs)))
    for written, owners in _remembered(system, contexts, config.seed, pad_token_id, batch_size):
        for capacity, samples, places in _batches(rows, list(owners), config.samples, batch_size):
            keys, numbers = context_keys([contexts[i] for i in places], config.seed)
            losses, greedy = map(np.asarray, _measured(
                system.denoiser, samples, capacity, system.theta, written,
                np.array([owners[i] for i in places]), keys, numbers,
                likelihood.pad_rows([rows[i] for i in places], pad_token_id),
            ))  # fmt: skip
            _check_finite(system, losses)
            for i, place in enumerate(dict.fromkeys(places)):
                # The one mask of a single token is no sample.
                single = len(rows[place].tokens) - rows[place].prompt_length == 1
                error = 0.0 if single else standard_error(losses[:, i], int(numbers[i]))
                yield place, Score(-float(losses[:, i].mean()), error, bool(greedy[i]))


def _check_finite(system: System, losses: np.ndarray) -> None:
    if not np.isfinite(losses).all():
        cause = ", or memory.learning_rate is too large" if system.memory else ""
        raise FloatingPointError(
            f"{system.name}: the loss of a continuation is not finite: the weights are "
            f"damaged{cause}"
        )


def score(system: System, pairs: Sequence[Pair], *config, **settings) -> list[Score]:
    """``scores`` in the order of the pairs."""
    found = dict(scores(system, pairs, *config, **settings))
    return [found[i] for i in range(len(pairs))]


def context_keys(contexts: Sequence[Ids], seed: int) -> tuple[Key, Int[np.ndarray, "b"]]:
    """Keys of rows by what they read: (keys [b], small numbers [b] for their times)."""
    digests = np.array(
        [zlib.crc32(np.asarray(tokens, "<i4").tobytes()) for tokens in contexts], np.uint32
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), digests)
    return keys, (digests % _NUMBERS).astype(np.int32)


def _rows(system: System, pairs: Sequence[Pair], max_length: int) -> list[Row]:
    """What the canvas shows: contexts, or their ends, with their continuations."""
    chunk = system.memory.prompt_chunk if system.memory else 0
    if chunk > max_length:
        raise ValueError(f"memory.prompt_chunk={chunk} must be at most max_length={max_length}")
    check_tokens(system.denoiser, [[*a, *b] for a, b in pairs], DecodeConfig())
    rows = []
    for i, (context, continuation) in enumerate(pairs):
        room = max_length - len(continuation)
        if not len(continuation) or room < 0:
            raise ValueError(
                f"continuation {i} has {len(continuation)} tokens; it must have 1 to "
                f"max_length={max_length}"
            )
        if len(context) > room and not chunk:
            raise ValueError(
                f"context {i} has {len(context)} tokens and its continuation {len(continuation)}, "
                f"together more than max_length={max_length}. With memory, memory.prompt_chunk "
                "lets longer contexts be written in pieces, and their end be shown"
            )
        shown = list(context)[max(len(context) - room, 0) :]
        rows.append(Row(np.array([*shown, *continuation], np.int32), len(shown)))
    return rows


def _remembered(
    system: System, contexts: Sequence[tuple[int, ...]], seed: int, pad: int, batch_size: int
) -> Iterator[tuple[Written, dict[int, int]]]:
    """Memory of a few contexts at a time, and for each place with one of them, which it is."""
    if system.memory is None:
        yield (
            Written(None, objective.plain_split(system.denoiser)),
            dict.fromkeys(range(len(contexts)), 0),
        )
        return
    places: dict[tuple[int, ...], list[int]] = {}
    for place, context in enumerate(contexts):
        places.setdefault(context, []).append(place)
    widths: dict[int, list[tuple[int, ...]]] = {}
    for context in places:
        widths.setdefault(up_to(128, len(context)), []).append(context)
    for _, texts in sorted(widths.items()):
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            padded = [*some, *[some[-1]] * (batch_size - len(some))]
            keys, _ = context_keys(padded, seed)
            rows = [Row(np.array(text, np.int32), len(text)) for text in padded]
            written = _write(
                system.denoiser, system.inner_loop, system.theta, keys,
                likelihood.pad_rows(rows, pad), system.learned,
            )  # fmt: skip
            yield written, {place: i for i, text in enumerate(some) for place in places[text]}


def _batches(
    rows: Sequence[Row], places: Sequence[int], samples: int, batch_size: int
) -> Iterator[tuple[int, int, list[int]]]:
    """(target slots, samples, places) of every batch, shape by shape."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for place in places:
        length = len(rows[place].tokens)
        count = length - rows[place].prompt_length
        shape = up_to(128, length), up_to(32, count), samples if count > 1 else 1
        groups.setdefault(shape, []).append(place)
    for (_, capacity, copies), members in sorted(groups.items()):
        for start in range(0, len(members), batch_size):
            # A short last batch repeats its last row: one shape, and the same score twice.
            chosen = np.minimum(np.arange(start, start + batch_size), len(members) - 1)
            yield capacity, copies, [members[i] for i in chosen]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _write(denoiser, inner_loop, theta, keys, batch, learned) -> Written:
    memory_keys, _ = likelihood.split_keys(keys)
    return likelihood.write(denoiser, inner_loop, theta, memory_keys, batch, learned)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(
    denoiser: Denoiser,
    samples: int,
    capacity: int,
    theta: Theta,
    written: Written,
    owners: Int[Array, "b"],
    keys: Key,
    numbers: Int[Array, "b"],
    batch: Batch,
) -> tuple[Float[Array, "s b"], Bool[Array, "b"]]:
    """Losses and greediness of rows, each with the memory that ``owners`` names."""
    own = dataclasses.replace(written, phi=jax.tree.map(lambda x: x[owners], written.phi))
    _, mask_keys = likelihood.split_keys(keys)
    losses = likelihood.sampled_losses(
        denoiser, samples, capacity, theta, own, mask_keys, numbers, batch
    )
    return losses, is_greedy(denoiser, capacity, theta, own, mask_keys, batch)


def is_greedy(
    denoiser: Denoiser, capacity: int, theta: Theta, written: Written, keys: Key, batch: Batch
) -> Bool[Array, "b"]:
    """Whether each row's response is what greedy decoding fills its masks with.

    The rule of LLaDA's public evaluation (``suffix_greedy_prediction``): as many masks as the
    response has tokens, all filled in one block, one a step, the most probable proposal first.
    Decoding stops when no row can come out right any more. Unlike there, the mask token is never
    proposed, as in all our decoding.

    Args:
        denoiser: the backbone.
        capacity: target slots, at least the response tokens of any row.
        theta: base parameters.
        written: memory of the rows.
        keys: [b] of the rows, unread.
        batch: clean rows [b, l], padded on the right.
    """
    mask_id = denoiser.mask_token_id
    response = objective.gather_targets(batch.tokens, batch.maskable, capacity)
    one = jnp.ones(batch.tokens.shape[0], jnp.int32)

    def masked(tokens):
        return batch.maskable & (tokens == mask_id)

    def right(tokens):
        return jnp.all((tokens == batch.tokens) | masked(tokens), axis=-1)

    def step(tokens):
        logits = likelihood.logits_at(denoiser, theta, written, tokens, batch.valid, response)
        return exposure_bias.commit(keys, logits, tokens, response, one, mask_id)

    tokens = jax.lax.while_loop(
        lambda tokens: jnp.any(right(tokens) & jnp.any(masked(tokens), axis=-1)),
        step,
        masking.apply_mask(batch.tokens, batch.maskable, mask_id),
    )
    return right(tokens) & ~jnp.any(masked(tokens), axis=-1)


def standard_error(losses: Float[np.ndarray, "s"], number: int) -> float:
    """Standard error of the mean of a row's losses at evenly spread times, in nats.

    Half the mean square difference of neighbours in time estimates the variance at one time
    (successive differences, as for any systematic sample: Wolter, Introduction to Variance
    Estimation, section 8.2); the losses' own variance would count what the times make of it.

    Args:
        losses: in the order of ``likelihood.sampled_losses``.
        number: of the row, which its times start from.

    Returns:
        0 if all losses are equal, nan if there is one.
    """
    count = len(losses)
    if count == 1:
        return math.nan
    times = (number * GOLDEN_RATIO + np.arange(count) / count) % 1.0
    steps = np.diff(losses[np.argsort(times)])
    return float(np.sqrt(np.mean(steps**2) / 2 / count))


@dataclasses.dataclass(frozen=True)
class Question:
    """A context with candidates for what follows it.

    Attributes:
        context: what is given.
        candidates: two or more.
        delimiter: between context and candidate.
    """

    context: str
    candidates: tuple[str, ...]
    delimiter: str = " "

    def __post_init__(self):
        if len(self.candidates) < 2 or not all(self.candidates):
            raise ValueError(f"candidates={self.candidates!r} must be two or more texts")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a system chooses.

    Attributes:
        best: index of the best candidate, the first of equals.
        scores: one of each candidate, not normalised.
    """

    best: int
    scores: tuple[Score, ...]


def choose(
    system: System,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: LikelihoodConfig = PUBLIC,
    *,
    normalise: Normalise = "none",
    **settings,
) -> list[Choice]:
    """Choose the most likely candidate of every question.

    Args:
        system: who chooses.
        tokenizer: encodes the texts (``encode_pair``).
        questions: contexts and candidates.
        config: samples and seed.
        normalise: what a candidate's log-likelihood is divided by: nothing (the harness's ``acc``),
            its characters without the delimiter (``acc_norm``), their UTF-8 bytes (``acc_bytes``)
            or its tokens.
        **settings: those of ``scores``; ``pad_token_id`` is the tokenizer's.
    """
    check_choice("normalise", normalise, get_args(Normalise))
    pairs = [
        encode_pair(tokenizer, question.context, question.delimiter + candidate)
        for question in questions
        for candidate in question.candidates
    ]
    settings = {"pad_token_id": tokenizer.pad_id} | settings
    found = iter(zip(pairs, score(system, pairs, config, **settings), strict=True))
    choices = []
    for question in questions:
        own = [(text, *next(found)) for text in question.candidates]
        values = [one.log_likelihood / _size(text, pair[1], normalise) for text, pair, one in own]
        choices.append(Choice(int(np.argmax(values)), tuple(one for _, _, one in own)))
    return choices


def _size(text: str, tokens: Ids, normalise: Normalise) -> int:
    sizes = {"token": len(tokens), "character": len(text), "byte": len(text.encode())}
    return sizes.get(normalise, 1)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, allow_special: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, divided as the public harness divides them.

    White space at the end of the context goes to the continuation; both are encoded together, and
    the continuation has what is behind as many ids as the context has alone.

    Args:
        tokenizer: encodes the texts.
        context: what is given; may be empty.
        continuation: what is scored.
        allow_special: let the spelling of a special token become its id.

    Raises:
        ValueError: nothing is left for the continuation.
    """
    text = context + continuation
    context = context.rstrip()
    before = tokenizer.encode(context, allow_special)
    behind = tokenizer.encode(text, allow_special)[len(before) :]
    if not behind:
        raise ValueError(
            f"continuation={continuation!r} has no token of its own behind {context[-20:]!r}"
        )
    return before, behind
