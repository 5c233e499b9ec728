"""The shape vocabulary, the batch, and the protocol that every denoiser answers.

Shape letters, used in every annotation of the project:

* ``b``: rows of a batch; ``l``: tokens of a row; ``c``: target slots of a row (``c <= l``)
* ``d``: width of the residual stream; ``v``: size of the vocabulary
* ``n``: layers of a stack; ``s``: states of a trajectory
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int

Key = jax.Array
"""A PRNG key: always an argument, used once, never returned."""

Theta = Any
"""Base parameters of a denoiser: a plain pytree of arrays."""


@flax.struct.dataclass
class Partitioned:
    """Theta divided into what is trained and what is not.

    Attributes:
        trainable: slash-separated path -> leaf; the only leaves that gradients are taken of.
        frozen: theta with ``None`` in the place of every trainable leaf.
    """

    trainable: dict[str, jax.Array]
    frozen: Theta


def partition(theta: Theta, trainable: Callable[[str], bool]) -> Partitioned:
    """Divide theta by the slash-separated paths of its leaves.

    Raises:
        ValueError: no leaf is trainable.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(theta)
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]
    chosen = {name: leaf for name, leaf in named if trainable(name)}
    if not chosen:
        raise ValueError(f"none of the {len(named)} leaves of theta is trainable")
    rest = [None if name in chosen else leaf for name, leaf in named]
    return Partitioned(chosen, jax.tree_util.tree_unflatten(structure, rest))


def differentiable(theta: Theta) -> tuple[Any, Callable[[Any], Theta]]:
    """The part of theta that derivatives are taken of, and a function that completes it again."""
    if not isinstance(theta, Partitioned):
        return theta, lambda leaves: leaves
    frozen = theta.frozen
    return theta.trainable, lambda leaves: Partitioned(leaves, frozen)


def merged(theta: Theta) -> Theta:
    """Theta in one tree again; anything but a ``Partitioned`` is returned as it is."""
    if not isinstance(theta, Partitioned):
        return theta
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        theta.frozen, is_leaf=lambda leaf: leaf is None
    )
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    filled = [
        theta.trainable.get(name) if leaf is None else leaf
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, filled)


Phi = Any
"""Fast weights, the Parametric Memory: a plain pytree of arrays; ``None`` is no memory."""

Cache = Any
"""Keys and values of layers: a tree of arrays [layers, b, ..., columns, d]."""

Tokens = Int[Array, "b l"]
Mask = Bool[Array, "b l"]
Hidden = Float[Array, "b l d"]


@flax.struct.dataclass
class Batch:
    """Rows of clean tokens with what the diffusion objective must know of them.

    Attributes:
        tokens: x_0, clean token ids.
        maskable: positions that the forward process may mask and that carry loss (the response).
        valid: positions that may be attended to (everything but padding).
        padding: maskable positions that only fill up the row, if padding is supervised;
            ``None`` where it is not.
    """

    tokens: Int[Array, "b l"]
    maskable: Bool[Array, "b l"]
    valid: Bool[Array, "b l"]
    padding: Bool[Array, "b l"] | None = None


@runtime_checkable
class Denoiser(Protocol):
    """Pure functions of theta that memory, objective and decoding need of a backbone.

    ``split`` divides the layers: ``trunk`` runs the embedding and layers ``0 .. split - 1``, which
    never read fast weights; ``head`` runs layers ``split .. num_layers - 1``, which read ``phi``.
    ``attend`` is bool: the keys that every query may attend to [b, l], or those of each query
    [b, l, l]; ``None`` is all of them. Position i of what ``head`` returns predicts token i.
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
        self,
        theta: Theta,
        tokens: Tokens,
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
    ) -> Hidden:
        """Embed the tokens and run layers ``0 .. split - 1``."""
        ...

    def head(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
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
class SelectiveDenoiser(Denoiser, Protocol):
    """A denoiser whose head can leave out what nobody reads of its last layer."""

    def head_at(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        at: Int[Array, "b c"],
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
    ) -> Float[Array, "b c d"]:
        """What ``head`` returns at these positions."""
        ...


@runtime_checkable
class EnteringDenoiser(SelectiveDenoiser, Protocol):
    """A denoiser whose first head layer can be run up to where fast weights are first read.

    ``head_at(theta, phi, hidden, at, ...)`` equals
    ``head_entered(theta, phi, enter(theta, hidden, at, ...), at, ...)``. What ``enter`` computes
    does not depend on phi, so that it is computed once for all that read the same state.
    """

    def can_enter(self, paths: Collection[str]) -> bool:
        """Whether ``enter`` reads none of these paths of ``adaptable``."""
        ...

    def enter(
        self,
        theta: Theta,
        hidden: Hidden,
        at: Int[Array, "b c"],
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
    ) -> Hidden:
        """Run layer ``split`` up to its feed-forward: [b, l, d], of the last layer [b, c, d]."""
        ...

    def head_entered(
        self,
        theta: Theta,
        phi: Phi,
        entered: Hidden,
        at: Int[Array, "b c"],
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        *,
        split: int,
    ) -> Float[Array, "b c d"]:
        """The rest of ``head_at``."""
        ...


@runtime_checkable
class ChunkingDenoiser(Denoiser, Protocol):
    """A denoiser whose loss may be taken without ever holding logits of the whole vocabulary."""

    @property
    def vocab_chunk(self) -> int:
        """Tokens of the vocabulary at a time; 0 for all."""
        ...

    def unembedding(self, theta: Theta) -> Float[Array, "d v"]:
        """The output matrix, applied behind ``normalise``."""
        ...


@runtime_checkable
class CachingDenoiser(Denoiser, Protocol):
    """A denoiser that can run on some columns of a row, attending to the cached rest.

    A cache holds the keys and values of layers at columns of a row. Both functions return what
    their namesake returns at the given columns, and the keys and values of these columns, which
    with ``cache=None`` are a first cache. The keys of ``attend`` are the cached columns and behind
    them the given ones: a column that is in both must be seen once.
    """

    @property
    def lookback(self) -> int:
        """Columns that must stand before the first one that predictions are wanted at."""
        ...

    def trunk_with_cache(
        self,
        theta: Theta,
        tokens: Tokens,
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        cache: Cache | None = None,
        *,
        split: int,
    ) -> tuple[Hidden, Cache]:
        """``trunk`` with keys and values."""
        ...

    def head_with_cache(
        self,
        theta: Theta,
        phi: Phi,
        hidden: Hidden,
        attend: jax.Array | None = None,
        position_ids: Tokens | None = None,
        cache: Cache | None = None,
        *,
        split: int,
    ) -> tuple[Hidden, Cache]:
        """``head`` with keys and values."""
        ...
