"""Layers that every backbone shares: RMSNorm, a linear map that reads fast weights, SwiGLU."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


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


class Linear(nn.Module):
    """``y = x W`` plus, when the ``fast`` collection holds one for this layer, ``fast(x)``.

    The fast weight is any pytree that is callable on activations (see
    ``memdlm_jax.memory.fast_weights``), stored under the name ``delta``. Without the collection
    this is the plain linear map, to the bit.
    """

    features: int
    kernel_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[..., in]`` to ``[..., features]``."""
        kernel = self.param(
            "kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype
        )
        y = x @ kernel.astype(x.dtype)
        if self.has_variable("fast", "delta"):
            y = y + self.get_variable("fast", "delta")(x).astype(y.dtype)
        return y


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, the feed-forward block of every supported backbone."""

    hidden_features: int
    kernel_init: Initializer
    output_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[..., d]`` to ``[..., d]``."""

        def linear(name: str, features: int, init: Initializer) -> Linear:
            return Linear(features, init, self.param_dtype, name=name)

        gate = linear("gate_proj", self.hidden_features, self.kernel_init)(x)
        up = linear("up_proj", self.hidden_features, self.kernel_init)(x)
        return linear("down_proj", x.shape[-1], self.output_init)(nn.silu(gate) * up)
