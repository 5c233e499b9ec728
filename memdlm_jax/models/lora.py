"""Outer low-rank adapters: what is trained over a frozen, possibly quantised base.

An adapted matrix stands in theta where its kernel stood, so the denoiser's functions, the inner
loop and the meta-gradient take an adapted theta like any other. Not to be confused with fast
weights, which live in phi and are written by the inner loop (Hu et al., arXiv 2106.09685).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from memdlm_jax.models.layers import Multiply, apply_matrix
from memdlm_jax.models.quantize import Quantized, dequantize
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.typing import Key, Theta

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Settings of outer adapters; the defaults are the public training script's (paper, section 5).

    Attributes:
        rank: r.
        alpha: the adapter is scaled by alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        dropout: in [0, 1); share of an adapter's inputs dropped in training. A matrix draws once
            per optimiser step: passes over inputs of one shape drop the same ones, and so do, in
            the layers with fast weights, memories of one batch.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        target_modules: matrices to adapt: paths in a layer, modules above them, or parts of such
            paths (``("q_proj", "v_proj")``, ``("mlp/experts",)``); ``("all-linear",)`` is every
            linear layer but the unembedding, as PEFT has it.
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    use_rslora: bool = False
    target_modules: tuple[str, ...] = (ALL_LINEAR,)

    def __post_init__(self):
        self._require("rank", self.rank >= 1, "at least 1")
        self._require("alpha", 0 < self.alpha < math.inf, "positive and finite")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._require("target_modules", bool(self.target_modules), "non-empty")

    @property
    def scale(self) -> float:
        """Factor on an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def _require(self, field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ValueError(f"lora.{field}={getattr(self, field)!r} must be {right}")


@flax.struct.dataclass
class Adapted:
    """A frozen matrix with a trainable one of low rank on top: ``x W + scale (x A) B``.

    Attributes:
        base: W [..., in, out], an array or a ``Quantized``.
        A: [..., in, rank], float32.
        B: [..., rank, out], float32.
        key: PRNG key of the dropout, with the leading axis of the stack; ``None`` for none.
        scale: factor on the adapter.
        dropout: share of the adapter's inputs to drop where there is a key.
    """

    base: Any
    A: jax.Array
    B: jax.Array
    key: Key | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: jax.Array, multiply: Multiply) -> jax.Array:
        """Map [..., in] to [..., out]; ``multiply(x, matrix)`` takes the products."""
        y = apply_matrix(self.base, x, multiply)
        inputs = x.astype(jnp.promote_types(x.dtype, self.A.dtype))
        if self.key is not None:
            keep = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            inputs = jnp.where(keep, inputs / (1 - self.dropout), 0)
        low = multiply(multiply(inputs, self.A), self.B) * self.scale
        return y + low.astype(y.dtype)


def kernels(theta: Theta) -> dict[str, Any]:
    """Slash-separated path in theta -> matrix of every linear map in the layers."""
    flat: Mapping[str, Any] = flax.traverse_util.flatten_dict(theta, sep="/")
    return {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}


def targets(denoiser: Transformer, theta: Theta, config: LoraConfig) -> list[str]:
    """Paths of the kernels that a config adapts, sorted.

    Raises:
        ValueError: a target module has no kernel in this model, or names a router that is no
            linear layer in the published model and cannot be adapted there.
    """
    known = sorted(kernels(theta))
    linear = [p for p in known if denoiser.config.router_is_linear or "/router/" not in p]
    found = set()
    for module in config.target_modules:
        here = set(linear) if module == ALL_LINEAR else set(_below(module, linear))
        if not here:
            hint = ": its router is no linear layer" if _below(module, known) else ""
            raise ValueError(
                f"lora.target_modules has {module!r}, which no matrix of this model is called"
                f"{hint}; it has {[path.removesuffix('/kernel') for path in linear]}"
            )
        found |= here
    return sorted(found)


def _below(module: str, paths: list[str]) -> list[str]:
    return [path for path in paths if f"/{module}/" in f"/{path.removesuffix('/kernel')}/"]


def add(key: Key, denoiser: Transformer, theta: Theta, config: LoraConfig) -> Theta:
    """Put fresh adapters on a theta; they leave the model unchanged.

    Args:
        key: PRNG key.
        denoiser: whose theta it is.
        theta: base parameters, their kernels arrays or ``Quantized``.
        config: rank, scale and targets.

    Returns:
        Theta with an ``Adapted`` in the place of every target. A is uniform in +-1/sqrt(in), B
        zero, as PEFT starts them.

    Raises:
        ValueError: see ``targets``; or a kernel carries an adapter already.
    """
    flat = dict(flax.traverse_util.flatten_dict(theta, sep="/"))
    paths = targets(denoiser, theta, config)
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        if isinstance(flat[path], Adapted):
            raise ValueError(f"theta/{path} carries an adapter already: merge it first")
        flat[path] = _fresh(path_key, flat[path], config)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _fresh(key: Key, base: Any, config: LoraConfig) -> Adapted:
    *stack, rows, columns = base.shape
    bound = rows**-0.5
    a = jax.random.uniform(key, (*stack, rows, config.rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*stack, config.rank, columns), jnp.float32)
    return Adapted(base, a, b, scale=config.scale, dropout=config.dropout)


def is_adapter(path: str) -> bool:
    """Tell the leaves of adapters by their slash-separated path in theta: what is trained."""
    return path.endswith(("/kernel/A", "/kernel/B"))


def _map_adapted(function, theta: Theta) -> Theta:
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, Adapted) else leaf,
        theta,
        is_leaf=lambda leaf: isinstance(leaf, Adapted),
    )


def with_dropout(theta: Theta, key: Key) -> Theta:
    """Let every adapter drop its inputs, each matrix of each layer on its own.

    Args:
        theta: with adapters that have a ``dropout``; others are left as they are. The frozen part
            of a ``Partitioned`` will do.
        key: PRNG key.
    """
    paths = [path for path, leaf in kernels(theta).items() if isinstance(leaf, Adapted)]
    keys = iter(jax.random.split(key, max(len(paths), 1)))

    def one(adapted: Adapted) -> Adapted:
        own = next(keys)
        if not adapted.dropout:
            return adapted
        return dataclasses.replace(adapted, key=jax.random.split(own, adapted.base.shape[0]))

    return _map_adapted(one, theta)


def set_dropout(theta: Theta, rate: float) -> Theta:
    """Theta whose adapters all drop their inputs at this rate in training."""
    return _map_adapted(lambda adapted: dataclasses.replace(adapted, dropout=rate), theta)


def merge(theta: Theta) -> Theta:
    """Add every adapter to its base, dequantised: a theta of arrays, in the base's own dtype.

    A quantised base comes back in float32.
    """

    def one(adapted: Adapted) -> jax.Array:
        base = adapted.base
        if isinstance(base, Quantized):
            base = dequantize(base, jnp.float32)
        delta = jnp.matmul(adapted.A, adapted.B, precision="highest") * adapted.scale
        return (base.astype(jnp.promote_types(base.dtype, delta.dtype)) + delta).astype(base.dtype)

    def plain(leaf):
        return dequantize(leaf, jnp.float32) if isinstance(leaf, Quantized) else leaf

    merged = _map_adapted(one, theta)
    return jax.tree.map(plain, merged, is_leaf=lambda leaf: isinstance(leaf, Quantized))
