"""Fast weights phi: what they are, where they sit, how they start.

Phi is a nested dict that mirrors one layer of the backbone (``{"mlp": {"gate_proj": {"delta":
LowRank}}}``). Every leaf has two leading axes before the matrix: ``[groups, layers, ...]``. A
*group* is a set of rows that shares one memory (see ``MemoryConfig.scope``); ``layers`` counts
the adapted layers only. Experts have a third one.
"""

import math
from collections.abc import Callable

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from memdlm_jax import partitioning
from memdlm_jax.diffusion import objective
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.typing import (
    Cache,
    Context,
    Denoiser,
    EfficientDenoiser,
    Hidden,
    Key,
    Phi,
    Theta,
)

Multiply = Callable[[jax.Array, jax.Array], jax.Array]
"""A product of activations [..., in] and a matrix [..., in, out]: of the whole, or by expert."""


@flax.struct.dataclass
class LowRank:
    """A LoRA fast weight: ``x -> scale * (x A) B``; A is [..., in, rank], B is [..., rank, out]."""

    A: jax.Array
    B: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, multiply: Multiply = jnp.matmul) -> jax.Array:
        """Map [..., in] to [..., out]; ``multiply(x, matrix)`` takes the products."""
        return multiply(multiply(x, self.A), self.B) * self.scale


@flax.struct.dataclass
class Dense:
    """A full fast weight: ``x -> x W`` with W [..., in, out]."""

    W: jax.Array

    def __call__(self, x: jax.Array, multiply: Multiply = jnp.matmul) -> jax.Array:
        """Map [..., in] to [..., out]; ``multiply(x, matrix)`` takes the product."""
        return multiply(x, self.W)


@flax.struct.dataclass
class Dropped:
    """A fast weight whose inputs are dropped with probability ``rate``, the rest scaled up.

    Attributes:
        delta: the fast weight.
        key: PRNG key of this matrix of this layer; with leading axes, as the leaves of ``delta``.
        rate: in (0, 1).
    """

    delta: LowRank | Dense
    key: Key
    rate: float = flax.struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, multiply: Multiply = jnp.matmul) -> jax.Array:
        """Map [..., in] to [..., out]; ``multiply(x, matrix)`` takes the products."""
        keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return self.delta(jnp.where(keep, x / (1 - self.rate), 0), multiply)


def with_dropout(phi: Phi, key: Key, rate: float) -> Phi:
    """Let the inputs of every fast weight be dropped, each matrix of each layer on its own.

    Args:
        phi: fast weights of one group, leaves [layers, ...].
        key: PRNG key.
        rate: in [0, 1); 0 returns ``phi`` itself.
    """
    if rate == 0:
        return phi

    deltas, structure = jax.tree.flatten(phi, is_leaf=is_fast_weight)
    layers = [jax.tree.leaves(delta)[0].shape[0] for delta in deltas]
    keys = jax.random.split(key, (len(deltas), max(layers)))
    dropped = [Dropped(delta, keys[i, : layers[i]], rate) for i, delta in enumerate(deltas)]
    return jax.tree.unflatten(structure, dropped)


def is_fast_weight(node) -> bool:
    """Tell the fast weight of one matrix from the trees above it."""
    return isinstance(node, LowRank | Dense)


def by_path(phi: Phi) -> dict[str, LowRank | Dense]:
    """The fast weights by the path of their matrix, such as ``mlp/gate_proj``."""
    leaves = jax.tree_util.tree_flatten_with_path(phi, is_leaf=is_fast_weight)[0]
    # The last entry of a path is "delta".
    return {jax.tree_util.keystr(p[:-1], simple=True, separator="/"): leaf for p, leaf in leaves}


def first_adapted_layer(num_layers: int, layer_fraction: float) -> int:
    """Index of the first layer with fast weights: int(n (1 - fraction)), as the public code has it.

    Raises:
        ValueError: if no layer would be adapted.
    """
    first = int(num_layers * (1 - layer_fraction))
    if first >= num_layers:
        raise ValueError(
            f"memory.layer_fraction={layer_fraction} adapts none of {num_layers} layers: "
            "1 - layer_fraction rounds to 1"
        )
    return first


def split_of(denoiser: Denoiser, config: MemoryConfig) -> int:
    """Number of trunk layers S of this denoiser under this config."""
    return first_adapted_layer(denoiser.num_layers, config.layer_fraction)


def init(key: Key, denoiser: Denoiser, config: MemoryConfig, groups: int, dtype=jnp.float32) -> Phi:
    """Fresh fast weights phi_0, which leave the model unchanged.

    Args:
        key: PRNG key; only ``lora`` draws from it.
        denoiser: says which matrices can adapt, and their shapes.
        config: adapter, rank, alpha, layers and modules.
        groups: memories to make. All groups start from the same A, so that what a row writes does
            not depend on its place in the batch.
        dtype: float32 over any base, float64 in parity tests.

    Returns:
        Phi with leaves [groups, adapted layers, (experts,) in, ...]. A is uniform in +-1/sqrt(in)
        (PyTorch's Kaiming-uniform with a = sqrt(5), as the public code draws it), B and W are zero.

    Raises:
        ValueError: if a target module is unknown to the denoiser, naming it and those known.
    """
    shapes = denoiser.adaptable(split_of(denoiser, config))
    paths = adapted_paths(denoiser, config)
    flat = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        delta = _init_one(path_key, config, shapes[path], dtype)
        flat[(*path.split("/"), "delta")] = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (groups, *leaf.shape)), delta
        )
    phi = flax.traverse_util.unflatten_dict(flat)
    return partitioning.constrain_tree(phi, "rows")


def adapted_paths(denoiser: Denoiser, config: MemoryConfig) -> list[str]:
    """Sorted paths of the matrices of the adapted layers that carry fast weights.

    Raises:
        ValueError: if a target module has no matrix in these layers, naming it and those known.
    """
    known, found = denoiser.adaptable(split_of(denoiser, config)), set()
    for module in config.target_modules:
        below = {path for path in known if f"/{module}/" in f"/{path}/"}
        if not below:
            raise ValueError(
                f"memory.target_modules has {module!r}, unknown to the adapted layers of this "
                f"denoiser; they have {sorted(known)}, their parts and the modules above them"
            )
        found |= below
    return sorted(found)


def _init_one(key: Key, config: MemoryConfig, shape: tuple[int, ...], dtype):
    *stack, rows, columns = shape
    if config.adapter == "full":
        return Dense(jnp.zeros(shape, dtype))
    bound = 1 / math.sqrt(rows)
    a = jax.random.uniform(key, (*stack, rows, config.rank), dtype, -bound, bound)
    scale = config.alpha / config.rank
    return LowRank(a, jnp.zeros((*stack, config.rank, columns), dtype), scale)


def group_rows(tree, groups: int):
    """Reshape every leaf [b, ...] to [groups, b / groups, ...]."""
    return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tree)


def ungroup_rows(tree):
    """Inverse of ``group_rows``."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def head_with_memory(
    denoiser: Denoiser,
    theta: Theta,
    phi: Phi,
    hidden: Hidden,
    context: Context,
    *,
    split: int,
    at: Int[Array, "b c"] | None = None,
    entered: bool = False,
) -> Hidden:
    """Run the head with each group's own fast weights; ``phi = None`` is the plain model.

    Args:
        denoiser: the backbone.
        theta: base parameters.
        phi: fast weights with leading group axis, or ``None``.
        hidden: [b, l, d] output of the trunk; the groups are consecutive runs of rows.
        context: of the rows.
        split: number of trunk layers.
        at: positions wanted; ``None`` for all.
        entered: ``hidden`` is what ``EfficientDenoiser.enter`` returned at ``at``.

    Returns:
        [b, l, d] last hidden states, before the final norm; with ``at`` [b, c, d].
    """

    def one_group(phi, rows):
        hidden, at, context = rows
        if at is None:
            return denoiser.head(theta, phi, hidden, context, split=split)
        return objective.head_at(
            denoiser, theta, phi, hidden, at, context, split=split, entered=entered
        )

    rows = hidden, at, context
    if phi is None:
        return one_group(None, rows)
    groups = number_of_groups(phi)
    mapped = partitioning.map_groups(one_group, groups)
    return ungroup_rows(mapped(phi, group_rows(rows, groups)))


def cached_head_with_memory(
    denoiser: EfficientDenoiser,
    theta: Theta,
    phi: Phi,
    hidden: Hidden,
    context: Context,
    cache: Cache | None,
    *,
    split: int,
) -> tuple[Hidden, Cache]:
    """``head_with_memory`` on some columns; see ``EfficientDenoiser.head_with_cache``."""
    if phi is None:
        return denoiser.head_with_cache(theta, None, hidden, context, cache, split=split)
    groups = number_of_groups(phi)

    def one_group(phi, rows, cache):
        return denoiser.head_with_cache(theta, phi, *rows, cache, split=split)

    # The leaves of a cache are [layers, rows, ...].
    parted = jax.tree.map(lambda x: x.reshape(x.shape[0], groups, -1, *x.shape[2:]), cache)
    mapped = partitioning.map_groups(one_group, groups, (0, 0, 1), (0, 1))
    last, own = mapped(phi, group_rows((hidden, context), groups), parted)
    joined = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), own)
    return ungroup_rows(last), joined


def can_enter(denoiser: Denoiser, config: MemoryConfig) -> bool:
    """Whether the denoiser can run its head up to where this memory is first read."""
    if not isinstance(denoiser, EfficientDenoiser):
        return False
    return denoiser.can_enter(adapted_paths(denoiser, config))


def number_of_groups(phi: Phi) -> int:
    """Memories that phi holds."""
    return jax.tree.leaves(phi)[0].shape[0]


def groups_for(config: MemoryConfig, rows: int, parts: int = 1) -> int:
    """Memories of ``rows`` rows, when these are one of ``parts`` equal parts of a step's batch.

    Raises:
        ValueError: if the ``device`` scope's groups do not divide the parts and their rows evenly.
    """
    if config.scope == "example":
        return rows
    if config.scope == "global":
        return 1
    if config.groups % parts or rows % (config.groups // parts):
        raise ValueError(
            f"memory.groups={config.groups} must be a multiple of the {parts} parts (devices times "
            f"micro-batches) of a step's batch, and share out the {rows} rows of a part evenly"
        )
    return config.groups // parts


def group_norms(tree: Phi) -> jax.Array:
    """Euclidean norm over all leaves of every group, [groups]."""
    squares = [jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))
