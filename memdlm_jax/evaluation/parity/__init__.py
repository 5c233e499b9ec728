"""Replay recorded calls of the public MemDLM code and measure how far our numbers are from theirs.

A case is one ``.npz`` file: inputs, masks, weights and A of one training step (or of one prompt)
with the inner losses, gradients, fast weights, outer loss and logits that the public code computed
from them. ``tests/golden/README.md`` lists the arrays. What a case is follows from its
``config_json`` and its arrays alone. Beside the cases lie the base weights, ``weights*.npz``.
"""

from memdlm_jax.evaluation.parity.cases import BadCase, Case, load_folder
from memdlm_jax.evaluation.parity.compare import Quantity, replay, worst
from memdlm_jax.evaluation.parity.inputs import (
    anchor_of,
    clean_batch,
    denoiser_of,
    fast_weights_of,
    memory_config,
    theta_of,
    whole_trajectory,
)

__all__ = [
    "BadCase",
    "Case",
    "Quantity",
    "anchor_of",
    "clean_batch",
    "denoiser_of",
    "fast_weights_of",
    "load_folder",
    "memory_config",
    "replay",
    "theta_of",
    "whole_trajectory",
    "worst",
]
