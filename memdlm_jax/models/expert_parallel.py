"""Experts on several devices: each computes its own experts for all tokens that it can see.

Automatic partitioning of a ragged product is not to be trusted: it would gather what the rows are
sorted by. So the mesh is mapped by hand here. A device holds ``num_experts / expert`` experts, and
of their inner size its ``tensor`` share; tokens are divided over the axes of rows and length and
whole along the others. It routes the tokens it holds, multiplies those that chose one of its
experts, and all add up. Everything is closed under ``vmap`` and derivatives of any order.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from memdlm_jax import partitioning
from memdlm_jax.partitioning import EXPERT, TENSOR

Some = Callable[[jax.Array, Any, jax.Array, int], jax.Array]
"""(tokens [t, d], variables, first expert, count) -> what these experts add, [t, d]."""


def sum_over_experts(
    mesh: AbstractMesh, some: Some, x: jax.Array, variables: Any, num_experts: int
) -> jax.Array:
    """Sum what all experts add to the tokens.

    Args:
        mesh: in context, with more than one device.
        some: the contribution of some experts, linear in what those on other devices hold.
        x: [b, l, d] tokens.
        variables: ``{"router": {collection: ...}, "experts": {collection: ...}}``; matrices may
            have stand-ins (quantised, with adapters) and fast weights on top.
        num_experts: experts in all.

    Returns:
        [b, l, d] in the dtype of ``x``; the sum is taken in that of ``some``.

    Raises:
        ValueError: the mesh does not divide the experts.
    """
    parts = mesh.shape[EXPERT]
    if num_experts % parts:
        raise ValueError(f"mesh.expert={parts} must divide num_experts={num_experts}")
    specs = specs_of(mesh, variables)
    rows = partitioning.divided(mesh, x.shape, "rows", "length")

    def local(x: jax.Array, variables: Any) -> jax.Array:
        count = num_experts // parts
        first = jax.lax.axis_index(EXPERT) * count
        y = some(x.reshape(-1, x.shape[-1]), _own_keys(variables, rows), first, count)
        summed = (EXPERT, TENSOR) if _inner_divided(specs) else (EXPERT,)
        return jax.lax.psum(y, summed).astype(x.dtype).reshape(x.shape)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, specs), out_specs=rows, check_vma=False
    )
    return mapped(x, variables)


def specs_of(mesh: AbstractMesh, variables: Any) -> Any:
    """Which share of the router's and the experts' variables a device holds, as a tree of specs.

    Experts are divided over their axis, their inner size over ``tensor`` if it divides that of all
    leaves (the blocks of scales of a quantised matrix too), and nothing else.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(variables)
    names = [
        # Between the module and the matrix stands the name of the collection.
        partitioning.parameter_dimensions(
            jax.tree_util.keystr((path[0], *path[2:]), simple=True, separator="/"), leaf.ndim
        )
        for path, leaf in named
    ]
    sizes = [
        size
        for (_, leaf), dimensions in zip(named, names, strict=True)
        for size, name in zip(leaf.shape, dimensions, strict=True)
        if name == "hidden"
    ]
    fits = all(size % mesh.shape[TENSOR] == 0 for size in sizes)
    axes = {"experts": EXPERT, "hidden": TENSOR if fits else None}
    specs = [PartitionSpec(*(axes.get(name or "") for name in dimensions)) for dimensions in names]
    return jax.tree_util.tree_unflatten(structure, specs)


def _inner_divided(specs: Any) -> bool:
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return any(TENSOR in spec for spec in leaves)


def _own_keys(variables: Any, rows: PartitionSpec) -> Any:
    """The variables with other dropout on devices that hold other tokens or experts.

    Devices that hold the same ones must draw alike, or they would go on with different results:
    only axes that ``rows`` divides by count, and that of experts. Memories that are mapped over
    devices draw alike too, as they do on one.
    """
    if not any(map(_is_key, jax.tree.leaves(variables))):
        return variables
    axes = [axis for part in rows for axis in ((part,) if isinstance(part, str) else part or ())]
    device = jax.lax.axis_index((*axes, EXPERT))

    def own(leaf):
        return jax.random.fold_in(leaf, device) if _is_key(leaf) else leaf

    return jax.tree.map(own, variables)


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
