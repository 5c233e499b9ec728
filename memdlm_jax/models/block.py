"""One layer of a transformer, and layers under one scan."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdlm_jax import partitioning
from memdlm_jax.models.attention import Attention, KeysAndValues, pick
from memdlm_jax.models.config import Run, TransformerConfig, runs_of
from memdlm_jax.models.layers import RMSNorm, SwiGLU
from memdlm_jax.models.moe import Mixture
from memdlm_jax.typing import Cache, Phi

Part = Literal["whole", "attention", "feed_forward"]


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward.

    Attributes:
        config: sizes and switches.
        mixture: whether the feed-forward block is a mixture of experts.
        keep: return keys and values too.
        part: a half of the layer alone, with what it adds to its input.
    """

    config: TransformerConfig
    mixture: bool
    keep: bool = False
    part: Part = "whole"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        position_ids: jax.Array,
        cached: KeysAndValues | None = None,
        at: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysAndValues | None]:
        """Map [b, l, d] to ([b, l, d], keys and values of x if they are to be kept).

        With ``at`` [b, c] only what stands at these positions is computed, [b, c, d].
        """
        own = None
        if self.part != "feed_forward":
            x, own = self._attention(x, mask, position_ids, cached, at)
        if self.part != "attention":
            x = self._feed_forward(x)
        return x, own if self.keep else None

    def _attention(self, x, mask, position_ids, cached, at) -> tuple[jax.Array, KeysAndValues]:
        c, inits = self.config, self._initialisers()
        norm = RMSNorm(c.norm_epsilon, inits[-1], name="attention_norm")
        attention = Attention(c.attention(), *inits, name="attention")
        mixed, own = attention(norm(x), mask, position_ids, cached, at)
        self.sow("intermediates", "sown_attention", mixed)
        return mixed + (x if at is None else pick(x, at)), own

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        c, inits = self.config, self._initialisers()
        parts = c.mixture() if self.mixture else None
        mlp: nn.Module
        if parts is None:
            mlp = SwiGLU(c.hidden_features, *inits, name="mlp")
        else:
            mlp = Mixture(parts, *inits, name="mlp")
        fed = mlp(RMSNorm(c.norm_epsilon, inits[-1], name="mlp_norm")(x))
        self.sow("intermediates", "sown_feed_forward", fed)
        x = partitioning.constrain(x + fed, "rows", "length", None)
        self.sow("intermediates", "sown_hidden", x)
        return x

    def _initialisers(self):
        """Of matrices, of those that write to the residual stream, and their dtype."""
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        output_init = nn.initializers.normal((2 * c.num_layers * c.width) ** -0.5)
        return init, output_init, jnp.dtype(c.param_dtype)


def _grouped_products(primitive, *_, **__) -> bool:
    return primitive.name == "grouped_matmul"


# Keeps the products with weights, not the scores of attention, which are far larger.
_SAVE_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _grouped_products
)


def block_of(config: TransformerConfig, first: int) -> type[nn.Module]:
    """Layers from number ``first`` on, recomputed in the backward pass as the config says."""
    kept = config.remat_layers is not None and first >= config.remat_layers
    if kept or config.remat == "none":
        return Block
    policy = _SAVE_PRODUCTS if config.remat == "dots" else None
    rematerialised: Any = nn.remat(Block, prevent_cse=False, policy=policy)
    return rematerialised


def stack_of(config: TransformerConfig, run: Run, length: int, first: int = 0) -> nn.Module:
    """``length`` blocks of a run, from layer number ``first`` on, under one scan.

    Compile time does not grow with depth.
    """
    return nn.scan(
        block_of(config, first),
        variable_axes={"params": 0, "fast": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        length=length,
    )(config, run.mixture)


def cached_layers(
    config: TransformerConfig, run: Run, stack: Any, fast: Phi, first: int, last: int, *inputs
) -> tuple[jax.Array, KeysAndValues]:
    """Layers ``first .. last - 1`` of a run beside a cache, without cutting them from their stack.

    ``stack_of`` on a part of a stack would first copy the part, as a loop takes arrays of its own;
    in decoding that is once a step. Here the loop runs over numbers of layers. (Not in training: a
    derivative would add to the whole stack at every layer.)

    Args:
        config: of the model.
        run: of which the layers are.
        stack: the parameters of all its layers.
        fast: fast weights of the layers, or ``None``.
        first: layer of the run to begin with.
        last: layer of the run to end before; one beyond the stack is its end.
        *inputs: x, mask, position ids and the layers' keys and values in the cache, or ``None``, as
            ``Block`` takes them; the last with a leading axis of layers.

    Returns:
        (what the last layer gives, keys and values of x in every layer).
    """
    x, mask, position_ids, cached = inputs
    last = min(last, jax.tree.leaves(stack)[0].shape[0])
    block = block_of(config, run.first + first)(config, run.mixture, True)

    def layer(x, one):
        number, fast, cached = one
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        variables = {"params": jax.tree.map(take, stack)}
        if fast is not None:
            variables["fast"] = fast
        return block.apply(variables, x, mask, position_ids, cached)

    return jax.lax.scan(layer, x, (jnp.arange(first, last), fast, cached))


def fast_weights_of(config: TransformerConfig, phi: Phi, split: int, start: int, stop: int) -> Phi:
    """Of fast weights of layers ``split`` and on, those of layers ``start .. stop - 1``."""

    def part(tree, run):
        first, end = max(split, run.first), run.first + run.length
        some = slice(max(start, first) - first, max(min(stop, end) - first, 0))
        return jax.tree.map(lambda leaf: leaf[some], tree)

    runs = runs_of(config)
    if phi is None or len(runs) == 1:
        return phi if phi is None else part(phi, runs[0])
    return {run.name: part(phi[run.name], run) for run in runs if run.name in phi}


@dataclasses.dataclass(frozen=True)
class Pass:
    """Which layers to run, and what to read and keep on the way.

    Attributes:
        start: first layer.
        stop: layer after the last.
        found: collects what the layers sow, by run; ``None`` for nothing.
        cache: keys and values to attend to beside those of the pass.
        own: collects the keys and values of the pass, by run; ``None`` for none.
    """

    start: int
    stop: int
    found: dict[str, Any] | None = None
    cache: Cache | None = None
    own: Cache | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer to run outside of a scan.

    Attributes:
        split: first layer with fast weights.
        number: of the layer.
        mask: who sees whom; unused by ``feed_forward``.
        positions: position ids; unused by ``feed_forward``.
        part: of the layer.
        at: [b, c] positions wanted; ``None`` for all.
    """

    split: int
    number: int
    mask: jax.Array | None = None
    positions: jax.Array | None = None
    part: Part = "whole"
    at: jax.Array | None = None
