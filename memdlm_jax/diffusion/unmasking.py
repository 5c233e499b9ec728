"""Which tokens to propose at masked positions, and which proposals to commit."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.typing import Key


def even_quotas(count: int, steps: int) -> list[int]:
    """Commits of each step when ``count`` positions are shared evenly over ``steps``.

    The first ``count % steps`` steps commit one more, as LLaDA's sampler does (Nie et al.,
    arXiv 2502.09992, low-confidence remasking).

    Raises:
        ValueError: a step would commit nothing.
    """
    if not 1 <= steps <= count:
        raise ValueError(f"steps={steps} must lie in [1, {count}]: every step commits a token")
    base, more = divmod(count, steps)
    return [base + (step < more) for step in range(steps)]


def propose(
    keys: Key, logits: Float[Array, "b c v"], temperature: float, mask_token_id: int
) -> Int[Array, "b c"]:
    """Choose a token for every position: argmax(logits + temperature * Gumbel noise).

    The mask token is never proposed. Committed, it would look like a position still to be filled:
    the commits that remain would no longer be enough, and masks would be left in the text.

    Args:
        keys: [b] one PRNG key per row, so that a row's noise is its own; unread at temperature 0.
        logits: [b, c, v].
        temperature: 0 is the most probable token, 1 a sample of the model.
        mask_token_id: id of the mask token.

    Returns:
        [b, c] int32; of equal logits the smallest id wins.
    """
    if temperature > 0:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        logits = logits + temperature * noise
    logits = logits.at[..., mask_token_id].set(-jnp.inf)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def confidence(logits: Float[Array, "b c v"], tokens: Int[Array, "b c"]) -> Float[Array, "b c"]:
    """Probability of each token under the plain softmax, no noise, mask token included."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))


def most_confident(
    scores: Float[Array, "b c"], candidates: Bool[Array, "b c"], count: int | Int[Array, ""]
) -> Bool[Array, "b c"]:
    """Pick the ``count`` best-scored candidates of every row; of equal scores the leftmost.

    A row with fewer candidates has all of them picked.
    """
    order = jnp.argsort(jnp.where(candidates, -scores, jnp.inf), axis=-1, stable=True)
    ranks = jnp.argsort(order, axis=-1)
    return candidates & (ranks < count)


def text_lengths(tokens: Int[Array, "b l"] | np.ndarray, eos_token_id: int) -> Int[np.ndarray, "b"]:
    """Tokens of every generated row before its first eos; the row's length where there is none."""
    is_eos = np.asarray(tokens) == eos_token_id
    return np.where(is_eos.any(-1), is_eos.argmax(-1), is_eos.shape[-1])
