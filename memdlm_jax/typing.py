"""The shape vocabulary, the batch, and the protocol that every denoiser answers.

Shape letters, used in every annotation of the project:

* ``b``: rows of a batch; ``l``: tokens of a row; ``c``: target slots of a row (``c <= l``)
* ``d``: width of the residual stream; ``v``: size of the vocabulary
* ``n``: layers of a stack; ``s``: states of a trajectory
"""

from collections.abc import Mapping
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
    ``valid`` marks the keys that may be attended to (``None``: all of them).
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
        valid: Mask | None = None,
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
        valid: Mask | None = None,
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

    def adaptable(self) -> Mapping[str, tuple[int, int, int]]:
        """Matrices that can carry fast weights: path -> (num_layers, in, out)."""
        ...
