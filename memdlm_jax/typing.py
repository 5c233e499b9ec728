"""Types only: the shape vocabulary, the batch, and the protocols of denoisers.

Shape letters, used in every annotation of the project:

* ``b``: rows of a batch; ``l``: tokens of a row; ``c``: target slots of a row (``c <= l``)
* ``d``: width of the residual stream; ``v``: size of the vocabulary
* ``n``: layers of a stack; ``s``: states of a trajectory
* ``t``: texts to write; ``m``: segments of a text; ``k``: tokens of a segment
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int

Key = jax.Array
"""A PRNG key: always an argument, used once, never returned."""

Theta = Any
"""Base parameters of a denoiser: a plain pytree of arrays."""


Phi = Any
"""Fast weights, the Parametric Memory: a plain pytree of arrays; ``None`` is no memory."""

Cache = Any
"""Keys and values of layers: a tree of arrays [layers, b, ..., columns, d]."""

Tokens = Int[Array, "b l"]
Mask = Bool[Array, "b l"]
Hidden = Float[Array, "b l d"]


@flax.struct.dataclass
class Texts:
    """Texts to write into memory. Each text is cut into segments; the model reads each one alone.

    Attributes:
        tokens: clean token ids, every segment from position 0.
        valid: False on padding; a segment may be all padding.
        weight: weight of each token in the inner loss; ``None`` is 1 for all.
    """

    tokens: Int[Array, "t m k"]
    valid: Bool[Array, "t m k"]
    weight: Float[Array, "t m k"] | None = None


@flax.struct.dataclass
class Batch:
    """Rows of clean tokens with what the diffusion objective must know of them.

    Attributes:
        tokens: x_0, clean token ids.
        maskable: positions that the forward process may mask and that carry loss (the response).
        valid: positions that may be attended to (everything but padding).
        padding: maskable positions that only fill up the row, if padding is supervised;
            ``None`` where it is not.
        context: texts to write into memory before the rows are read. The rows do not contain
            them. Text i belongs to the i-th of equal runs of rows, its questions. ``None``: the
            memory is written from the rows themselves, as in the paper.
    """

    tokens: Int[Array, "b l"]
    maskable: Bool[Array, "b l"]
    valid: Bool[Array, "b l"]
    padding: Bool[Array, "b l"] | None = None
    context: Texts | None = None


@flax.struct.dataclass
class Context:
    """What surrounds the tokens of a row.

    Attributes:
        attend: bool, the keys that every query may attend to [b, l], or those of each query
            [b, l, l]; ``None`` is all of them. Beside a cache the keys are the cached columns
            followed by the given ones; a column that is in both must be seen once.
        position_ids: [b, l] int32; ``None`` is 0 .. l-1.
    """

    attend: jax.Array | None = None
    position_ids: Tokens | None = None


EVERYTHING = Context()
"""All tokens are seen, at positions 0 .. l-1."""


@runtime_checkable
class Denoiser(Protocol):
    """The pure functions of theta that memory, objective and decoding need from a backbone.

    ``split`` divides the layers: ``trunk`` runs the embedding and layers ``0 .. split - 1``, which
    never read fast weights; ``head`` runs layers ``split .. num_layers - 1``, which read ``phi``.
    Position i of what ``head`` returns predicts token i.
    """

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        ...

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token m."""
        ...

    def trunk(
        self, theta: Theta, tokens: Tokens, context: Context = EVERYTHING, *, split: int
    ) -> Hidden:
        """Embed the tokens and run layers ``0 .. split - 1``."""
        ...

    def head(
        self, theta: Theta, phi: Phi, hidden: Hidden, context: Context = EVERYTHING, *, split: int
    ) -> Hidden:
        """Run layers ``split .. num_layers - 1`` with fast weights; stops before the final norm."""
        ...

    def normalise(self, theta: Theta, last_hidden: Float[Array, "b c d"]) -> Float[Array, "b c d"]:
        """Final norm, at the given positions only."""
        ...

    def readout(self, theta: Theta, last_hidden: Float[Array, "b c d"]) -> Float[Array, "b c v"]:
        """Final norm and unembedding, float32 or wider, at the given positions only."""
        ...

    def adaptable(self, split: int = 0) -> Mapping[str, tuple[int, ...]]:
        """Matrices of the head that can carry fast weights: path -> (layers, ..., in, out).

        ``layers`` counts those of the head that have it; experts have an axis of their own.
        """
        ...


@runtime_checkable
class EfficientDenoiser(Denoiser, Protocol):
    """A denoiser with everything that saves work; the results equal those of ``Denoiser``.

    It can compute the loss by parts of the vocabulary, run its last layer at some positions only,
    stop inside its first head layer before fast weights are read, and keep keys and values.
    """

    @property
    def vocab_chunk(self) -> int:
        """Tokens of the vocabulary that the loss takes at a time; 0 for all."""
        ...

    @property
    def lookback(self) -> int:
        """How many preceding columns the denoiser needs to predict the token of a column."""
        ...

    def unembedding(self, theta: Theta) -> Float[Array, "d v"]:
        """The output matrix, applied after ``normalise``."""
        ...

    def head_at(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        at: Int[Array, "b c"],
        context: Context = EVERYTHING,
        *,
        split: int,
        entered: bool = False,
    ) -> Float[Array, "b c d"]:
        """What ``head`` returns at these positions; ``entered``: from what ``enter`` returned."""
        ...

    def can_enter(self, paths: Collection[str]) -> bool:
        """Whether ``enter`` reads none of these paths of ``adaptable``."""
        ...

    def enter(
        self,
        theta: Theta,
        hidden: Hidden,
        at: Int[Array, "b c"],
        context: Context = EVERYTHING,
        *,
        split: int,
    ) -> Hidden:
        """Run layer ``split`` up to its feed-forward: [b, l, d], of the last layer [b, c, d].

        This part does not depend on phi, so it is computed once for everything that reads the same
        state.
        """
        ...

    def trunk_with_cache(
        self,
        theta: Theta,
        tokens: Tokens,
        context: Context = EVERYTHING,
        cache: Cache | None = None,
        *,
        split: int,
    ) -> tuple[Hidden, Cache]:
        """``trunk`` on some columns of a row, attending to the cached ones too.

        A cache holds the keys and values of layers at columns of a row.

        Returns:
            What ``trunk`` returns at the given columns, and the keys and values of these columns;
            with ``cache=None`` they are a first cache.
        """
        ...

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
        """``head`` on some columns of a row, see ``trunk_with_cache``."""
        ...
