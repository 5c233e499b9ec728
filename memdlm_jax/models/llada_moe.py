"""LLaDA-MoE (arXiv 2509.24389): normed heads, and a softmax router over routed experts."""

import dataclasses
from typing import Any, ClassVar

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    NORMS,
    TOP,
    Family,
    Published,
    check_head_dim,
    mask_token_id_of,
    read_common,
    write_common,
)
from memdlm_jax.models.grouped import Implementation
from memdlm_jax.models.moe import MixtureSpec
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.registry import BACKBONES


@dataclasses.dataclass(frozen=True)
class LLaDAMoEConfig(TransformerConfig):
    """Sizes of a LLaDA-MoE; ``hidden_features`` is the inner size of its dense layers, if any.

    Attributes:
        num_experts: experts of a layer.
        experts_per_token: experts that each token goes through.
        expert_features: inner size of an expert.
        dense_layers: layers whose feed-forward block is dense.
        normalise_heads: RMSNorm over the queries and keys of each head.
        rotary_fraction: in (0, 1]; share of a head's channels that turn.
        dispatch: see ``MixtureSpec``.
    """

    num_experts: int = 64
    experts_per_token: int = 8
    expert_features: int = 1024
    dense_layers: tuple[int, ...] = ()
    normalise_heads: bool = True
    rotary_fraction: float = 1.0
    dispatch: Implementation = "ragged"

    def __post_init__(self):
        super().__post_init__()
        self.mixture()
        if not set(self.dense_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"dense_layers={self.dense_layers} must be layers below {self.num_layers}"
            )

    def attention(self) -> AttentionSpec:
        """Queries and keys are normed per head."""
        plain = super().attention()
        turning = int(plain.head_dim * self.rotary_fraction)
        return dataclasses.replace(
            plain, normalise_heads=self.normalise_heads, rotary_channels=turning
        )

    def mixture(self) -> MixtureSpec:
        """Raw probabilities weigh the chosen experts: they do not sum to 1."""
        return MixtureSpec(
            self.num_experts,
            self.experts_per_token,
            self.expert_features,
            dispatch=self.dispatch,
        )

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is a mixture of experts."""
        return layer not in self.dense_layers


def _read(p: Published) -> LLaDAMoEConfig:
    """Our config for a published one of LLaDA-MoE."""
    check_head_dim(p)
    frequency = p.get("moe_layer_freq") or [1] * p["num_hidden_layers"]
    if len(frequency) != p["num_hidden_layers"]:
        raise ValueError(f"moe_layer_freq={frequency} must have num_hidden_layers entries")
    return LLaDAMoEConfig(
        **read_common(p),
        mask_token_id=mask_token_id_of(p),
        hidden_features=p.get("dense_intermediate_size") or p["expert_intermediate_size"],
        num_experts=p["num_experts"],
        experts_per_token=p["num_experts_per_tok"],
        expert_features=p["expert_intermediate_size"],
        dense_layers=tuple(i for i, mixture in enumerate(frequency) if not mixture),
        normalise_heads=bool(p.get("qk_layernorm", True)),
        rotary_fraction=float(p.get("partial_rotary_factor") or 1),
    )


def _write(c: LLaDAMoEConfig) -> dict[str, Any]:
    """Published fields for our config of LLaDA-MoE."""
    return write_common(c) | {
        "dense_intermediate_size": c.hidden_features,
        "expert_intermediate_size": c.expert_features,
        "moe_layer_freq": [int(c.is_mixture(i)) for i in range(c.num_layers)],
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "partial_rotary_factor": c.rotary_fraction,
        "qk_layernorm": c.normalise_heads,
    }


@BACKBONES.register("llada_moe")
@dataclasses.dataclass(frozen=True)
class LLaDAMoE(Transformer):
    """LLaDA-MoE behind the ``Denoiser`` protocol."""

    config: LLaDAMoEConfig
    family: ClassVar[Family] = Family(
        architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
        model_types=("llada", "lladamoe"),
        marker="num_experts",
        read=_read,
        write=_write,
        # The published code ignores norm_topk_prob, routed_scaling_factor and the router's groups.
        fixed={
            "attention_bias": (False,),
            "clip_qkv": (None,),
            "hidden_act": ("silu",),
            "moe_router_enable_expert_bias": (False, None),
            "moe_router_score_function": ("softmax",),
            "rope_scaling": (None,),
            "shared_expert_intermediate_size": (None, 0),
        },
        dropouts=("attention_dropout",),
        top=TOP,
        layer="model.layers.{}.",
        names=NORMS
        | ATTENTION
        | DENSE
        | EXPERTS
        | {
            "attention/q_norm/scale": "self_attn.q_norm.weight",
            "attention/k_norm/scale": "self_attn.k_norm.weight",
        },
        releases={
            "llada_moe_7b_a1b": LLaDAMoEConfig(
                vocab_size=157_184,
                width=2048,
                num_layers=16,
                num_heads=16,
                num_kv_heads=16,
                hidden_features=8192,
                mask_token_id=156_895,
                max_length=8192,
                rope_theta=50_000.0,
                norm_epsilon=1e-5,
                dtype="bfloat16",
                param_dtype="bfloat16",
            )
        },
    )
