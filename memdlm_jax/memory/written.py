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


def write_texts(
    key: Key,
    inner_loop: InnerLoop,
    theta: Theta,
    texts: Texts,
    learned: InnerParameters | None = None,
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Write each text into a memory of its own, as in training with ``Batch.context``.

    What is masked and how it is weighed: ``trajectory.rows_of_texts``. Nothing is dropped.

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
    phi_key, anchor_key, mask_key = jax.random.split(key, 3)
    config, count = inner_loop.config, len(texts.tokens)
    rows = trajectories.rows_of_texts(anchor_key, texts, config, inner_loop.denoiser)
    trajectory = trajectories.draw(mask_key, config, rows, count)
    if phi is None:
        phi = inner_loop.start(phi_key, count, learned)
    return inner_loop.adapt(theta, learned, phi, trajectory, meta_gradient.FirstOrder())


def write_prompt(
    key: Key,
    inner_loop: InnerLoop,
    theta: Theta,
    tokens: Tokens,
    valid: Mask,
    learned: InnerParameters | None = None,
    phi: Phi = None,
) -> tuple[Phi, InnerStep]:
    """``write_texts`` of whole prompts [b, l], padded on either side, every row on its own."""
    config = dataclasses.replace(inner_loop.config, pieces="parallel")
    whole = dataclasses.replace(inner_loop, config=config)
    texts = Texts(tokens[:, None], valid[:, None])
    return write_texts(key, whole, theta, texts, learned, phi)


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
        (phi with one group per row, record of the inner steps [steps, rows]; with pieces in
        sequence [pieces, steps, rows], NaN for the pieces that a shorter prompt does not have).
    """
    write_one = _write_pieces if inner_loop.config.prompt_chunk else write_prompt

    def write(key, tokens, valid, phi):
        phi = None if phi is None else jax.tree.map(lambda leaf: leaf[None], phi)
        phi, record = write_one(key, inner_loop, theta, tokens[None], valid[None], learned, phi)
        return jax.tree.map(lambda leaf: leaf[0], phi), jax.tree.map(lambda x: x[..., 0], record)

    mapped = partitioning.map_groups(write, len(tokens), out_axes=(0, -1))
    return mapped(keys, tokens, valid, phi)


def _write_pieces(key, inner_loop, theta, tokens, valid, learned, phi):
    """``write_texts`` of one row in pieces."""
    width = min(inner_loop.config.prompt_chunk, tokens.shape[1])
    count, own = jnp.sum(valid), jnp.arange(width)
    size = -(-count // jnp.maximum(-(-count // width), 1))
    at = jnp.arange(-(-tokens.shape[1] // width))[:, None] * size + own
    present = (own < size) & (at < count)
    pieces = jnp.where(present, tokens[0, jnp.minimum(at, tokens.shape[1] - 1)], 0)
    texts = Texts(pieces[None], present[None])
    phi, record = write_texts(key, inner_loop, theta, texts, learned, phi)
    if inner_loop.config.pieces == "parallel":
        return phi, record
    record = jax.tree.map(lambda leaf: leaf.reshape(len(at), -1, 1), record)
    there = jnp.any(present, axis=-1)[:, None, None]
    return phi, dataclasses.replace(
        record,
        loss=jnp.where(there, record.loss, jnp.nan),
        gradient_norm=jnp.where(there, record.gradient_norm, jnp.nan),
        skipped=record.skipped & there,
    )
