"""LLaDA2.0 and 2.1 (arXiv 2512.15745): sigmoid router over groups, shared expert, fused QKV."""

import dataclasses
from typing import Any, ClassVar

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.family import (
    DENSE,
    EXPERTS,
    NORMS,
    SWIGLU,
    TOP,
    Family,
    Published,
    check_whole,
    mask_token_id_of,
    read_common,
    write_common,
)
from memdlm_jax.models.grouped import Implementation
from memdlm_jax.models.moe import MixtureSpec
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.registry import BACKBONES


@dataclasses.dataclass(frozen=True)
class LLaDA2Config(TransformerConfig):
    """Sizes of a LLaDA2; ``hidden_features`` is the inner size of its first, dense layers.

    The backbone was trained with block-causal attention (``attention_block=32``) and decodes with
    it; MemDLM trains it with attention in both directions (``attention_block=0``).

    Attributes:
        head_dim: channels of a head.
        num_experts: experts of a layer.
        experts_per_token: experts that each token goes through.
        expert_features: inner size of an expert.
        num_shared_experts: experts that every token goes through, computed as one.
        dense_layers: so many first layers are dense.
        router_groups: groups that experts are divided into.
        kept_router_groups: groups that a token may choose from.
        renormalise: divide the weights of the chosen experts by their sum.
        router_scale: factor on them.
        use_selection_bias: a bias on the router's choice; a buffer, never trained by gradients.
        normalise_heads: RMSNorm over the queries and keys of each head.
        use_bias: of the query, key and value map.
        rotary_channels: first channels of a head that turn.
        dispatch: see ``MixtureSpec``.
    """

    head_dim: int = 128
    num_experts: int = 256
    experts_per_token: int = 8
    expert_features: int = 512
    num_shared_experts: int = 1
    dense_layers: int = 1
    router_groups: int = 8
    kept_router_groups: int = 4
    renormalise: bool = True
    router_scale: float = 2.5
    use_selection_bias: bool = True
    normalise_heads: bool = True
    use_bias: bool = False
    rotary_channels: int = 64
    dispatch: Implementation = "ragged"

    def __post_init__(self):
        super().__post_init__()
        self.mixture()

    def _check_heads(self) -> None:
        turning = self.rotary_channels
        if turning % 2 or not 0 < turning <= self.head_dim:
            raise ValueError(
                f"rotary_channels={turning} must be even and in (0, head_dim={self.head_dim}]"
            )

    def attention(self) -> AttentionSpec:
        """One fused map; queries and keys are normed per head and turn in part."""
        return AttentionSpec(
            self.num_heads, self.num_kv_heads, self.head_dim, self.rope_theta,
            self.rotary_channels, self.norm_epsilon, self.normalise_heads, self.use_bias,
            fused=True,
        )  # fmt: skip

    def mixture(self) -> MixtureSpec:
        """A bias and the groups decide which experts, sigmoids how much of each."""
        return MixtureSpec(
            self.num_experts,
            self.experts_per_token,
            self.expert_features,
            shared_features=self.expert_features * self.num_shared_experts,
            score="sigmoid",
            use_selection_bias=self.use_selection_bias,
            groups=self.router_groups,
            kept_groups=self.kept_router_groups,
            renormalise=self.renormalise,
            scale=self.router_scale,
            dispatch=self.dispatch,
        )

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is a mixture of experts."""
        return layer >= self.dense_layers

    @property
    def router_is_linear(self) -> bool:
        """The published router is a bare parameter."""
        return False


def _read(p: Published) -> LLaDA2Config:
    """Our config for a published one of LLaDA2."""
    check_whole(p, "hidden_size", "num_attention_heads")
    head_dim = p.get("head_dim") or p["hidden_size"] // p["num_attention_heads"]
    turning = int(head_dim * (p.get("partial_rotary_factor") or 1.0))
    if p.get("rotary_dim", turning) != turning:
        raise ValueError(
            f"rotary_dim={p['rotary_dim']} must be head_dim={head_dim} times "
            f"partial_rotary_factor={p.get('partial_rotary_factor')}"
        )
    return LLaDA2Config(
        **read_common(p),
        mask_token_id=mask_token_id_of(p),
        hidden_features=p["intermediate_size"],
        head_dim=head_dim,
        num_experts=p["num_experts"],
        experts_per_token=p["num_experts_per_tok"],
        expert_features=p["moe_intermediate_size"],
        num_shared_experts=p.get("num_shared_experts") or 0,
        dense_layers=p.get("first_k_dense_replace") or 0,
        router_groups=p.get("n_group") or 1,
        kept_router_groups=p.get("topk_group") or 1,
        renormalise=bool(p.get("norm_topk_prob", True)),
        router_scale=float(p.get("routed_scaling_factor", 1.0)),
        use_selection_bias=bool(p.get("moe_router_enable_expert_bias", True)),
        normalise_heads=bool(p.get("use_qk_norm", True)),
        use_bias=bool(p.get("use_qkv_bias", False)),
        rotary_channels=turning,
    )


def _write(c: LLaDA2Config) -> dict[str, Any]:
    """Published fields for our config of LLaDA2."""
    return write_common(c) | {
        "first_k_dense_replace": c.dense_layers,
        "head_dim": c.head_dim,
        "intermediate_size": c.hidden_features,
        "moe_intermediate_size": c.expert_features,
        "moe_router_enable_expert_bias": c.use_selection_bias,
        "n_group": c.router_groups,
        "norm_topk_prob": c.renormalise,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "num_shared_experts": c.num_shared_experts,
        "partial_rotary_factor": c.rotary_channels / c.head_dim,
        "rotary_dim": c.rotary_channels,
        "routed_scaling_factor": c.router_scale,
        "topk_group": c.kept_router_groups,
        "use_qk_norm": c.normalise_heads,
        "use_qkv_bias": c.use_bias,
    }


@BACKBONES.register("llada2")
@dataclasses.dataclass(frozen=True)
class LLaDA2(Transformer):
    """LLaDA2 behind the ``Denoiser`` protocol."""

    config: LLaDA2Config
    family: ClassVar[Family] = Family(
        architectures=("LLaDA2MoeModelLM",),
        model_types=("llada2_moe", "llada2_moe_21", "llada21_moe", "llada2_moe_veomni"),
        read=_read,
        write=_write,
        fixed={
            "hidden_act": ("silu",),
            "norm_head": (False,),
            "rope_scaling": (None,),
            "router_dtype": ("fp32", "float32", None),
            "score_function": ("sigmoid",),
            "use_bias": (False,),
            "use_rmsnorm": (True,),
            "use_sliding_window": (False,),
            "using_split_qkv_in_self_attention": (False,),
        },
        dropouts=("attention_dropout", "embedding_dropout", "output_dropout"),
        top=TOP | {"embedding": "model.word_embeddings.weight"},
        layer="model.layers.{}.",
        names=NORMS
        | DENSE
        | EXPERTS
        | {
            "attention/query_key_value/kernel": "attention.query_key_value.weight",
            "attention/query_key_value/bias": "attention.query_key_value.bias",
            "attention/q_norm/scale": "attention.query_layernorm.weight",
            "attention/k_norm/scale": "attention.key_layernorm.weight",
            "attention/o_proj/kernel": "attention.dense.weight",
            "mlp/router/selection_bias": "mlp.gate.expert_bias",
            **{
                f"mlp/shared_experts/{name}/kernel": f"mlp.shared_experts.{name}.weight"
                for name in SWIGLU
            },
        },
        releases=dict.fromkeys(
            ("llada2_0_mini", "llada2_1_mini"),
            LLaDA2Config(
                vocab_size=157_184,
                width=2048,
                num_layers=20,
                num_heads=16,
                num_kv_heads=4,
                hidden_features=5120,
                mask_token_id=156_895,
                max_length=32_768,
                rope_theta=600_000.0,
                norm_epsilon=1e-6,
                dtype="bfloat16",
                param_dtype="bfloat16",
            ),
        ),
    )
