"""The config fields of the published families, read and written.

``*_FIXED`` holds the settings that change the computation: name -> the values that we compute, the
one we write first. A setting that is not there has that value.
"""

from collections.abc import Mapping
from typing import Any

from memdlm_jax.models.dream import DreamConfig
from memdlm_jax.models.llada import LLaDAConfig
from memdlm_jax.models.llada2 import LLaDA2Config
from memdlm_jax.models.llada_moe import LLaDAMoEConfig

Published = Mapping[str, Any]
"""A published ``config.json``."""

Fixed = Mapping[str, tuple]

# What no family has, and other models' configs may ask for: never ignored.
NOWHERE: Fixed = {
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "final_logit_softcapping": (None,),
    "logit_softcap": (None,),
    "norm_softmax": (False, None),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "sliding_window_pattern": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}

LLADA_FIXED: Fixed = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "rope": (True,),
    "scale_logits": (False,),
}

# The published code ignores norm_topk_prob, routed_scaling_factor and the router's groups.
LLADA_MOE_FIXED: Fixed = {
    "attention_bias": (False,),
    "clip_qkv": (None,),
    "hidden_act": ("silu",),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax",),
    "rope_scaling": (None,),
    "shared_expert_intermediate_size": (None, 0),
}

LLADA2_FIXED: Fixed = {
    "hidden_act": ("silu",),
    "norm_head": (False,),
    "rope_scaling": (None,),
    "router_dtype": ("fp32", "float32", None),
    "score_function": ("sigmoid",),
    "use_bias": (False,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
    "using_split_qkv_in_self_attention": (False,),
}

DREAM_FIXED: Fixed = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}


def _common(p: Published) -> dict[str, Any]:
    """Fields that LLaDA-MoE, LLaDA2 and Dream share."""
    return {
        "vocab_size": p["vocab_size"],
        "width": p["hidden_size"],
        "num_layers": p["num_hidden_layers"],
        "num_heads": p["num_attention_heads"],
        "num_kv_heads": p.get("num_key_value_heads") or p["num_attention_heads"],
        "max_length": p["max_position_embeddings"],
        "rope_theta": float(p["rope_theta"]),
        "norm_epsilon": p["rms_norm_eps"],
        "tied": bool(p.get("tie_word_embeddings", False)),
    }


def _check_whole(p: Published, *names: str) -> None:
    for name in names:
        if not isinstance(p[name], int):
            raise ValueError(f"{name}={p[name]!r} must be a whole number")


def _check_head_dim(p: Published) -> None:
    """Refuse heads that do not add up to the width, where the family has no such sizes."""
    _check_whole(p, "hidden_size", "num_attention_heads")
    size = p["hidden_size"] // p["num_attention_heads"]
    if p.get("head_dim") not in (None, size):
        raise ValueError(
            f"head_dim={p['head_dim']} is unsupported, only hidden_size / heads={size}"
        )


def _write_common(c: Any) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied,
    }


def _mask_token_id(p: Published) -> int | None:
    """The config's, or that of the release: LLaDA-MoE's and LLaDA2's configs do not name it."""
    if p.get("mask_token_id") is not None:
        return p["mask_token_id"]
    return 156_895 if p["vocab_size"] == 157_184 else None


def read_llada(p: Published) -> LLaDAConfig:
    """Our config for a published one of dense LLaDA."""
    kv_heads = p.get("n_kv_heads") or (1 if p.get("multi_query_attention") else p["n_heads"])
    return LLaDAConfig(
        vocab_size=p.get("embedding_size") or p["vocab_size"],
        width=p["d_model"],
        num_layers=p["n_layers"],
        num_heads=p["n_heads"],
        num_kv_heads=kv_heads,
        hidden_features=p.get("mlp_hidden_size") or int(p["mlp_ratio"] * p["d_model"]),
        mask_token_id=p["mask_token_id"],
        max_length=p["max_sequence_length"],
        rope_theta=float(p["rope_theta"]),
        norm_epsilon=p["rms_norm_eps"],
        tied=bool(p.get("weight_tying", False)),
    )


def write_llada(c: LLaDAConfig) -> dict[str, Any]:
    """Published fields for our config of dense LLaDA."""
    return {
        "d_model": c.width,
        "embedding_size": c.vocab_size,
        "max_sequence_length": c.max_length,
        "mlp_hidden_size": c.hidden_features,
        "n_heads": c.num_heads,
        "n_kv_heads": c.num_kv_heads,
        "n_layers": c.num_layers,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "vocab_size": c.vocab_size,
        "weight_tying": c.tied,
    }


def read_llada_moe(p: Published) -> LLaDAMoEConfig:
    """Our config for a published one of LLaDA-MoE."""
    _check_head_dim(p)
    frequency = p.get("moe_layer_freq") or [1] * p["num_hidden_layers"]
    if len(frequency) != p["num_hidden_layers"]:
        raise ValueError(f"moe_layer_freq={frequency} must have num_hidden_layers entries")
    return LLaDAMoEConfig(
        **_common(p),
        mask_token_id=_mask_token_id(p),
        hidden_features=p.get("dense_intermediate_size") or p["expert_intermediate_size"],
        num_experts=p["num_experts"],
        experts_per_token=p["num_experts_per_tok"],
        expert_features=p["expert_intermediate_size"],
        dense_layers=tuple(i for i, mixture in enumerate(frequency) if not mixture),
        normalise_heads=bool(p.get("qk_layernorm", True)),
        rotary_fraction=float(p.get("partial_rotary_factor") or 1),
    )


def write_llada_moe(c: LLaDAMoEConfig) -> dict[str, Any]:
    """Published fields for our config of LLaDA-MoE."""
    return _write_common(c) | {
        "dense_intermediate_size": c.hidden_features,
        "expert_intermediate_size": c.expert_features,
        "moe_layer_freq": [int(c.is_mixture(i)) for i in range(c.num_layers)],
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "partial_rotary_factor": c.rotary_fraction,
        "qk_layernorm": c.normalise_heads,
    }


def read_llada2(p: Published) -> LLaDA2Config:
    """Our config for a published one of LLaDA2."""
    _check_whole(p, "hidden_size", "num_attention_heads")
    head_dim = p.get("head_dim") or p["hidden_size"] // p["num_attention_heads"]
    turning = int(head_dim * (p.get("partial_rotary_factor") or 1.0))
    if p.get("rotary_dim", turning) != turning:
        raise ValueError(
            f"rotary_dim={p['rotary_dim']} must be head_dim={head_dim} times "
            f"partial_rotary_factor={p.get('partial_rotary_factor')}"
        )
    return LLaDA2Config(
        **_common(p),
        mask_token_id=_mask_token_id(p),
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


def write_llada2(c: LLaDA2Config) -> dict[str, Any]:
    """Published fields for our config of LLaDA2."""
    return _write_common(c) | {
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


def read_dream(p: Published) -> DreamConfig:
    """Our config for a published one of Dream."""
    _check_head_dim(p)
    return DreamConfig(
        **_common(p),
        mask_token_id=p["mask_token_id"],
        hidden_features=p["intermediate_size"],
    )


def write_dream(c: DreamConfig) -> dict[str, Any]:
    """Published fields for our config of Dream."""
    return _write_common(c) | {"intermediate_size": c.hidden_features}
