"""Mixture-of-experts feed-forward blocks: routers, and dispatch without computing all experts."""

import dataclasses
import functools
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdlm_jax import partitioning
from memdlm_jax.models import expert_parallel
from memdlm_jax.models.grouped import Implementation
from memdlm_jax.models.layers import Initializer, Linear, SwiGLU


@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """What a mixture-of-experts block is made of.

    Attributes:
        num_experts: experts; ``groups`` must divide it.
        experts_per_token: experts that each token goes through.
        features: inner size of an expert.
        shared_features: inner size of the expert that every token goes through; 0 for none.
        score: ``softmax`` over all experts in float32, from logits in the activations' dtype, or
            ``sigmoid`` of float32 logits.
        use_selection_bias: a bias per expert is added to the scores to choose, not to weigh.
        groups: consecutive experts form this many groups.
        kept_groups: groups from which a token may choose; a group counts the sum of its two
            best scores.
        renormalise: divide the chosen weights by their sum.
        scale: factor on the weights.
        dispatch: ``ragged`` multiplies each row by its own expert's matrix only; ``dense``
            computes all experts for all rows (the oracle of tests).
    """

    num_experts: int
    experts_per_token: int
    features: int
    shared_features: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    use_selection_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    renormalise: bool = False
    scale: float = 1.0
    dispatch: Implementation = "ragged"

    def __post_init__(self):
        for field in ("num_experts", "features"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        in_group = self.num_experts // max(self.groups, 1)
        self._require("groups", self.groups >= 1 and self.num_experts % self.groups == 0)
        self._require("kept_groups", 1 <= self.kept_groups <= self.groups)
        self._require("experts_per_token", self.experts_per_token >= 1)
        self._require("experts_per_token", self.experts_per_token <= self.kept_groups * in_group)

    def _require(self, field: str, ok: bool) -> None:
        if not ok:
            raise ValueError(
                f"{field}={getattr(self, field)} does not fit num_experts={self.num_experts}, "
                f"groups={self.groups}, kept_groups={self.kept_groups}"
            )


def choose(spec: MixtureSpec, logits: jax.Array, bias: jax.Array | None = None):
    """The experts of each token, and their weights.

    Args:
        spec: how to score and choose.
        logits: [t, num_experts].
        bias: [num_experts], added to the scores for choosing only.

    Returns:
        (index [t, k] int32, best first; weights [t, k], float32 or wider). Weights carry
        derivatives, the choice does not.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    softmax = spec.score == "softmax"
    scores = jax.nn.softmax(wide, axis=-1) if softmax else jax.nn.sigmoid(wide)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if spec.groups > 1:
        ranked = _within_best_groups(spec, ranked)
    _, index = jax.lax.top_k(ranked, spec.experts_per_token)
    weights = jnp.take_along_axis(scores, index, axis=-1)
    if spec.renormalise and spec.experts_per_token > 1:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return index, weights * spec.scale


def _within_best_groups(spec: MixtureSpec, ranked: jax.Array) -> jax.Array:
    """Scores [t, num_experts] with -inf outside each token's best groups."""
    grouped = ranked.reshape(*ranked.shape[:-1], spec.groups, -1)
    best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(jnp.sum(best_two, axis=-1), spec.kept_groups)
    stays = jnp.any(jax.nn.one_hot(kept, spec.groups, dtype=bool), axis=-2)
    return jnp.where(stays[..., None], grouped, -jnp.inf).reshape(ranked.shape)


class Router(nn.Module):
    """Chooses experts for tokens [t, d]; see ``choose``."""

    spec: MixtureSpec
    kernel_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (index [t, k], weights [t, k])."""
        s = self.spec
        if s.score == "sigmoid":
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Accelerators would take float32 products in fewer bits; which expert a token goes to
        # hangs on small differences.
        with jax.default_matmul_precision("highest"):
            logits = Linear(s.num_experts, self.kernel_init, self.param_dtype, name="gate")(x)
        bias = None
        if s.use_selection_bias:
            zeros, shape = nn.initializers.zeros, (s.num_experts,)
            bias = self.param("selection_bias", zeros, shape, self.param_dtype)
        index, weights = choose(s, logits, bias)
        self.sow("intermediates", "router_logits", logits)
        self.sow("intermediates", "router_index", index)
        self.sow("intermediates", "router_weights", weights)
        return index, weights


class Mixture(nn.Module):
    """Sum of each token's experts by their weights, plus the shared expert."""

    spec: MixtureSpec
    kernel_init: Initializer
    output_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b, l, d] to [b, l, d]; on a mesh by ``expert_parallel``."""
        mesh = partitioning.mesh_in_context()
        if mesh is not None and not self.is_initializing():
            return self._on_mesh(mesh, x)
        s, tokens = self.spec, x.reshape(-1, x.shape[-1])
        inits = self.kernel_init, self.output_init, self.param_dtype
        index, weights = Router(s, self.kernel_init, self.param_dtype, name="router")(tokens)
        experts = SwiGLU(s.features, *inits, s.num_experts, s.dispatch, name="experts")
        y = _dispatch(experts, tokens, index, weights).astype(tokens.dtype)
        if s.shared_features:
            y = y + SwiGLU(s.shared_features, *inits, name="shared_experts")(tokens)
        return y.reshape(x.shape)

    def _on_mesh(self, mesh, x: jax.Array) -> jax.Array:
        s = self.spec
        inits = self.kernel_init, self.output_init, self.param_dtype
        parts = {
            name: {kind: tree[name] for kind, tree in self.variables.items() if name in tree}
            for name in ("router", "experts")
        }

        def some(x: jax.Array, parts, first: jax.Array, count: int) -> jax.Array:
            """What ``count`` experts from ``first`` on add to tokens [t, d], in float32."""
            router = Router(s, self.kernel_init, self.param_dtype, parent=None)
            index, weights = cast(Any, router.apply(parts["router"], x))
            here = (index >= first) & (index < first + count)
            experts = SwiGLU(s.features, *inits, count, s.dispatch, strays=True, parent=None)
            run = functools.partial(experts.apply, parts["experts"])
            return _dispatch(run, x, jnp.where(here, index - first, count), weights)

        y = expert_parallel.sum_over_experts(mesh, some, x, parts, s.num_experts)
        if s.shared_features:
            y = y + SwiGLU(s.shared_features, *inits, name="shared_experts")(x)
        return y


def _dispatch(experts, tokens: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
    """Send tokens [t, d] through their experts; the weighted sum is in float32 or wider."""
    count, chosen = index.shape
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rows = experts(tokens[order // chosen], flat[order])
    back = jnp.argsort(order)
    rows = rows[back].reshape(count, chosen, -1).astype(weights.dtype)
    return jnp.einsum("tk,tkd->td", weights, rows)
