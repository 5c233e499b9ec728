"""Dense LLaDA (arXiv 2502.09992): a bidirectional LLaMA-style transformer."""

import dataclasses
from typing import Any, ClassVar

from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.family import Family, Published
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.registry import BACKBONES


@dataclasses.dataclass(frozen=True)
class LLaDAConfig(TransformerConfig):
    """Sizes of a dense LLaDA; see ``TransformerConfig``."""


def _read(p: Published) -> LLaDAConfig:
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


def _write(c: LLaDAConfig) -> dict[str, Any]:
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


@BACKBONES.register("llada")
@dataclasses.dataclass(frozen=True)
class LLaDA(Transformer):
    """Dense LLaDA behind the ``Denoiser`` protocol."""

    config: LLaDAConfig
    family: ClassVar[Family] = Family(
        architectures=("LLaDAModelLM",),
        model_types=("llada",),
        read=_read,
        write=_write,
        fixed={
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
        },
        dropouts=("attention_dropout", "embedding_dropout", "residual_dropout"),
        top={
            "embedding": "model.transformer.wte.weight",
            "final_norm/scale": "model.transformer.ln_f.weight",
            "unembedding": "model.transformer.ff_out.weight",
        },
        layer="model.transformer.blocks.{}.",
        names={
            "attention_norm/scale": "attn_norm.weight",
            "attention/q_proj/kernel": "q_proj.weight",
            "attention/k_proj/kernel": "k_proj.weight",
            "attention/v_proj/kernel": "v_proj.weight",
            "attention/o_proj/kernel": "attn_out.weight",
            "mlp_norm/scale": "ff_norm.weight",
            "mlp/gate_proj/kernel": "ff_proj.weight",
            "mlp/up_proj/kernel": "up_proj.weight",
            "mlp/down_proj/kernel": "ff_out.weight",
        },
        releases={
            "llada_8b": LLaDAConfig(
                vocab_size=126_464,
                width=4096,
                num_layers=32,
                num_heads=32,
                num_kv_heads=32,
                hidden_features=12_288,
                mask_token_id=126_336,
                max_length=4096,
                rope_theta=500_000.0,
                norm_epsilon=1e-5,
                dtype="bfloat16",
                param_dtype="bfloat16",
            )
        },
    )
