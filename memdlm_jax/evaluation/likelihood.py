"""Held-out loss: a Monte Carlo estimate of the MDLM bound on the same masks for every system."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memdlm_jax import processes
from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import EncodeConfig, Encoder, Row
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import masking, objective
from memdlm_jax.diffusion.objective import Targets
from memdlm_jax.evaluation import statistics
from memdlm_jax.evaluation.systems import System
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters
from memdlm_jax.memory.written import write_prompts
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Batch, Context, Denoiser, Key, Mask, Phi, Theta, Tokens

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
    """How the bound is sampled.

    Attributes:
        samples: masked copies of every row; their times are spread evenly over (0, 1].
        seed: of the masks, which are the same for every system.
    """

    samples: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"likelihood.samples={self.samples} must be at least 1")


def held_out_rows(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, count: int, seed: int
) -> list[Row]:
    """Draw one example of each group, of at most ``count`` groups, so that rows are independent.

    Args:
        examples: of a split that nothing was trained on; those that do not fit are left out.
        tokenizer: encodes them.
        max_length: tokens of the longest row; oldest turns are left out to fit.
        count: rows wanted.
        seed: of the draws.

    Raises:
        ValueError: fewer than two groups have a row.
    """
    encoder = Encoder(tokenizer, EncodeConfig(max_length, long_prompt="truncate_left"))
    rng = np.random.default_rng(seed)
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    rows: list[Row] = []
    for name in rng.permutation(sorted(groups)):
        example = groups[name][rng.integers(len(groups[name]))]
        row = encoder.encode(example)
        if not isinstance(row, str):
            rows.append(row)
        if len(rows) == count:
            break
    if len(rows) < 2:
        raise ValueError(
            f"{len(groups)} groups gave {len(rows)} rows of at most max_length={max_length} "
            f"tokens (count={count}); at least two are needed"
        )
    return rows


def mask_counts(
    maskable: Int[Array, "b"], row: Int[Array, "b"], sample: Int[Array, ""] | int, samples: int
) -> Int[Array, "b"]:
    """Tokens to mask in a row's ``sample``-th copy, in [1, maskable].

    Times u = (row * golden ratio + sample / samples) mod 1 are of low discrepancy over samples and
    rows; 1 + floor(u M) of M maskable tokens are masked.
    """
    u = (row * GOLDEN_RATIO + sample / samples) % 1.0
    return jnp.minimum(1 + (u * maskable).astype(jnp.int32), maskable)


@flax.struct.dataclass
class Written:
    """What the rows of a batch have in memory.

    Attributes:
        phi: fast weights, one group per row, or ``None``.
        split: number of trunk layers.
    """

    phi: Phi
    split: int = flax.struct.field(pytree_node=False)


def row_keys(key: Key, rows: Int[Array, "b"]) -> tuple[Key, Key]:
    """(memory's keys, the masks' keys), [b] each: a row's hang on its number alone."""
    return split_keys(jax.vmap(jax.random.fold_in, (None, 0))(key, rows))


def split_keys(keys: Key) -> tuple[Key, Key]:
    """(memory's keys, the masks' keys), [b] each, from the rows' own keys.

    The first are those with which ``generation.write`` writes, given the same keys.
    """
    memory_keys, mask_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    return memory_keys, mask_keys


def write(
    denoiser: Denoiser,
    inner_loop: InnerLoop | None,
    theta: Theta,
    keys: Key,
    batch: Batch,
    learned: InnerParameters | None = None,
) -> Written:
    """Write every row's prompt, its valid tokens that are not maskable, into memory of its own.

    Args:
        denoiser: the backbone.
        inner_loop: how; ``None`` writes nothing.
        theta: base parameters.
        keys: [b] one PRNG key per row.
        batch: clean rows [b, l], padded on the right.
        learned: learned parts of the inner loop.
    """
    if inner_loop is None:
        return Written(None, objective.plain_split(denoiser))
    prompt = batch.valid & ~batch.maskable
    phi, _ = write_prompts(keys, inner_loop, theta, batch.tokens, prompt, learned)
    return Written(phi, inner_loop.split)


def logits_at(
    denoiser: Denoiser,
    theta: Theta,
    written: Written,
    tokens: Tokens,
    valid: Mask,
    targets: Targets,
) -> Float[Array, "b c v"]:
    """What the model says at the targets of rows ``tokens``, with what is written in memory."""
    split, context = written.split, Context(valid)
    hidden = denoiser.trunk(theta, tokens, context, split=split)
    last = fast_weights.head_with_memory(
        denoiser, theta, written.phi, hidden, context, split=split, at=targets.positions
    )
    return denoiser.readout(theta, last)


def random_masks(keys: Key, number: Int[Array, ""], maskable: Mask, count: Int[Array, "b"]) -> Mask:
    """Mask ``count`` of each row's maskable tokens, the ``number``-th draw of the row's key.

    A row's draw at a column is the same whatever the width of the batch.
    """
    draw_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    choose = jax.vmap(lambda k, m, c: masking.choose_exactly(k, m[None], c[None])[0])
    return choose(draw_keys, maskable, count)


def sampled_losses(
    denoiser: Denoiser,
    samples: int,
    capacity: int,
    theta: Theta,
    written: Written,
    mask_keys: Key,
    rows: Int[Array, "b"],
    batch: Batch,
) -> Float[Array, "s b"]:
    """Samples of the MDLM bound on -log p(response | prompt) of every row, in nats.

    Exactly n of M maskable tokens are masked, n uniform over 1 .. M, and the loss weighs M / n:
    the same expectation as independent masking at t ~ U(0, 1) with weight 1/t, with less variance
    (LLaDA, arXiv 2502.09992, equation 6).

    Args:
        denoiser: the backbone.
        samples: masked copies of every row.
        capacity: target slots, at least the maskable tokens of any row.
        theta: base parameters.
        written: memory of the rows.
        mask_keys: [b] one PRNG key per row.
        rows: [b] number of every row, which its times start from.
        batch: clean rows [b, l], padded on the right.
    """
    maskable = batch.maskable.sum(-1)

    def one_copy(sample):
        count = mask_counts(maskable, rows, sample, samples)
        mask = random_masks(mask_keys, sample, batch.maskable, count)
        noisy = masking.apply_mask(batch.tokens, mask, denoiser.mask_token_id)
        targets = objective.gather_targets(batch.tokens, mask, capacity)
        logits = logits_at(denoiser, theta, written, noisy, batch.valid, targets)
        return objective.row_losses(logits, targets) * maskable / jnp.maximum(count, 1)

    return jax.lax.map(one_copy, jnp.arange(samples))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def row_losses(
    denoiser: Denoiser,
    inner_loop: InnerLoop | None,
    samples: int,
    capacity: int,
    theta: Theta,
    key: Key,
    rows: Int[Array, "b"],
    batch: Batch,
    learned: InnerParameters | None = None,
) -> Float[Array, "b"]:
    """MDLM bound on -log p(response | prompt) of every row, in nats: mean of ``sampled_losses``.

    Args:
        denoiser: the backbone.
        inner_loop: writes the row's prompt (its valid tokens that are not maskable) into memory
            first; ``None`` is the plain model.
        samples: masked copies of every row.
        capacity: target slots, at least the maskable tokens of any row.
        theta: base parameters.
        key: PRNG key, the same for every batch.
        rows: number of every row; a row's masks depend on it only, not on its neighbours.
        batch: clean rows [b, l], padded on the right.
        learned: learned parts of the inner loop.
    """
    memory_keys, mask_keys = row_keys(key, rows)
    written = write(denoiser, inner_loop, theta, memory_keys, batch, learned)
    losses = sampled_losses(denoiser, samples, capacity, theta, written, mask_keys, rows, batch)
    return losses.mean(0)


def evaluate(
    systems: Sequence[System],
    rows: Sequence[Row],
    config: LikelihoodConfig,
    *,
    pad_token_id: int,
    batch_size: int = 8,
) -> dict:
    """Held-out loss of every system on the same masks.

    Args:
        systems: those with memory write each row's prompt first.
        rows: encoded conversations, two or more.
        config: samples and seed.
        pad_token_id: fills short rows.
        batch_size: rows at a time.

    Returns:
        JSON-ready ``{"config", "rows", "maskable_tokens", "systems": {name: {"loss",
        "standard_error"}}, "comparisons": [...]}``; nats per maskable token, errors over the rows.
        A comparison is the second system's loss minus the first's, row by row, with a 95 %
        interval and the p-value of Student's t over the rows, and Holm's adjustment.

    Raises:
        ValueError: fewer than two rows.
    """
    counts = np.array([len(row.tokens) - row.prompt_length for row in rows])
    sums = {}
    with Progress("held-out loss", len(systems) * len(rows), "row") as bar:
        for system in systems:
            sums[system.name] = dataset_losses(
                system, rows, config, pad_token_id, batch_size, bar.update
            )
    return {
        "config": dataclasses.asdict(config),
        "rows": len(rows),
        "maskable_tokens": int(counts.sum()),
        "systems": {name: _estimate(sums[name], counts) for name in sums},
        "comparisons": _compare(sums, counts),
    }


def _compare(sums: dict[str, np.ndarray], counts: Int[np.ndarray, "n"]) -> list[dict]:
    """Row-by-row differences of every two systems, with p-values adjusted for their number."""
    pairs = list(itertools.combinations(sums, 2))
    found = [_estimate(sums[b] - sums[a], counts) for a, b in pairs]
    both = [(d["loss"], d["standard_error"], len(counts)) for d in found]
    raw = [statistics.t_p_value(*each) for each in both]
    return [
        {"first": a, "second": b}
        | difference
        | {"interval": list(statistics.t_interval(*each)), "p_value": p, "p_adjusted": adjusted}
        for (a, b), difference, each, p, adjusted in zip(
            pairs, found, both, raw, statistics.holm(raw), strict=True
        )
    ]


def _estimate(sums: Float[np.ndarray, "n"], counts: Int[np.ndarray, "n"]) -> dict:
    loss, error = statistics.ratio_estimate(sums, counts)
    return {"loss": loss, "standard_error": error}


def dataset_losses(
    system: System,
    rows: Sequence[Row],
    config: LikelihoodConfig,
    pad_token_id: int,
    batch_size: int = 8,
    report: Callable[[int], Any] = lambda rows: None,
) -> Float[np.ndarray, "n"]:
    """``row_losses`` of every row, in the given order; rows of like length share a batch.

    ``report`` is called as by ``over_rows``.
    """

    def losses(places, batch, capacity):
        return row_losses(
            system.denoiser, system.inner_loop, config.samples, capacity, system.theta,
            jax.random.key(config.seed), places, batch, system.learned,
        )  # fmt: skip

    return over_rows(losses, rows, pad_token_id, batch_size, report)


def over_rows(
    measure: Callable[[Int[np.ndarray, "b"], Batch, int], Any],
    rows: Sequence[Row],
    pad_token_id: int,
    batch_size: int,
    report: Callable[[int], Any] = lambda rows: None,
) -> Any:
    """Measure all rows in batches of like length, compiled once for each width.

    Several processes share out the batches, and all return the same.

    Args:
        measure: (places of the rows [b], the rows, target slots that hold any row's response) ->
            tree of arrays [b, ...].
        rows: encoded conversations.
        pad_token_id: fills short rows.
        batch_size: rows at a time.
        report: called after every batch with the number of rows that all processes together have
            measured since the last call, so that all calls add up to the number of rows.

    Returns:
        The tree with numpy leaves [n, ...] in the order of the rows.
    """
    order = np.argsort([len(row.tokens) for row in rows], kind="stable")
    capacity = up_to(32, max(len(row.tokens) - row.prompt_length for row in rows))
    mine, reported = [], 0
    for start in range(0, len(rows), batch_size)[jax.process_index() :: jax.process_count()]:
        # A short last batch repeats its last row: one shape, and the repeats write the same loss.
        places = order[np.minimum(np.arange(start, start + batch_size), len(rows) - 1)]
        part = measure(places, pad_rows([rows[i] for i in places], pad_token_id), capacity)
        mine.append((places, jax.device_get(part)))
        # The others are about as far.
        done = min(start + batch_size, len(rows))
        report(done - reported)
        reported = done
    report(len(rows) - reported)
    found: Any = None
    for places, part in itertools.chain.from_iterable(processes.gather(mine)):
        if found is None:
            found = jax.tree.map(lambda leaf: np.zeros((len(rows), *leaf.shape[1:])), part)
        for whole, piece in zip(jax.tree.leaves(found), jax.tree.leaves(part), strict=True):
            whole[places] = piece
    return found


def up_to(multiple: int, length: int) -> int:
    """The next multiple: few shapes, few compilations."""
    return -(-length // multiple) * multiple


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> Batch:
    """Rows in one batch, padded on the right to a multiple of 128 columns."""
    width = up_to(128, max(1, *(len(row.tokens) for row in rows)))
    tokens = np.full((len(rows), width), pad_token_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
    columns = np.arange(width)
    valid = columns < np.array([[len(row.tokens)] for row in rows])
    maskable = valid & (columns >= np.array([[row.prompt_length] for row in rows]))
    return Batch(jnp.asarray(tokens), jnp.asarray(maskable), jnp.asarray(valid))
