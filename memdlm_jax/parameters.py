"""What is trained: theta, or a part of it, and the learned parts of an inner loop."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from memdlm_jax.typing import Theta


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


@flax.struct.dataclass
class WithInner:
    """All that the outer gradient trains when the inner loop has learned parts."""

    theta: Theta
    inner: Any


def join_learned(theta: Theta, learned: Any) -> Any:
    """The parameters to train: theta alone unless the inner loop has learned parts."""
    return theta if learned is None else WithInner(theta, learned)


def split_learned(parameters: Any) -> tuple[Theta, Any]:
    """Inverse of ``join_learned``."""
    if isinstance(parameters, WithInner):
        return parameters.theta, parameters.inner
    return parameters, None
