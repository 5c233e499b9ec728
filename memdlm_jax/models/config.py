"""What a backbone is made of: sizes and switches, and how its layers form stacks."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Literal

from memdlm_jax.models.attention import AttentionSpec
from memdlm_jax.models.moe import MixtureSpec

Remat = Literal["none", "full", "dots"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches that all backbones have; a family adds its own.

    Attributes:
        vocab_size: rows of the embedding.
        width: d, size of the residual stream.
        num_layers: transformer layers.
        num_heads: query heads; ``num_kv_heads`` must divide it.
        num_kv_heads: key and value heads.
        hidden_features: inner size of a dense feed-forward block.
        mask_token_id: id of the mask token, below ``vocab_size``; ``None`` if it is not known
            (some published configs do not say).
        max_length: longest row in tokens that the model is meant for.
        rope_theta: base of the rotary frequencies.
        norm_epsilon: added to the mean square in RMSNorm.
        tied: whether the unembedding is the transposed embedding.
        dtype: dtype of the activations; norms, router and softmax take float32 or wider.
        param_dtype: dtype of the parameters.
        remat: what the backward pass recomputes, layer by layer: ``none``, ``full`` (everything),
            ``dots`` (all but matrix products).
        remat_layers: first layers that this holds for; the others recompute nothing. ``None`` is
            all. The adapted layers at the end are few, and run more often than the others.
            Without effect where ``remat`` is ``none``.
        vocab_chunk: the loss takes so many tokens of the vocabulary at a time, for large ones, or
            of a device's share of it on a mesh that divides it; 0 takes all.
        attention_block: 0 for attention in both directions; else tokens see their own block of so
            many tokens and those before it. Blocks are counted by position id, so that padding
            before a row's first token does not move them.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_features: int
    mask_token_id: int | None
    max_length: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tied: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "none"
    remat_layers: int | None = None
    attention_block: int = 0
    vocab_chunk: int = 0

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))  # A field's own type may be a string.
        for field in dataclasses.fields(self):
            if hints[field.name] is not int:
                continue
            value = getattr(self, field.name)
            if type(value) is not int:
                raise ValueError(f"{field.name}={value!r} must be a whole number")
            least = 1 if field.default is dataclasses.MISSING else 0
            if value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}")
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(f"remat={self.remat!r} must be one of 'none', 'full', 'dots'")
        cut = self.remat_layers
        if cut is not None and not 1 <= cut <= self.num_layers:
            raise ValueError(f"remat_layers={cut} must be in 1 .. num_layers={self.num_layers}")
        self._check_heads()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must lie in [0, vocab_size={self.vocab_size})"
            )

    def _check_heads(self) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width={self.width} must be num_heads={self.num_heads} times an even head size"
            )

    def attention(self) -> AttentionSpec:
        """Parts of an attention layer."""
        head = self.width // self.num_heads
        return AttentionSpec(
            self.num_heads, self.num_kv_heads, head, self.rope_theta, head, self.norm_epsilon
        )

    def mixture(self) -> MixtureSpec | None:
        """Parts of a mixture-of-experts block, ``None`` if no layer has one."""
        return None

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is a mixture of experts."""
        del layer
        return False

    @property
    def router_is_linear(self) -> bool:
        """Whether the published router is a linear layer, which adapters on all of those hit."""
        return True

    @property
    def right_shift(self) -> bool:
        """Whether the last hidden state at i predicts token i + 1.

        A config that can say so has a field ``shift``, see ``DreamConfig``.
        """
        return False


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one kind, stacked under one scan.

    Attributes:
        name: under which theta holds their stack.
        first: number of their first layer.
        length: how many they are.
        mixture: whether their feed-forward blocks are mixtures of experts.
    """

    name: str
    first: int
    length: int
    mixture: bool


def runs_of(config: TransformerConfig) -> list[Run]:
    """The runs of a model: one stack called ``layers``, or several named by their first layer."""
    kinds = [config.is_mixture(layer) for layer in range(config.num_layers)]
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    ends = [*starts[1:], len(kinds)]
    names = [f"layers_{i}" for i in starts] if len(starts) > 1 else ["layers"]
    return [
        Run(name, start, end - start, kinds[start])
        for name, start, end in zip(names, starts, ends, strict=True)
    ]


def matrices(config: TransformerConfig, mixture: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Paths and shapes of the matrices of one layer that can carry fast weights."""
    attention = config.attention()
    for name, features in attention.features().items():
        yield f"attention/{name}", (config.width, features)
    yield "attention/o_proj", (attention.num_heads * attention.head_dim, config.width)
    parts = config.mixture() if mixture else None
    if parts is None:
        yield from _swiglu("mlp", config.width, config.hidden_features)
        return
    yield from _swiglu("mlp/experts", config.width, parts.features, parts.num_experts)
    if parts.shared_features:
        yield from _swiglu("mlp/shared_experts", config.width, parts.shared_features)


def _swiglu(path: str, width: int, features: int, *experts: int):
    yield f"{path}/gate_proj", (*experts, width, features)
    yield f"{path}/up_proj", (*experts, width, features)
    yield f"{path}/down_proj", (*experts, features, width)
