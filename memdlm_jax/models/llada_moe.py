"""LLaDA-MoE (arXiv 2509.24389): normed heads, and a softmax router over routed experts."""

import dataclasses

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.grouped import Implementation
from memdlm_jax.models.moe import MixtureSpec
from memdlm_jax.models.transformer import Transformer


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


@dataclasses.dataclass(frozen=True)
class LLaDAMoE(Transformer):
    """LLaDA-MoE behind the ``Denoiser`` protocol."""

    config: LLaDAMoEConfig
