"""Dream (arXiv 2508.15487): the Qwen2.5 architecture, bidirectional, predicting the next token."""

import dataclasses
from typing import Any, ClassVar

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.family import (
    ATTENTION,
    DENSE,
    NORMS,
    TOP,
    Family,
    Published,
    check_head_dim,
    read_common,
    write_common,
)
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.registry import BACKBONES


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


def _read(p: Published) -> DreamConfig:
    """Our config for a published one of Dream."""
    check_head_dim(p)
    return DreamConfig(
        **read_common(p),
        mask_token_id=p["mask_token_id"],
        hidden_features=p["intermediate_size"],
    )


def _write(c: DreamConfig) -> dict[str, Any]:
    """Published fields for our config of Dream."""
    return write_common(c) | {"intermediate_size": c.hidden_features}


@BACKBONES.register("dream")
@dataclasses.dataclass(frozen=True)
class Dream(Transformer):
    """Dream behind the ``Denoiser`` protocol.

    The first token of a row has no state before it and keeps its own: put a token that is never
    masked first (a prompt, or BOS as the public training code does).
    """

    config: DreamConfig
    family: ClassVar[Family] = Family(
        architectures=("DreamModel",),
        model_types=("Dream",),
        read=_read,
        write=_write,
        fixed={
            "hidden_act": ("silu",),
            "rope_scaling": (None,),
            "use_mrope": (False,),
            "use_sliding_window": (False,),
        },
        dropouts=("attention_dropout",),
        padding_sees=False,
        top=TOP,
        layer="model.layers.{}.",
        names=NORMS | ATTENTION | DENSE,
        releases={
            "dream_7b": DreamConfig(
                vocab_size=152_064,
                width=3584,
                num_layers=28,
                num_heads=28,
                num_kv_heads=4,
                hidden_features=18_944,
                mask_token_id=151_666,
                max_length=131_072,
                rope_theta=1_000_000.0,
                norm_epsilon=1e-6,
                dtype="bfloat16",
                param_dtype="bfloat16",
            )
        },
    )
