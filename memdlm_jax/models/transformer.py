"""The pre-norm transformer that all backbones are instances of, as pure functions of theta."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdlm_jax import partitioning
from memdlm_jax.models import inspection
from memdlm_jax.models.attention import pick, sees_block
from memdlm_jax.models.block import (
    Layer,
    Part,
    Pass,
    block_of,
    cached_layers,
    fast_weights_of,
    stack_of,
)
from memdlm_jax.models.config import TransformerConfig, matrices, runs_of
from memdlm_jax.models.layers import RMSNorm
from memdlm_jax.parameters import merged
from memdlm_jax.typing import EVERYTHING, Cache, Context, Hidden, Key, Phi, Theta, Tokens


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A backbone as pure functions of theta; answers the ``Denoiser`` protocol.

    Theta is ``{"embedding": [v, d], "layers": stacked, "final_norm": ..., "unembedding": [d, v]}``
    (no ``unembedding`` when tied); every leaf of ``layers`` has a leading axis of ``num_layers``.
    Layers of two kinds stand in several stacks, see ``runs_of``. Fast weights mirror ``layers``
    for the head's layers only, or hold one such tree under the name of each stack.
    """

    config: TransformerConfig

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return self.config.num_layers

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token.

        Raises:
            ValueError: it is not known.
        """
        if self.config.mask_token_id is None:
            raise ValueError(
                "mask_token_id=None: the model's config names no mask token, and no tokenizer "
                "beside it did; give mask_token_id"
            )
        return self.config.mask_token_id

    @property
    def vocab_chunk(self) -> int:
        """Tokens of the vocabulary that the loss takes at a time; 0 for all."""
        return self.config.vocab_chunk

    def with_config(self, **changes: Any) -> Self:
        """Return this model with some fields of its config changed."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def init(self, key: Key) -> Theta:
        """Draw fresh parameters: normal, standard deviation 1/sqrt(d), depth-scaled outputs."""
        c = self.config
        dtype, runs = jnp.dtype(c.param_dtype), runs_of(c)
        embed_key, layer_key, out_key = jax.random.split(key, 3)
        keys = jax.random.split(layer_key, len(runs)) if len(runs) > 1 else [layer_key]
        x, positions = jnp.zeros((1, 2, c.width), jnp.dtype(c.dtype)), jnp.arange(2)[None]
        normal = nn.initializers.normal(c.width**-0.5)
        theta: dict[str, Any] = {"embedding": normal(embed_key, (c.vocab_size, c.width), dtype)}
        for run, run_key in zip(runs, keys, strict=True):
            stack = stack_of(c, run, run.length)
            theta[run.name] = stack.init({"params": run_key}, x, None, positions, None)["params"]
        theta["final_norm"] = {"scale": jnp.ones((c.width,), dtype)}
        if not c.tied:
            theta["unembedding"] = normal(out_key, (c.width, c.vocab_size), dtype)
        return theta

    def trunk(
        self, theta: Theta, tokens: Tokens, context: Context = EVERYTHING, *, split: int
    ) -> Hidden:
        """Embed ``tokens`` and run layers ``0 .. split - 1``; [b, l] int32 -> [b, l, d]."""
        return self._trunk(theta, tokens, context, Pass(0, split))

    def trunk_with_cache(
        self,
        theta: Theta,
        tokens: Tokens,
        context: Context = EVERYTHING,
        cache: Cache | None = None,
        *,
        split: int,
    ) -> tuple[Hidden, Cache]:
        """``trunk`` over part of a row; see ``EfficientDenoiser``."""
        own: Cache = {}
        hidden = self._trunk(theta, tokens, context, Pass(0, split, cache=cache, own=own))
        return hidden, own

    def head(
        self, theta: Theta, phi: Phi, hidden: Hidden, context: Context = EVERYTHING, *, split: int
    ) -> Hidden:
        """Run layers ``split .. num_layers - 1`` with fast weights ``phi`` (or ``None``)."""
        return self._head(theta, phi, hidden, context, Pass(split, self.num_layers))

    def head_with_cache(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        context: Context = EVERYTHING,
        cache: Cache | None = None,
        *,
        split: int,
    ) -> tuple[Hidden, Cache]:
        """``head`` over part of a row; see ``EfficientDenoiser``."""
        own: Cache = {}
        some = Pass(split, self.num_layers, cache=cache, own=own)
        return self._head(theta, phi, hidden, context, some), own

    def head_at(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        at: jax.Array,
        context: Context = EVERYTHING,
        *,
        split: int,
        entered: bool = False,
    ) -> Hidden:
        """``head`` at positions ``at`` [b, c] alone, [b, c, d]: nothing else reads the last layer.

        Of the last layer only keys and values are computed everywhere. The first one is outside of
        the scan: in a scan's body, a gradient in phi alone would go on to what the layer reads.

        With ``entered``, ``hidden`` is what ``enter`` returned.
        """
        if split == self.num_layers:  # The trunk has put its results in their places.
            return pick(hidden, at)
        part: Part = "feed_forward" if entered else "whole"
        n, theta = self.num_layers, merged(theta)
        if entered and split == n - 1:
            return self._layer(theta, phi, hidden, Layer(split, split, part=part))
        at = self._read_at(at)
        placed = self._placed(hidden, context)
        if split < n - 1:
            hidden = self._layer(theta, phi, hidden, Layer(split, split, *placed, part=part))
            between = fast_weights_of(self.config, phi, split, split + 1, n - 1)
            hidden = self.layers(theta, between, hidden, context, Pass(split + 1, n - 1))
        return self._layer(theta, phi, hidden, Layer(split, n - 1, *placed, at=at))

    def can_enter(self, paths: Collection[str]) -> bool:
        """Whether none of these matrices belongs to an attention block."""
        return not any("attention" in path.split("/") for path in paths)

    def enter(
        self,
        theta: Theta,
        hidden: Hidden,
        at: jax.Array,
        context: Context = EVERYTHING,
        *,
        split: int,
    ) -> Hidden:
        """Run the attention block of layer ``split``; of the last layer only ``at`` [b, c]."""
        some = self._read_at(at) if split == self.num_layers - 1 else None
        placed = self._placed(hidden, context)
        layer = Layer(split, split, *placed, part="attention", at=some)
        return self._layer(merged(theta), None, hidden, layer)

    def _read_at(self, at: jax.Array) -> jax.Array:
        """Where the last layer holds what predicts the tokens at ``at``."""
        return jnp.maximum(at - 1, 0) if self.config.right_shift else at

    def _placed(self, hidden: Hidden, context: Context) -> tuple[jax.Array | None, jax.Array]:
        """(who sees whom, position ids) of a whole row."""
        positions = _positions(hidden, context)
        return self._mask(context, positions, None), positions

    def _layer(self, theta: Theta, phi: Phi, hidden: Hidden, layer: Layer) -> Hidden:
        """One layer, or a half of it, outside of any scan."""
        number = layer.number
        run = next(r for r in runs_of(self.config) if number < r.first + r.length)
        index = number - run.first
        variables = {"params": jax.tree.map(lambda leaf: leaf[index], theta[run.name])}
        fast = fast_weights_of(self.config, phi, layer.split, number, number + 1)
        if fast is not None and len(runs_of(self.config)) > 1:
            fast = fast.get(run.name)
        if fast is not None:
            variables["fast"] = jax.tree.map(lambda leaf: leaf[0], fast)
        block = block_of(self.config, number)(self.config, run.mixture, part=layer.part)
        return block.apply(variables, hidden, layer.mask, layer.positions, None, layer.at)[0]

    @property
    def lookback(self) -> int:
        """Columns before a window whose hidden states its predictions are read from."""
        return int(self.config.right_shift)

    def normalise(self, theta: Theta, last_hidden: Hidden) -> Hidden:
        """Apply the final norm, [b, c, d] -> [b, c, d]."""
        norm = RMSNorm(self.config.norm_epsilon, jnp.dtype(self.config.param_dtype))
        normalised: Any = norm.apply({"params": merged(theta)["final_norm"]}, last_hidden)
        return normalised

    def unembedding(self, theta: Theta) -> jax.Array:
        """Return the output matrix, [d, v]."""
        theta = merged(theta)
        return theta["embedding"].T if self.config.tied else theta["unembedding"]

    def readout(self, theta: Theta, last_hidden: Hidden) -> jax.Array:
        """Logits at the given positions, [b, c, d] -> [b, c, v], float32 or wider."""
        hidden = self.normalise(theta, last_hidden)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        kernel = self.unembedding(theta).astype(hidden.dtype)
        logits = jnp.matmul(hidden, kernel, preferred_element_type=wide)
        return partitioning.constrain(logits, "rows", None, "vocab")

    def adaptable(self, split: int = 0) -> Mapping[str, tuple[int, ...]]:
        """Matrices of the head that can carry fast weights: path -> (layers, ..., in, out).

        Experts have an axis of their own before ``in``. Routers are left out, as the public code
        does. Where layers are of two kinds, a path begins with the name of the stack.
        """
        runs = runs_of(self.config)
        shapes = {}
        for run in runs:
            layers = run.first + run.length - max(split, run.first)
            prefix = f"{run.name}/" if len(runs) > 1 else ""
            if layers > 0:
                for path, shape in matrices(self.config, run.mixture):
                    shapes[prefix + path] = (layers, *shape)
        return shapes

    def inspect(
        self,
        theta: Theta,
        tokens: Tokens,
        context: Context = EVERYTHING,
        phi: Phi = None,
        *,
        split: int = 0,
        heads: bool = False,
    ) -> dict[str, Any]:
        """What every layer computes on the way, for comparing implementations and for looking in.

        Arguments are those of ``trunk`` and ``head``; fast weights are in layers ``split`` and on.

        Returns:
            ``hidden``: [n + 1, b, l, d], embeddings and every layer's output; ``attention`` and
            ``feed_forward``: [n, b, l, d], what is added to the residual stream; ``router``:
            layer -> {``logits`` [b, l, e], ``index`` [b, l, k], ``weights`` [b, l, k]} of the
            layers that have one. With ``heads`` also ``query`` [n, b, l, heads, head_dim], ``key``
            and ``value`` [n, b, l, kv_heads, head_dim], positions applied, and ``mask``, who saw
            whom: ``attention.attention_weights`` takes them.
        """
        plain = self.with_config(remat="none")
        return inspection.inspect(plain, theta, tokens, context, phi, split=split, heads=heads)

    def _trunk(self, theta: Theta, tokens: Tokens, context: Context, some: Pass) -> Hidden:
        theta = merged(theta)
        # Rows are divided along the axis that divides the table's width: one of them has to move.
        table = partitioning.constrain(theta["embedding"], "vocab", None)
        hidden = table[tokens].astype(self.config.dtype)
        hidden = partitioning.constrain(hidden, "rows", "length", None)
        hidden = self.layers(theta, None, hidden, context, some)
        # A model without a head layer ends here.
        return self._finish(hidden) if some.stop == self.num_layers else hidden

    def _head(self, theta: Theta, phi: Phi, hidden, context: Context, some: Pass) -> Hidden:
        if some.start == self.num_layers:
            return hidden
        return self._finish(self.layers(merged(theta), phi, hidden, context, some))

    def layers(
        self, theta: Theta, phi: Phi, hidden: Hidden, context: Context, some: Pass
    ) -> Hidden:
        """Run some layers, with the fast weights of these layers or ``None``."""
        start, stop, cache, own = some.start, some.stop, some.cache, some.own
        cut = self.config.remat_layers
        if cut is not None and start < cut < stop and some.found is None and own is None:
            for part in ((start, cut), (cut, stop)):
                fast = fast_weights_of(self.config, phi, start, *part)
                hidden = self.layers(theta, fast, hidden, context, Pass(*part))
            return hidden
        runs = runs_of(self.config)
        positions = _positions(hidden, context)
        mask = self._mask(context, positions, cache)
        for run in runs:
            first, last = max(start - run.first, 0), min(stop - run.first, run.length)
            if first >= last:
                continue
            fast = phi if phi is None or len(runs) == 1 else phi.get(run.name)
            inputs = hidden, mask, positions, None if cache is None else cache[run.name]
            if own is not None:
                cached = theta[run.name], fast, first, last
                hidden, own[run.name] = cached_layers(self.config, run, *cached, *inputs)
                continue
            layers = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], theta[run.name])
            variables = {"params": layers} if fast is None else {"params": layers, "fast": fast}
            # What the stack really holds: a shortened one runs as a shorter model.
            length = jax.tree.leaves(layers)[0].shape[0]
            stack = stack_of(self.config, run, length, run.first + first)
            if some.found is not None:
                (hidden, _), sown = stack.apply(variables, *inputs, mutable=["intermediates"])
                some.found[run.name] = sown["intermediates"]
                continue
            hidden, _ = stack.apply(variables, *inputs)
        if own is not None:
            rows = (hidden.shape[0], positions.shape[1])
            own["position_ids"] = jnp.broadcast_to(positions, rows)[None, ..., None]
        return hidden

    def mask(self, hidden: Hidden, context: Context) -> jax.Array | None:
        """Who sees whom in a whole row, as ``attention.attend`` takes it."""
        return self._mask(context, _positions(hidden, context), None)

    def _mask(
        self, context: Context, positions: jax.Array, cache: Cache | None
    ) -> jax.Array | None:
        """Who sees whom, as ``attention.attend`` takes it."""
        block, attend = self.config.attention_block, context.attend
        if not block:
            return attend
        keys = positions
        if cache is not None:
            cached = cache["position_ids"][0, ..., 0]
            own = jnp.broadcast_to(positions, (len(cached), positions.shape[1]))
            keys = jnp.concatenate([cached, own], axis=1)
        causal = sees_block(positions, keys, block)
        if attend is None:
            return causal
        if attend.dtype != bool:
            raise TypeError(
                f"attend is {attend.dtype}: with attention_block={block} it must be bool"
            )
        return causal & (attend if attend.ndim == 3 else attend[:, None, :])

    def _finish(self, hidden: Hidden) -> Hidden:
        """Let position i hold what predicts token i; the first keeps its own (Dream)."""
        if not self.config.right_shift:
            return hidden
        return jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)


def _positions(hidden: jax.Array, context: Context) -> jax.Array:
    """The given position ids, or 0 .. l-1 for every row."""
    if context.position_ids is not None:
        return context.position_ids
    return jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
