"""Dense LLaDA (arXiv 2502.09992): a bidirectional LLaMA-style transformer."""

import dataclasses

from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LLaDAConfig(TransformerConfig):
    """Sizes of a dense LLaDA; see ``TransformerConfig``."""


@dataclasses.dataclass(frozen=True)
class LLaDA(Transformer):
    """Dense LLaDA behind the ``Denoiser`` protocol."""

    config: LLaDAConfig
