"""LLaDA2.0 and 2.1 (arXiv 2512.15745): sigmoid router over groups, shared expert, fused QKV."""

import dataclasses

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.config import TransformerConfig
from memdlm_jax.models.grouped import Implementation
from memdlm_jax.models.moe import MixtureSpec
from memdlm_jax.models.transformer import Transformer


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


@dataclasses.dataclass(frozen=True)
class LLaDA2(Transformer):
    """LLaDA2 behind the ``Denoiser`` protocol."""

    config: LLaDA2Config
