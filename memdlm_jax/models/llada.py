"""The dense LLaDA backbone: a bidirectional LLaMA-style transformer (arXiv 2502.09992)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdlm_jax.models.attention import Attention
from memdlm_jax.models.layers import RMSNorm, SwiGLU
from memdlm_jax.typing import Hidden, Key, Mask, Phi, Theta, Tokens


@dataclasses.dataclass(frozen=True)
class LLaDAConfig:
    """Sizes of a dense LLaDA.

    Attributes:
        vocab_size: rows of the embedding.
        width: d, size of the residual stream.
        num_layers: transformer layers.
        num_heads: query heads; ``num_kv_heads`` must divide it.
        num_kv_heads: key and value heads.
        hidden_features: inner size of the feed-forward block.
        mask_token_id: id of the mask token, below ``vocab_size``.
        max_length: longest row in tokens that the model is meant for.
        rope_theta: base of the rotary frequencies.
        norm_epsilon: added to the mean square in RMSNorm.
        tied: whether the unembedding is the transposed embedding.
        dtype: dtype of the activations.
        param_dtype: dtype of the parameters.
        remat: recompute each layer's activations in the backward pass.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_features: int
    mask_token_id: int
    max_length: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tied: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "mask_token_id" and field.type is int and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width={self.width} must be num_heads={self.num_heads} times an even head size"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must lie in [0, vocab_size={self.vocab_size})"
            )


class Block(nn.Module):
    """One pre-norm layer: attention, then SwiGLU. Returns a pair, as ``nn.scan`` asks."""

    config: LLaDAConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array | None, position_ids: jax.Array
    ) -> tuple[jax.Array, None]:
        """Map [b, l, d] to ([b, l, d], None)."""
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(c.width**-0.5)
        output_init = nn.initializers.normal((2 * c.num_layers * c.width) ** -0.5)
        attention = Attention(
            c.num_heads, c.num_kv_heads, c.width // c.num_heads, c.rope_theta,
            init, output_init, dtype, name="attention",
        )  # fmt: skip
        x = x + attention(
            RMSNorm(c.norm_epsilon, dtype, name="attention_norm")(x), valid, position_ids
        )
        mlp = SwiGLU(c.hidden_features, init, output_init, dtype, name="mlp")
        return x + mlp(RMSNorm(c.norm_epsilon, dtype, name="mlp_norm")(x)), None


def _stack(config: LLaDAConfig, length: int) -> nn.Module:
    """``length`` blocks under one scan: compile time does not grow with depth."""
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    return nn.scan(
        block,
        variable_axes={"params": 0, "fast": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
    )(config)


def _run(
    config: LLaDAConfig, layers: Theta, phi: Phi, hidden: Hidden, valid: Mask | None, positions
) -> Hidden:
    """Run stacked ``layers`` (leading axis = how many) with optional fast weights."""
    length = jax.tree.leaves(layers)[0].shape[0]
    if length == 0:
        return hidden
    variables = {"params": layers} if phi is None else {"params": layers, "fast": phi}
    return _stack(config, length).apply(variables, hidden, valid, positions)[0]


@dataclasses.dataclass(frozen=True)
class LLaDA:
    """Dense LLaDA as pure functions of theta; answers the ``Denoiser`` protocol.

    Theta is ``{"embedding": [v, d], "layers": stacked, "final_norm": ..., "unembedding": [d, v]}``
    (no ``unembedding`` when tied); every leaf of ``layers`` has a leading axis of ``num_layers``.
    Fast weights mirror ``layers`` for the head's layers only.
    """

    config: LLaDAConfig

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return self.config.num_layers

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self.config.mask_token_id

    def init(self, key: Key) -> Theta:
        """Draw fresh parameters: normal, standard deviation 1/sqrt(d), depth-scaled outputs."""
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        embed_key, layer_key, out_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 2, c.width), jnp.dtype(c.dtype))
        layers = _stack(c, c.num_layers).init(layer_key, x, None, jnp.arange(2)[None])["params"]
        normal = nn.initializers.normal(c.width**-0.5)
        theta = {
            "embedding": normal(embed_key, (c.vocab_size, c.width), dtype),
            "layers": layers,
            "final_norm": {"scale": jnp.ones((c.width,), dtype)},
        }
        if not c.tied:
            theta["unembedding"] = normal(out_key, (c.width, c.vocab_size), dtype)
        return theta

    def trunk(
        self,
        theta: Theta,
        tokens: Tokens,
        valid: Mask | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
    ) -> Hidden:
        """Embed ``tokens`` and run layers ``0 .. split - 1``; [b, l] int32 -> [b, l, d]."""
        hidden = theta["embedding"][tokens].astype(self.config.dtype)
        layers = jax.tree.map(lambda leaf: leaf[:split], theta["layers"])
        return _run(self.config, layers, None, hidden, valid, _positions(hidden, position_ids))

    def head(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        valid: Mask | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
    ) -> Hidden:
        """Run layers ``split .. num_layers - 1`` with fast weights ``phi`` (or ``None``)."""
        layers = jax.tree.map(lambda leaf: leaf[split:], theta["layers"])
        return _run(self.config, layers, phi, hidden, valid, _positions(hidden, position_ids))

    def normalise(self, theta: Theta, last_hidden: Hidden) -> Hidden:
        """Apply the final norm, [b, c, d] -> [b, c, d]."""
        norm = RMSNorm(self.config.norm_epsilon, jnp.dtype(self.config.param_dtype))
        normalised: Any = norm.apply({"params": theta["final_norm"]}, last_hidden)
        return normalised

    def unembedding(self, theta: Theta) -> jax.Array:
        """Return the output matrix, [d, v]."""
        return theta["embedding"].T if self.config.tied else theta["unembedding"]

    def readout(self, theta: Theta, last_hidden: Hidden) -> jax.Array:
        """Logits at the given positions, [b, c, d] -> [b, c, v], float32 or wider."""
        hidden = self.normalise(theta, last_hidden)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        kernel = self.unembedding(theta).astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=wide)

    def adaptable(self) -> Mapping[str, tuple[int, int, int]]:
        """Matrices that can carry fast weights: path -> (num_layers, in, out)."""
        c = self.config
        head = c.width // c.num_heads
        shapes = {
            "attention/q_proj": (c.width, c.num_heads * head),
            "attention/k_proj": (c.width, c.num_kv_heads * head),
            "attention/v_proj": (c.width, c.num_kv_heads * head),
            "attention/o_proj": (c.num_heads * head, c.width),
            "mlp/gate_proj": (c.width, c.hidden_features),
            "mlp/up_proj": (c.width, c.hidden_features),
            "mlp/down_proj": (c.hidden_features, c.width),
        }
        return {path: (c.num_layers, *shape) for path, shape in shapes.items()}


def _positions(hidden: jax.Array, position_ids: jax.Array | None) -> jax.Array:
    """The given position ids, or 0 .. l-1 for every row."""
    if position_ids is not None:
        return position_ids
    return jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
