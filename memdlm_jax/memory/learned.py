"""A learned inner loop: learning rates and phi_0 trained by the outer gradient.

Beyond the paper: per-matrix rates as in Meta-SGD (arXiv 1707.09835), the start as in MAML (arXiv
1703.03400). Off unless ``MemoryConfig.learned`` names a part. With ``first_order`` the inner
gradients are constants: a rate then gets -<outer gradient, clipped inner gradient>, the start the
outer gradient at phi_K.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.fast_weights import Dense, LowRank
from memdlm_jax.typing import Denoiser, Key, Phi, Theta


@flax.struct.dataclass
class InnerParameters:
    """What of the inner loop is trained along with theta.

    Attributes:
        log_rates: phi's structure with a leaf [layers] for every matrix: the logarithm of its
            inner learning rate in each adapted layer; ``None`` keeps ``learning_rate``.
        start: path -> [layers, in, rank], A of phi_0 (B stays zero, so that phi_0 leaves the
            model unchanged), or [layers, in, out] for dense fast weights; ``None`` draws phi_0.
    """

    log_rates: Phi = None
    start: dict[str, jax.Array] | None = None


@flax.struct.dataclass
class WithInner:
    """All that the outer gradient trains when the inner loop is learned."""

    theta: Theta
    inner: InnerParameters


def init(key: Key, denoiser: Denoiser, config: MemoryConfig) -> InnerParameters | None:
    """Start at the fixed inner loop: rates at ``learning_rate``, one draw of phi_0; float32.

    ``None`` if nothing of the inner loop is learned.
    """
    if not config.learned:
        return None
    phi = jax.tree.map(lambda leaf: leaf[0], fast_weights.init(key, denoiser, config, groups=1))
    log_rates, start = None, None
    if "rates" in config.learned:
        rate = math.log(config.learning_rate)
        log_rates = jax.tree.map(lambda leaf: jnp.full(leaf.shape[:1], rate, leaf.dtype), phi)
    if "start" in config.learned:
        start = {name: _starting_matrix(delta) for name, delta in _named(phi).items()}
    return InnerParameters(log_rates, start)


def join(theta: Theta, inner: InnerParameters | None) -> Any:
    """The parameters to train: theta alone unless the inner loop is learned."""
    return theta if inner is None else WithInner(theta, inner)


def split(parameters: Any) -> tuple[Theta, InnerParameters | None]:
    """Inverse of ``join``."""
    if isinstance(parameters, WithInner):
        return parameters.theta, parameters.inner
    return parameters, None


def started(inner: InnerParameters | None, phi: Phi) -> Phi:
    """Phi_0 with the learned start in every group, or as it was drawn."""
    if inner is None or inner.start is None:
        return phi
    found = inner.start

    def replace(path, delta):
        leaf = jnp.broadcast_to(found[_path(path)], _starting_matrix(delta).shape)
        return delta.replace(A=leaf) if isinstance(delta, LowRank) else delta.replace(W=leaf)

    return jax.tree_util.tree_map_with_path(replace, phi, is_leaf=fast_weights.is_fast_weight)


def rates(inner: InnerParameters | None) -> Phi:
    """Phi's structure with learning rates [layers], or ``None`` if they are not learned."""
    if inner is None or inner.log_rates is None:
        return None
    return jax.tree.map(jnp.exp, inner.log_rates)


def _starting_matrix(delta: LowRank | Dense) -> jax.Array:
    return delta.A if isinstance(delta, LowRank) else delta.W


def _named(phi: Phi) -> dict[str, LowRank | Dense]:
    leaves = jax.tree_util.tree_flatten_with_path(phi, is_leaf=fast_weights.is_fast_weight)[0]
    return {_path(path): delta for path, delta in leaves}


def _path(path) -> str:
    """``mlp/gate_proj`` of the leaf at ``mlp/gate_proj/delta``."""
    return jax.tree_util.keystr(path[:-1], simple=True, separator="/")
