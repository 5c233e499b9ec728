"""How much of the attention of an answer's masks falls on the needle, by layer and head."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from memdlm_jax.evaluation import retrieval_answers, statistics
from memdlm_jax.evaluation.retrieval_answers import Asked, Memory, Run, Writer
from memdlm_jax.evaluation.retrieval_probes import Probe, Span
from memdlm_jax.evaluation.systems import System
from memdlm_jax.inference.generation import Generator
from memdlm_jax.models.attention import attention_weights, sees_block
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.typing import Context, Denoiser, Phi, Theta

PARTS = ("needle", "value")


@functools.partial(jax.jit, static_argnums=0)
def shares(
    generator: Generator,
    theta: Theta,
    phi: Phi,
    asked: Asked,
    parts: Bool[Array, "b t p"],
    scored: Bool[Array, "b c"],
) -> tuple[Float[Array, "b n h t"], Float[Array, "b t"]]:
    """Attention from the masks of an answer to parts of its prompt; compiled once per shape.

    The response is masked whole and the canvas ends with it. Weights exist for one layer at a
    time and for the queries of the response alone.

    Args:
        generator: the model, a ``Transformer``.
        theta: base parameters.
        phi: fast weights, one group per row, or ``None``.
        asked: questions and the responses to them.
        parts: which of each row's own tokens, counted from its first, are in each part.
        scored: places of the response to look from; at least one in a row.

    Returns:
        (mean over these places of the attention that falls on each part, in [0, 1]; the share of
        each part among the tokens that they see, which uniform attention would give it).
    """
    config, denoiser = generator.config, transformer(generator.denoiser)
    canvas = retrieval_answers.scored_canvas(asked, config, denoiser.mask_token_id)
    own, width = canvas.position_ids, asked.tokens.shape[1]
    inside = jnp.take_along_axis(parts, jnp.minimum(own, width - 1)[:, None, :], axis=2)
    inside &= (own < width)[:, None, :]
    attend = canvas.valid
    if config.attention == "block_causal":
        columns = (jnp.arange(own.shape[1]) - canvas.start)[None]
        attend = attend[:, None, :] & sees_block(columns, columns, config.block_size)
    # Where the predictions of these places are made.
    first = canvas.start + canvas.offset - denoiser.lookback
    queries = first[:, None] + jnp.arange(scored.shape[1])

    def one_row(phi, *row):
        tokens, attend, positions, queries, scored, inside = (x[None] for x in row)
        split = 0 if phi is None else generator.split
        context = Context(attend, positions)
        seen = denoiser.inspect(theta, tokens, context, phi, split=split, heads=True)
        weigh = functools.partial(_on_parts, queries[0], scored[0], inside[0], seen["mask"])
        on_parts = jax.lax.map(lambda x: weigh(*x), (seen["query"], seen["key"]))
        return on_parts, _uniform(queries[0], scored[0], inside[0], seen["mask"])

    row = canvas.tokens, attend, own, queries, scored, inside
    return jax.vmap(one_row, (None if phi is None else 0, *(0,) * len(row)))(phi, *row)


def _on_parts(queries, scored, inside, mask, query, key) -> Float[Array, "h t"]:
    """One layer's attention on the parts, mean over the scored queries."""
    here = mask[:, queries] if mask.ndim == 3 else mask
    weights = attention_weights(query[:, queries], key, here)[0]
    on_parts = jnp.einsum("hqk,tk->qht", weights, inside.astype(weights.dtype))
    return jnp.mean(on_parts, axis=0, where=scored[:, None, None])


def _uniform(queries, scored, inside, mask) -> Float[Array, "t"]:
    """Share of the parts among the keys that the scored queries see."""
    here = mask[0, queries] if mask.ndim == 3 else jnp.repeat(mask, len(queries), axis=0)
    on_parts = jnp.sum(here[:, None] & inside, axis=-1) / jnp.sum(here, axis=-1, keepdims=True)
    return jnp.mean(on_parts, axis=0, where=scored[:, None])


def transformer(denoiser: Denoiser) -> Transformer:
    """The denoiser itself.

    Raises:
        TypeError: it does not show its attention.
    """
    if not isinstance(denoiser, Transformer):
        kind = type(denoiser).__name__
        raise TypeError(f"{kind} does not show its attention: a Transformer is needed")
    return denoiser


def profile(
    system: System, memory: Memory, probes: Sequence[Probe], run: Run, pad_token_id: int
) -> tuple[Float[np.ndarray, "n l h t"], Float[np.ndarray, "n t"]]:
    """``shares`` of every probe, its context in view; the parts are those of ``PARTS``.

    Raises:
        TypeError: the denoiser does not show its attention.
        ValueError: a probe names no needle; or see ``retrieval_answers.lay_out``.
    """
    generator = retrieval_answers.generator_of(system, memory, run.decode)
    transformer(system.denoiser)
    for row, probe in enumerate(probes):
        if not probe.needles:
            raise ValueError(f"probes[{row}] names no needle: there is nothing to look for")
    asked = retrieval_answers.lay_out(probes, "full", system, run, pad_token_id)
    width = asked.tokens.shape[1]
    parts = np.array([[_marked(p.needles, width), _marked(p.values, width)] for p in probes])
    scored = np.zeros(asked.response.shape, bool)
    for row, probe in enumerate(probes):
        scored[row, list(probe.scored)] = True
    writer = Writer(system, memory, probes, (), run, pad_token_id)
    found = []
    for rows in retrieval_answers.batches(len(probes), run):
        here = jax.tree.map(lambda leaf, at=rows.places: leaf[at], (asked, parts, scored))
        got = jax.device_get(shares(generator, system.theta, writer.write(rows), *here))
        found.append([x[: rows.count] for x in got])
    attention, uniform = (np.concatenate(x).astype(np.float64) for x in zip(*found, strict=True))
    return attention, uniform


def _marked(spans: Sequence[Span], width: int) -> np.ndarray:
    marked = np.zeros(width, bool)
    for span in spans:
        marked[slice(*span)] = True
    return marked


def evaluate(
    system: System, probes: Sequence[Probe], run: Run, pad_token_id: int
) -> dict[str, Any]:
    """Attention on the needle with memory off and on, and what the memory changes.

    Fast weights change attention from the first layer on that reads what they changed: layers
    below the head never do, and where only feed-forward blocks adapt, neither does the head's
    first layer, so that a head of one layer changes none.

    Returns:
        JSON-ready ``{"n", "head_begins", "parts": {"needle" | "value": {"uniform", "off", "on",
        "difference"}}}``. ``head_begins`` is the first layer with fast weights, ``None`` without
        memory. ``uniform`` is the mean share of the tokens in view; the others hold lists by layer
        and head: ``mean`` over rows and its ``standard_error``. ``difference`` is on less off, row
        by row, with ``p_value`` of Student's t, not adjusted for the number of heads; ``on`` and
        ``difference`` are there with memory alone.

    Raises:
        TypeError, ValueError: see ``profile``; or there are fewer than two probes.
    """
    if len(probes) < 2:
        raise ValueError(f"{len(probes)} probes are too few: a standard error needs two")
    modes = [mode for mode in retrieval_answers.memories(system) if mode != "control"]
    found = {mode: profile(system, mode, probes, run, pad_token_id) for mode in modes}
    uniform = found["off"][1]
    parts: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(PARTS):
        rows = {mode: attention[..., index] for mode, (attention, _) in found.items()}
        parts[name] = {"uniform": float(uniform[:, index].mean())}
        parts[name] |= {mode: _mean(each) for mode, each in rows.items()}
        if "on" in rows:
            parts[name]["difference"] = _difference(rows["on"] - rows["off"])
    split = retrieval_answers.generator_of(system, modes[-1], run.decode).split
    begins = split if len(modes) > 1 else None
    return {"n": len(uniform), "head_begins": begins, "parts": parts}


def _mean(rows: Float[np.ndarray, "n l h"]) -> dict[str, Any]:
    error = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    return {"mean": rows.mean(0).tolist(), "standard_error": error.tolist()}


def _difference(rows: Float[np.ndarray, "n l h"]) -> dict[str, Any]:
    found = _mean(rows)
    p_values = [
        [statistics.t_p_value(value, error, len(rows)) for value, error in zip(*heads, strict=True)]
        for heads in zip(found["mean"], found["standard_error"], strict=True)
    ]
    return found | {"p_value": p_values}
