"""Replies to read, and how one of them came about."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from memdlm_jax.data.sft import Row
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.systems import System, reply
from memdlm_jax.progress import Progress


def sample_replies(
    systems: Sequence[System],
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    config: DecodeConfig,
    *,
    seed: int,
    max_length: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every system's replies to the prompts of a few rows, and the last system's way to its first.

    Returns:
        JSON-ready (``[{"prompt", "response", "replies": {system: text}}]``, ``{"system",
        "prompt", "steps", "tokens"}``); ``response`` is the row's own, prompts spell their turns.
    """
    prompts = [row.tokens[: row.prompt_length].tolist() for row in rows]
    replies = {}
    with Progress("sampled replies", len(systems) * len(rows), "prompt", brief=True) as bar:
        for system in systems:
            replies[system.name] = reply(
                system, tokenizer, prompts, config, seed=seed, max_length=max_length
            )
            bar.update(len(rows))
    texts = [tokenizer.decode(prompt, skip_special=False) for prompt in prompts]
    samples = [
        {"prompt": texts[i], "response": tokenizer.decode(row.tokens[row.prompt_length :])}
        | {"replies": {name: said.texts[i] for name, said in replies.items()}}
        for i, row in enumerate(rows)
    ]
    name, last = list(replies.items())[-1]
    history = denoising_history(last.decoded, 0, tokenizer)
    return samples, {"system": name, "prompt": texts[0]} | history


def denoising_history(decoded: Decoded, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """How one row was filled, JSON-ready: text, commit step and confidence of every token.

    What stands behind the end of a row that stopped early was not decoded and is left out.
    """
    tokens, steps, confidence = (
        np.asarray(leaf)[row] for leaf in (decoded.tokens, decoded.commit_step, decoded.confidence)
    )
    return {
        "steps": int(steps.max()) + 1,
        "tokens": [
            {
                "text": tokenizer.decode([token], skip_special=False),
                "step": int(step),
                "confidence": round(min(float(sure), 1.0), 4) if math.isfinite(sure) else 0.0,
            }
            for token, step, sure in zip(tokens, steps, confidence, strict=True)
            if step >= 0
        ],
    }
