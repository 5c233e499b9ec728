"""Exposure bias: how much worse a denoiser is on its own guesses than on the true text.

At a mask ratio, the static loss masks the true response at random, as training does; the sequential
loss starts from an all-masked response and fills it with the model's own most confident guesses
down to that ratio. Both score the tokens that are still masked against the truth, and their ratio
is 1 where errors do not feed on themselves (Pei et al., arXiv 2603.22241, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.data.sft import Row
from memdlm_jax.diffusion import masking, objective, unmasking
from memdlm_jax.diffusion.objective import Targets
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import likelihood, statistics
from memdlm_jax.evaluation.systems import System
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Batch, Denoiser, Key, Theta, Tokens


@dataclasses.dataclass(frozen=True)
class ExposureConfig:
    """How the trajectory is sampled.

    Attributes:
        steps: denoising steps from an all-masked response, the paper's figure has 48; before each
            of them both losses are taken.
        seed: of the random masks, the same for every system, and of memory.
        resamples: of the bootstrap over rows.
    """

    steps: int = 48
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self):
        for name, least in (("steps", 1), ("seed", 0), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ValueError(f"exposure.{name}={getattr(self, name)} must be at least {least}")


def masked_counts(maskable: Int[Array, "b"], steps: int) -> Int[Array, "s b"]:
    """Tokens still masked before each step, from all of them on, at least one."""
    left = (steps - jnp.arange(steps))[:, None]
    return -(-maskable * left // steps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def row_curves(
    denoiser: Denoiser,
    inner_loop: InnerLoop | None,
    steps: int,
    capacity: int,
    theta: Theta,
    key: Key,
    rows: Int[Array, "b"],
    batch: Batch,
    learned: InnerParameters | None = None,
) -> tuple[Float[Array, "s b"], Float[Array, "s b"]]:
    """Mean loss of the still masked tokens before every step, in nats, by both ways of masking.

    Args:
        denoiser: the backbone.
        inner_loop: writes the row's prompt (its valid tokens that are not maskable) into memory
            first; ``None`` is the plain model.
        steps: denoising steps.
        capacity: target slots, at least the maskable tokens of any row.
        theta: base parameters.
        key: PRNG key, the same for every batch.
        rows: number of every row; a row's masks depend on it only, not on its neighbours.
        batch: clean rows [b, l], padded on the right, each with a maskable token.
        learned: learned parts of the inner loop.

    Returns:
        (static, sequential), [steps, b] each.
    """
    memory_keys, mask_keys = likelihood.row_keys(key, rows)
    written = likelihood.write(denoiser, inner_loop, theta, memory_keys, batch, learned)
    response = objective.gather_targets(batch.tokens, batch.maskable, capacity)
    counts = masked_counts(batch.maskable.sum(-1), steps)

    def predict(tokens):
        return likelihood.logits_at(denoiser, theta, written, tokens, batch.valid, response)

    def loss(logits, masked):
        """Over the response's masked tokens."""
        nll = objective.token_losses(logits, response)
        return jnp.sum(jnp.where(masked, nll, 0), axis=1) / jnp.sum(masked, axis=1)

    def one_step(tokens, now):
        index, count, then = now
        logits = predict(tokens)
        masked = response_masks(tokens, response, denoiser.mask_token_id)
        sequential = loss(logits, masked)
        mask = likelihood.random_masks(mask_keys, index, batch.maskable, count)
        noisy = masking.apply_mask(batch.tokens, mask, denoiser.mask_token_id)
        static = loss(predict(noisy), response_masks(noisy, response, denoiser.mask_token_id))
        tokens = commit(mask_keys, logits, tokens, response, count - then, denoiser.mask_token_id)
        return tokens, (static, sequential)

    start = masking.apply_mask(batch.tokens, batch.maskable, denoiser.mask_token_id)
    then = jnp.concatenate([counts[1:], jnp.zeros_like(counts[:1])])
    _, curves = jax.lax.scan(one_step, start, (jnp.arange(steps), counts, then))
    return curves


def response_masks(tokens: Tokens, response: Targets, mask_token_id: int) -> Bool[Array, "b c"]:
    """Which slots of the response are still masked in rows ``tokens``."""
    now = jnp.take_along_axis(tokens, response.positions, axis=1)
    return response.present & (now == mask_token_id)


def commit(
    keys: Key,
    logits: Float[Array, "b c v"],
    tokens: Tokens,
    response: Targets,
    count: Int[Array, "b"],
    mask_token_id: int,
) -> Tokens:
    """Fill the ``count`` masked tokens of every row that the model is surest of with its guesses.

    Args:
        keys: [b], unread: the guesses are greedy, as in LLaDA's decoding.
        logits: what the model says at the slots of the response.
        tokens: [b, l] rows whose response is masked in part.
        response: its slots.
        count: [b] tokens to fill.
        mask_token_id: id of the mask token, which is never a guess.
    """
    proposal = unmasking.propose(keys, logits, DecodeConfig(), mask_token_id)
    masked = response_masks(tokens, response, mask_token_id)
    best = unmasking.most_confident(proposal.score, masked, count[:, None])
    columns = jnp.where(best, response.positions, tokens.shape[1])  # Out of bounds is dropped.
    return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(
        tokens, columns, proposal.tokens.astype(tokens.dtype)
    )


def evaluate(
    systems: Sequence[System],
    rows: Sequence[Row],
    config: ExposureConfig,
    *,
    pad_token_id: int,
    batch_size: int = 8,
) -> dict:
    """The exposure bias ratio of every system over the denoising steps, on the same random masks.

    Args:
        systems: those with memory write each row's prompt first.
        rows: encoded conversations, two or more, each with a response.
        config: steps and seed.
        pad_token_id: fills short rows.
        batch_size: rows at a time.

    Returns:
        JSON-ready ``{"config", "rows", "mask_ratio": [steps], "systems": {name: {"static",
        "sequential", "ratio", "interval"}}}``. Losses are means over rows of the mean over a row's
        masked tokens, in nats; the ratio is that of the means, its 95 % interval (low, high) by
        bootstrap over rows.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows are too few: exposure bias needs at least 2")
    found, curves = {}, {}
    with Progress("exposure bias", len(systems) * len(rows), "row") as bar:
        for system in systems:
            curves[system.name] = dataset_curves(
                system, rows, config, pad_token_id, batch_size, bar.update
            )
    for name, (static, sequential) in curves.items():
        low, high = statistics.bootstrap(
            lambda s, q: q.mean(0) / s.mean(0), (static, sequential), config.resamples, config.seed
        )
        found[name] = {
            "static": static.mean(0).tolist(),
            "sequential": sequential.mean(0).tolist(),
            "ratio": (sequential.mean(0) / static.mean(0)).tolist(),
            "interval": [low.tolist(), high.tolist()],
        }
    left = (config.steps - np.arange(config.steps)) / config.steps
    return {
        "config": dataclasses.asdict(config),
        "rows": len(rows),
        "mask_ratio": left.tolist(),
        "systems": found,
    }


def dataset_curves(
    system: System,
    rows: Sequence[Row],
    config: ExposureConfig,
    pad_token_id: int,
    batch_size: int = 8,
    report: Callable[[int], Any] = lambda rows: None,
) -> tuple[Float[np.ndarray, "n s"], Float[np.ndarray, "n s"]]:
    """``row_curves`` of every row, in the given order; rows of like length share a batch.

    ``report`` is called as by ``likelihood.over_rows``.
    """

    def curves(places, batch, capacity):
        found = row_curves(
            system.denoiser, system.inner_loop, config.steps, capacity, system.theta,
            jax.random.key(config.seed), places, batch, system.learned,
        )  # fmt: skip
        return tuple(curve.T for curve in found)

    return likelihood.over_rows(curves, rows, pad_token_id, batch_size, report)
