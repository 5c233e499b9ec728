"""The published models, full size: name -> denoiser. No weights; see ``checkpoints`` for those."""

from typing import Any

from memdlm_jax.models.dream import Dream, DreamConfig
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.llada2 import LLaDA2, LLaDA2Config
from memdlm_jax.models.llada_moe import LLaDAMoE, LLaDAMoEConfig
from memdlm_jax.models.transformer import Transformer

_BF16: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}

_LLADA2_MINI = LLaDA2(
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
        **_BF16,
    )
)

PUBLISHED: dict[str, Transformer] = {
    "llada_8b": LLaDA(
        LLaDAConfig(
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
            **_BF16,
        )
    ),
    "llada_moe_7b_a1b": LLaDAMoE(
        LLaDAMoEConfig(
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
            **_BF16,
        )
    ),
    "llada2_0_mini": _LLADA2_MINI,
    "llada2_1_mini": _LLADA2_MINI,
    "dream_7b": Dream(
        DreamConfig(
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
            **_BF16,
        )
    ),
}
