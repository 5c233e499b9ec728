"""A denoiser with its memory, as the decode loop reads it."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memdlm_jax.diffusion.canvas import Canvas
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.memory import fast_weights
from memdlm_jax.typing import Cache, Context, Denoiser, EfficientDenoiser, Phi, Theta, Tokens


@dataclasses.dataclass(frozen=True)
class MemoryReader:
    """``diffusion.reading.Reader`` of a denoiser with fast weights.

    A cache is a dict: ``trunk`` and ``head``, the keys and values of both, and with
    ``keep_hidden`` also ``hidden``, what goes from one to the other.

    Attributes:
        denoiser: the backbone.
        theta: base parameters.
        phi: fast weights, or ``None``.
        split: number of trunk layers.
        canvas: where everything stands.
        config: attention, length of blocks, kind of cache, and what guidance leaves visible.
        unprompted: read masks in the place of the prompt.
        keep_hidden: cache what ``renewed`` needs.
    """

    denoiser: Denoiser
    theta: Theta
    phi: Phi
    split: int
    canvas: Canvas
    config: DecodeConfig
    unprompted: bool = False
    keep_hidden: bool = False

    def __post_init__(self):
        if self.config.cache != "none" and not isinstance(self.denoiser, EfficientDenoiser):
            kind = type(self.denoiser).__name__
            raise ValueError(
                f"decode.cache={self.config.cache!r} must be 'none': {kind} keeps no keys and "
                "values"
            )

    @property
    def lookback(self) -> int:
        """How many preceding columns the denoiser needs to compute logits at a column."""
        return getattr(self.denoiser, "lookback", 0)

    def __call__(
        self,
        tokens: Tokens,
        first: int | Int[Array, ""],
        wanted: Int[Array, "c"],
        cache: Cache | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Float[Array, "b c v"], Cache | None]:
        """Logits at the wanted columns; see ``diffusion.reading.Reader``."""
        width, found = tokens.shape[1], None
        positions = _columns(self.canvas.position_ids, first, width)
        tokens = self._hide_prompt(tokens, first) if self.unprompted else tokens
        context = Context(self._attend(first, width, cached=cache is not None), positions)
        if cache is None and not keep:
            hidden = self.denoiser.trunk(self.theta, tokens, context, split=self.split)
            at = jnp.broadcast_to(wanted, (len(tokens), wanted.shape[0]))
            last = fast_weights.head_with_memory(
                self.denoiser, self.theta, self.phi, hidden, context, split=self.split, at=at
            )
        else:
            caching = cast(EfficientDenoiser, self.denoiser)
            trunk, head = (None, None) if cache is None else (cache["trunk"], cache["head"])
            hidden, below = caching.trunk_with_cache(
                self.theta, tokens, context, trunk, split=self.split
            )
            everywhere, above = self._head(hidden, context, head)
            last = everywhere[:, wanted]
            found = {"trunk": below, "head": above}
            if self.keep_hidden:
                found["hidden"] = hidden[None]
        logits = self.denoiser.readout(self.theta, last)
        return logits, found if keep else None

    def renewed(self, cache: Cache) -> Cache:
        """A cache that was filled under other fast weights, made to fit those of this reader.

        The trunk never reads fast weights: its keys and values stay, and the head is run again on
        what it read.
        """
        hidden = cache["hidden"][0]
        seen = self._attend(0, hidden.shape[1], cached=False)
        _, above = self._head(hidden, Context(seen, self.canvas.position_ids), None)
        return cache | {"head": above}

    def _head(self, hidden, context: Context, cache) -> tuple[Any, Cache]:
        return fast_weights.cached_head_with_memory(
            cast(EfficientDenoiser, self.denoiser), self.theta, self.phi, hidden, context, cache,
            split=self.split,
        )  # fmt: skip

    def _attend(self, first, width: int, *, cached: bool) -> jax.Array:
        """Keys that every query sees [b, k], or those of each query [b, q, k]."""
        valid = self.canvas.valid
        own = first + jnp.arange(width)
        columns, seen = own, _columns(valid, first, width)
        if cached:
            everywhere = jnp.arange(valid.shape[1])
            elsewhere = (everywhere < first) | (everywhere >= first + width)
            columns = jnp.concatenate([everywhere, own])
            seen = jnp.concatenate([valid & elsewhere, seen], axis=1)
        if self.config.attention == "full":
            return seen

        def number(column):
            return (column - self.canvas.start) // self.config.block_size

        return seen[:, None, :] & (number(own)[:, None] >= number(columns))[None]

    def _hide_prompt(self, tokens: Tokens, first) -> Tokens:
        c = self.canvas
        prompt = c.valid.at[:, c.start :].set(c.valid[:, c.start :] & ~c.fillable)
        hidden = _columns(prompt, first, tokens.shape[1])
        if self.config.guidance_keep:
            hidden &= ~jnp.isin(tokens, jnp.array(self.config.guidance_keep))
        return jnp.where(hidden, self.denoiser.mask_token_id, tokens)


def _columns(x: jax.Array, first, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, width, 1)
