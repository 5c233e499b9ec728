"""Write prompts and texts into memory, to be read afterwards.

``write_prompts`` is the paper's use (section 4.5, Train & Inference): each row's prompt before it
is decoded. ``write_texts`` writes texts that the questions do not contain.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memdlm_jax import partitioning
from memdlm_jax.memory import meta_gradient
from memdlm_jax.memory import trajectory as trajectories
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters, InnerStep
from memdlm_jax.typing import Key, Mask, Phi, Texts, Theta, Tokens


def write_prompt(
    key: Key,
    inner_loop: InnerLoop,
    theta: Theta,
    tokens: Tokens,
    valid: Mask,
    learned: InnerParameters | None = None,
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Adapt fast weights to each row's own prompt, every row on its own.

    What is masked and how it is weighed: ``trajectory.rows_of_text``. Nothing is dropped.

    Args:
        key: PRNG key.
        inner_loop: how to write; the scope is always ``example`` here, the weighting ``uniform``.
        theta: base parameters.
        tokens: [b, l] int32 prompts, padded on either side.
        valid: [b, l] bool, False on padding.
        learned: learned parts of the inner loop.
        phi: fast weights that were written before, one group per row; ``None`` starts afresh.

    Returns:
        (phi with one group per row, record of the inner steps). No gradient flows to theta.
    """
    phi_key, anchor_key, mask_key = jax.random.split(key, 3)
    config = dataclasses.replace(inner_loop.config, weighting="uniform")
    count = tokens.shape[0]
    rows = trajectories.rows_of_text(anchor_key, config, inner_loop.denoiser, tokens, valid)
    trajectory = trajectories.draw(mask_key, config, rows, count)
    if phi is None:
        phi = inner_loop.start(phi_key, count, learned)
    return inner_loop.adapt(theta, learned, phi, trajectory, meta_gradient.FirstOrder())


def write_texts(
    key: Key,
    inner_loop: InnerLoop,
    theta: Theta,
    texts: Texts,
    learned: InnerParameters | None = None,
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Write each text into a memory of its own, as in training with ``Batch.context``.

    Args:
        key: PRNG key.
        inner_loop: how to write; the scope is always ``example`` here.
        theta: base parameters.
        texts: what to write, [t, m, k].
        learned: learned parts of the inner loop.
        phi: fast weights that were written before, one group per text; ``None`` starts afresh.

    Returns:
        (phi with one group per text, record of the inner steps). No gradient flows to theta.
    """
    phi_key, mask_key = jax.random.split(key)
    count = len(texts.tokens)
    trajectory = inner_loop.draw_texts(mask_key, texts, count)
    if phi is None:
        phi = inner_loop.start(phi_key, count, learned)
    return inner_loop.adapt(theta, learned, phi, trajectory, meta_gradient.FirstOrder())


def write_prompts(
    keys: Key,
    inner_loop: InnerLoop,
    theta: Theta,
    tokens: Tokens,
    valid: Mask,
    learned: InnerParameters | None = None,
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Write each row's prompt into its own fast weights, with its own key.

    With ``prompt_chunk`` a prompt is cut into the fewest pieces of at most that many tokens, all
    of about the same size, each read alone, from position 0. ``pieces`` says whether they are
    written one after the other or together.

    Args:
        keys: [b] one PRNG key per row.
        inner_loop: how to write.
        theta: base parameters.
        tokens: [b, p] int32, beginning in column 0.
        valid: [b, p] bool, False on what is not prompt.
        learned: learned parts of the inner loop.
        phi: fast weights that were written before, one group per row; ``None`` starts afresh.

    Returns:
        (phi with one group per row, record of the inner steps [steps, rows]; with pieces
        [pieces, steps, rows], NaN for the pieces that a shorter prompt does not have).
    """
    write_one = _write_pieces if inner_loop.config.prompt_chunk else write_prompt

    def write(key, tokens, valid, phi):
        phi = None if phi is None else jax.tree.map(lambda leaf: leaf[None], phi)
        phi, record = write_one(key, inner_loop, theta, tokens[None], valid[None], learned, phi)
        return jax.tree.map(lambda leaf: leaf[0], phi), jax.tree.map(lambda x: x[..., 0], record)

    mapped = partitioning.map_groups(write, len(tokens), out_axes=(0, -1))
    return mapped(keys, tokens, valid, phi)


def _write_pieces(key, inner_loop, theta, tokens, valid, learned, phi):
    """``write_prompt`` of one row's pieces, in order or together."""
    width = min(inner_loop.config.prompt_chunk, tokens.shape[1])
    count = jnp.sum(valid)
    size = -(-count // jnp.maximum(-(-count // width), 1))
    phi_key, key = jax.random.split(key)
    if phi is None:
        phi = inner_loop.start(phi_key, 1, learned)

    def cut(number):
        own = jnp.arange(width)
        at = number * size + own
        present = (own < size) & (at < count)
        return jnp.where(present, tokens[0, jnp.minimum(at, tokens.shape[1] - 1)], 0), present

    numbers = jnp.arange(-(-tokens.shape[1] // width))
    if inner_loop.config.pieces == "parallel":
        pieces = jax.vmap(cut)(numbers)
        texts = Texts(*(part[None] for part in pieces))
        return write_texts(key, inner_loop, theta, texts, learned, phi)

    def write(phi, number):
        piece, present = cut(number)
        piece_key = jax.random.fold_in(key, number)
        rows = piece[None], present[None]
        new, record = write_prompt(piece_key, inner_loop, theta, *rows, learned, phi)
        there = jnp.any(present)
        new = jax.tree.map(lambda a, b: jnp.where(there, a, b), new, phi)
        record = dataclasses.replace(
            record,
            loss=jnp.where(there, record.loss, jnp.nan),
            gradient_norm=jnp.where(there, record.gradient_norm, jnp.nan),
            skipped=record.skipped & there,
        )
        return new, record

    return jax.lax.scan(write, phi, numbers)
