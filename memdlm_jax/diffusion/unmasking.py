"""Which tokens to propose at masked positions, and which proposals to commit."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.typing import Key


@flax.struct.dataclass
class Proposal:
    """A token for every position, and how good it is.

    Attributes:
        tokens: [b, c] int32.
        probability: [b, c], of the token.
        score: [b, c], by which commits are ordered, larger first.
    """

    tokens: Int[Array, "b c"]
    probability: Float[Array, "b c"]
    score: Float[Array, "b c"]


def propose(
    keys: Key, logits: Float[Array, "b c v"], config: DecodeConfig, mask_token_id: int
) -> Proposal:
    """Choose a token for every position and score it.

    The mask token is never proposed. Committed, it would look like a position still to be filled:
    the commits that remain would no longer be enough, and masks would be left in the text.

    Args:
        keys: [b] one PRNG key per row, so that a row's noise is its own.
        logits: [b, c, v].
        config: temperature, truncation, order and tokens to suppress.
        mask_token_id: id of the mask token.
    """
    noise_keys, order_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    logits = _without(logits, config.suppress)
    choices = logits
    if config.temperature == 0 and config.scores == "model":
        tokens = _argmax(logits, (mask_token_id,))  # Truncation never takes the best one away.
    else:
        choices = _without(logits, (mask_token_id,))
        if config.temperature > 0:
            choices = choices / config.temperature
        choices = truncate(choices, config.top_k, config.top_p)
        tokens = sample(noise_keys, choices, config)
    # Among logits that are not finite there may be no other: it must not be committed even then.
    tokens = jnp.where(tokens == mask_token_id, int(mask_token_id == 0), tokens)
    # The mask token keeps its share of the model's own distribution: a model that would rather
    # leave a position masked is not sure of its second choice.
    judged = _without(logits if config.scores == "model" else choices, config.defer)
    total = _logsumexp(judged)
    picked = jnp.take_along_axis(judged, tokens[..., None], axis=-1)
    probability = jnp.exp(picked - total)[..., 0]
    if config.order == "margin":
        best = jnp.exp(jax.lax.top_k(judged, 2)[0] - total)
        score = best[..., 0] - best[..., 1]
    elif config.order == "entropy":
        p = jnp.exp(judged - total)
        score = jnp.sum(p * jnp.log(p + 1e-10), axis=-1)
    elif config.order in ("random", "independent"):
        draw = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))
        score = draw(order_keys)
    else:
        score = probability
    if config.defer:
        score = jnp.where(jnp.isin(tokens, jnp.array(config.defer)), -jnp.inf, score)
    if config.order_temperature > 0:
        draw = jax.vmap(lambda key: jax.random.gumbel(key, tokens.shape[1:]))
        score = score / config.order_temperature + draw(jax.vmap(_other)(order_keys))
    return Proposal(tokens, probability, score)


def _without(logits: Float[Array, "b c v"], tokens: tuple[int, ...]) -> Float[Array, "b c v"]:
    """Put -inf on some tokens."""
    if not tokens:
        return logits
    return jnp.where(jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(tokens)), -jnp.inf, logits)


def _in_parts(x: Float[Array, "b c v"]) -> Float[Array, "b c n s"]:
    """The vocabulary in equal parts, at least as many as each has tokens.

    It is then read once for its maximum and once for its sum, and one part is searched: a batch's
    logits are more than a CPU's caches hold.
    """
    tokens = x.shape[-1]
    size = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return x.reshape(*x.shape[:-1], tokens // size, size)


def _argmax(x: Float[Array, "b c v"], never: tuple[int, ...] = ()) -> Int[Array, "b c"]:
    """The smallest index of the largest value, ``never`` (a few) left out."""
    parts = _in_parts(x)
    size = parts.shape[-1]
    largest = jnp.max(parts, axis=-1)
    for number in sorted({token // size for token in never}):
        inside = tuple(token % size for token in never if token // size == number)
        rest = jnp.max(_without(parts[..., number, :], inside), axis=-1)
        largest = largest.at[..., number].set(rest)
    best = _first_largest(largest)
    part = jnp.take_along_axis(parts, best[..., None, None], axis=-2)[..., 0, :]
    if never:
        index = best[..., None] * size + jnp.arange(size)
        part = jnp.where(jnp.isin(index, jnp.array(never)), -jnp.inf, part)
    return best * size + _first_largest(part)


def _first_largest(x: Float[Array, "*b v"]) -> Int[Array, "*b"]:
    """The smallest index of the largest value; on a CPU faster than ``jnp.argmax`` by far."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    last = x.shape[-1] - 1  # Where nothing equals the maximum it is NaN.
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, last), axis=-1)


def _logsumexp(x: Float[Array, "b c v"]) -> Float[Array, "b c 1"]:
    """Logarithm of the sum of exponentials, with the maximum that ``_argmax`` takes as well."""
    largest = jnp.max(jnp.max(_in_parts(x), axis=-1), axis=-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return largest + jnp.log(jnp.sum(jnp.exp(x - largest), axis=-1, keepdims=True))


def _other(key: Key) -> Key:
    return jax.random.fold_in(key, 1)


def sample(keys: Key, choices: Float[Array, "b c v"], config: DecodeConfig) -> Int[Array, "b c"]:
    """Argmax, with Gumbel noise if the temperature is not 0; of equal logits the smallest id wins.

    Args:
        keys: [b] one PRNG key per row; unread at temperature 0.
        choices: [b, c, v] logits, already divided by the temperature.
        config: temperature and the precision of the noise.

    Raises:
        ValueError: the noise is to be float64, and JAX's 64-bit mode is off.
    """
    if config.temperature > 0:
        dtype = jnp.dtype(config.noise)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError("decode.noise='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")

        def draw(key):
            # ``high``: float32's plain Gumbel noise never exceeds 17, so that rare tokens of a
            # large vocabulary would be drawn less often than they should be.
            return jax.random.gumbel(key, choices.shape[1:], dtype, mode="high")

        choices = choices + jax.vmap(draw)(keys)
    return _argmax(choices)


def truncate(logits: Float[Array, "b c v"], top_k: int, top_p: float) -> Float[Array, "b c v"]:
    """Put -inf on all but the most probable tokens.

    Args:
        logits: [b, c, v].
        top_k: so many are kept; 0 for all. Tokens as probable as the last one stay as well.
        top_p: of those, the most probable are kept until their probabilities, the last one's
            included, reach this; 1 for all.
    """
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(
    proposal: Proposal,
    candidates: Bool[Array, "b c"],
    config: DecodeConfig,
    quota: Int[Array, ""],
    share: Float[Array, ""],
) -> Bool[Array, "b c"]:
    """Which candidates to commit in this step.

    Args:
        proposal: tokens and scores.
        candidates: [b, c], the masked positions that may be filled.
        config: order and threshold.
        quota: number of commits where no threshold decides.
        share: probability of a commit under ``independent``; 1 commits all.
    """
    if config.order == "independent":
        return candidates & ((proposal.score >= 1 - share) | (share >= 1))
    best = most_confident(proposal.score, candidates, quota)
    if config.threshold is None:
        return best
    sure = candidates & (proposal.probability > config.threshold)
    enough = jnp.sum(sure, axis=-1, keepdims=True) >= quota
    return jnp.where(enough, sure, best)


def most_confident(
    scores: Float[Array, "b c"], candidates: Bool[Array, "b c"], count: int | Int[Array, ""]
) -> Bool[Array, "b c"]:
    """Pick the ``count`` best-scored candidates of every row; of equal scores the leftmost.

    A row with fewer candidates has all of them picked.
    """
    last = jnp.where(candidates, 0, 1)  # Behind every candidate, whatever its score.
    order = jnp.lexsort((-scores, last), axis=-1)
    ranks = jnp.argsort(order, axis=-1)
    return candidates & (ranks < count)


def text_lengths(tokens: Int[Array, "b l"] | np.ndarray, eos_token_id: int) -> Int[np.ndarray, "b"]:
    """Tokens of every generated row before its first eos; the row's length where there is none."""
    is_eos = np.asarray(tokens) == eos_token_id
    return np.where(is_eos.any(-1), is_eos.argmax(-1), is_eos.shape[-1])
