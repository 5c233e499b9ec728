"""Dream (arXiv 2508.15487): the Qwen2.5 architecture, bidirectional, predicting the next token."""

import dataclasses

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class DreamConfig(TransformerConfig):
    """Sizes of a Dream model.

    Attributes:
        shift: give position i the hidden state that predicts token i, which is the one at i - 1;
            without it, what the layers compute.
    """

    shift: bool = True

    def attention(self) -> AttentionSpec:
        """Queries, keys and values have biases."""
        return dataclasses.replace(super().attention(), use_bias=True)

    @property
    def right_shift(self) -> bool:
        """Whether the last hidden state at i predicts token i + 1."""
        return self.shift


@dataclasses.dataclass(frozen=True)
class Dream(Transformer):
    """Dream behind the ``Denoiser`` protocol.

    The first token of a row has no state before it and keeps its own: put a token that is never
    masked first (a prompt, or BOS as the public training code does).
    """

    config: DreamConfig
