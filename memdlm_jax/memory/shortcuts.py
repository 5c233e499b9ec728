"""Fast weights in forms that take fewer products, for the inner loop and the outer loss alone."""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.fast_weights import Dense, LowRank, Multiply
from memdlm_jax.typing import Phi


@flax.struct.dataclass
class Fused:
    """A fast weight that is added to its base matrix before the product, where that saves work.

    Two low-rank products of t rows take 2 t r (in + out) operations, their sum 2 r in out.
    """

    delta: LowRank | Dense

    def __call__(self, x: jax.Array, multiply: Multiply = jnp.matmul) -> jax.Array:
        """The fast weight by itself, beside a base that is no plain matrix."""
        return self.delta(x, multiply)

    def added_to(self, kernel: jax.Array, rows: int) -> jax.Array | None:
        """Base and fast weight [..., in, out] in one, or ``None`` if that takes more operations.

        Args:
            kernel: [..., in, out], of experts for instance.
            rows: inputs that will be multiplied, of all experts together.
        """
        *stack, inputs, outputs = kernel.shape
        if isinstance(self.delta, Dense):
            return kernel + self.delta.W
        if rows * (inputs + outputs) <= math.prod(stack) * inputs * outputs:
            return None
        return kernel + self.delta.A @ self.delta.B * self.delta.scale


def fused(phi: Phi) -> Phi:
    """Let the fast weights of a group be added to the base, see ``Fused``."""
    return jax.tree.map(Fused, phi, is_leaf=fast_weights.is_fast_weight)


@flax.struct.dataclass
class Fresh:
    """A LoRA fast weight with B = 0, for a first derivative in it and in nothing before it.

    It changes nothing, and the gradient in A is zero: all that is left to compute is the one in B.
    """

    delta: LowRank

    def __call__(self, x: jax.Array, multiply: Multiply = jnp.matmul) -> jax.Array:
        """Zeros, [..., in] to [..., out]."""
        return _unmoved(multiply, x, self.delta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unmoved(multiply: Multiply, x: jax.Array, delta: LowRank) -> jax.Array:
    shape = jax.eval_shape(lambda: delta(x, multiply))
    # Never taken, but mapped over whatever the derivative is mapped over: ``vmap`` of a scan over
    # layers, or of one that is rematerialised, wants zeros and derivative to agree in that.
    entry = sum(leaf.reshape(-1)[0].astype(shape.dtype) for leaf in (x, delta.A, delta.B))
    return jnp.where(True, jnp.zeros(shape.shape, shape.dtype), entry)


@_unmoved.defjvp
def _(multiply, primals, tangents):
    (x, delta), (_, moved) = primals, tangents
    return _unmoved(multiply, x, delta), LowRank(delta.A, moved.B, delta.scale)(x, multiply)


def fresh(phi: Phi) -> Phi:
    """Phi_0 as ``init`` made it, for its first derivative; see ``Fresh``.

    Matrices of experts stay as they are, and so does what is not LoRA.
    """

    def one(delta):
        # The product of experts is a function of their indices, which may be traced.
        return Fresh(delta) if isinstance(delta, LowRank) and delta.A.ndim == 4 else delta

    return jax.tree.map(one, phi, is_leaf=fast_weights.is_fast_weight)


def unwrapped(phi: Phi) -> Phi:
    """The inverse of ``fresh``, for what has its structure."""

    def is_known(node):
        return isinstance(node, Fresh) or fast_weights.is_fast_weight(node)

    return jax.tree.map(lambda d: d.delta if isinstance(d, Fresh) else d, phi, is_leaf=is_known)
