"""Layers that every backbone shares: RMSNorm, linear maps that read fast weights, SwiGLU."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdlm_jax.models.grouped import Implementation, grouped_matmul

Initializer = Callable[..., jax.Array]

Multiply = Callable[[jax.Array, jax.Array], jax.Array]
"""A product of activations [..., in] and a matrix [..., in, out]."""


def apply_matrix(matrix: Any, x: jax.Array, multiply: Multiply) -> jax.Array:
    """``multiply(x, W)`` for an array W, or what stands in its place in theta.

    A stand-in (a quantised matrix, a matrix with an adapter) is called with ``x`` and ``multiply``
    and decides itself which products to take.
    """
    return matrix(x, multiply) if callable(matrix) else multiply(x, matrix)


def _in_dtype_of_activations(product: Multiply) -> Multiply:
    return lambda x, w: product(x, w.astype(x.dtype))


def _in_wider_dtype(product: Multiply) -> Multiply:
    def multiply(x, w):
        wide = jnp.promote_types(x.dtype, w.dtype)
        return product(x.astype(wide), w.astype(wide))

    return multiply


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32 or wider, weight applied after the cast back.

    The order matters in bfloat16: published LLaDA, LLaDA2 and Dream code multiplies by the weight
    in the activation dtype.
    """

    epsilon: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; same shape and dtype as ``x``."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class _Matrix(nn.Module):
    """What linear maps share: the kernel or its stand-in, and the fast weight on top."""

    features: int
    kernel_init: Initializer
    param_dtype: jnp.dtype

    def _kernel(self, shape: tuple[int, ...]) -> Any:
        # Flax would compare the leaves of a stand-in with the shape of a plain kernel.
        if self.has_variable("params", "kernel"):
            return self.get_variable("params", "kernel")
        return self.param("kernel", self.kernel_init, shape, self.param_dtype)

    def _product(self, x: jax.Array, shape: tuple[int, ...], product: Multiply) -> jax.Array:
        kernel: Any = self._kernel(shape)
        delta: Any = None
        if self.has_variable("fast", "delta"):
            delta = self.get_variable("fast", "delta")
        y = apply_matrix(kernel, x, _in_dtype_of_activations(product))
        if delta is not None:
            y = y + delta(x, _in_wider_dtype(product)).astype(y.dtype)
        return y


class Linear(_Matrix):
    """``y = x W (+ b)`` plus, when the ``fast`` collection holds one for this layer, ``fast(x)``.

    The fast weight is any pytree that is callable on activations and a product (see
    ``memdlm_jax.memory.fast_weights``), stored under the name ``delta``. Without the collection
    this is the plain linear map, to the bit.
    """

    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[..., in]`` to ``[..., features]``."""
        y = self._product(x, (x.shape[-1], self.features), jnp.matmul)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(y.dtype)
        return y


class ExpertLinear(_Matrix):
    """One matrix per expert, and fast weights on each: ``y[t] = x[t] W[index[t]]``."""

    num_experts: int = 1
    dispatch: Implementation = "ragged"
    strays: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Map [t, in] to [t, features]; ``index`` [t] int32 names each row's expert, ascending.

        With ``strays`` rows may have an index beyond the experts: they come out as zeros.
        """
        product = functools.partial(
            grouped_matmul, index=index, is_sorted=True, strays=self.strays,
            implementation=self.dispatch,
        )  # fmt: skip
        return self._product(x, (self.num_experts, x.shape[-1], self.features), product)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, the feed-forward block of every supported backbone.

    With ``num_experts`` every row goes through the matrices of its own expert.
    """

    hidden_features: int
    kernel_init: Initializer
    output_init: Initializer
    param_dtype: jnp.dtype
    num_experts: int = 0
    dispatch: Implementation = "ragged"
    strays: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *index: jax.Array) -> jax.Array:
        """Map ``[..., d]`` to ``[..., d]``; experts take x [t, d] and ascending ``index`` [t]."""

        def linear(name: str, features: int, init: Initializer) -> nn.Module:
            sizes = features, init, self.param_dtype
            if self.num_experts:
                return ExpertLinear(*sizes, self.num_experts, self.dispatch, self.strays, name=name)
            return Linear(*sizes, name=name)

        gate = linear("gate_proj", self.hidden_features, self.kernel_init)(x, *index)
        up = linear("up_proj", self.hidden_features, self.kernel_init)(x, *index)
        down = linear("down_proj", x.shape[-1], self.output_init)
        return down(nn.silu(gate) * up, *index)
