"""Names of dimensions, and what the mesh in context makes of them.

Pure functions say which dimension of an array is which (``constrain``) and which ``vmap`` runs over
memories (``map_groups``). Without one of our meshes in JAX's context both are nothing more than the
identity and ``jax.vmap``; under ``context(mesh)`` they tell the compiler where things lie.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

DATA, FSDP, EXPERT, SEQUENCE, TENSOR = AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Axes of a mesh; neighbours along the last ones talk most, and lie closest."""

ROW_AXES = (DATA, FSDP)
"""Axes that the rows of a batch are divided over, and with them the memories of single rows."""

_AXIS_OF = {"length": SEQUENCE, "heads": TENSOR, "vocab": TENSOR}
"""Dimension of an activation -> axis; ``rows`` stands apart."""

PARAMETER_AXIS_OF = {
    "embed": FSDP, "hidden": TENSOR, "heads": TENSOR, "vocab": TENSOR, "experts": EXPERT,
}  # fmt: skip
"""Dimension of a parameter -> axis that it is divided over."""

_groups_mapped = contextvars.ContextVar("groups_mapped", default=False)


@contextlib.contextmanager
def context(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Let what is traced inside lie on this mesh; enter it inside of the function under ``jit``."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    with jax.sharding.use_abstract_mesh(abstract):
        yield


def mesh_in_context() -> AbstractMesh | None:
    """The mesh that is being traced for, if it is one of ours and its axes are not mapped by hand.

    ``pmap`` and ``shard_map`` map by hand.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names) or mesh.manual_axes:
        return None
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"the mesh in context has axis types {mesh.axis_types}, must be all Auto")
    return mesh if mesh.size > 1 else None


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that the rows of a batch are divided into."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def parts_of(name: str) -> int:
    """Parts that the mesh in context divides a named dimension of an activation into.

    Args:
        name: ``length``, ``heads`` or ``vocab``.

    Returns:
        1 without a mesh.
    """
    mesh = mesh_in_context()
    return 1 if mesh is None else mesh.shape[_AXIS_OF[name]]


def activation_spec(mesh: AbstractMesh, shape: tuple[int, ...], names: tuple[str | None, ...]):
    """Where an activation should lie.

    Args:
        mesh: one of ours.
        shape: of the activation.
        names: of its first dimensions: ``rows``, ``length``, ``heads``, ``vocab``, ``any`` for
            one that may lie as it will, or ``None`` for one that stays whole.

    Returns:
        A PartitionSpec. The compiler is left to decide on dimensions without a name, on those that
        their axis does not divide, and on the rows of a memory whose ``map_groups`` has taken the
        axes of rows.
    """
    free = PartitionSpec.UNCONSTRAINED
    parts = [
        None if name is None else _axes(mesh, size, name) or free
        for size, name in zip(shape, names, strict=False)
    ]
    return PartitionSpec(*parts, *[free] * (len(shape) - len(parts)))


def _axes(mesh: Mesh | AbstractMesh, size: int, name: str) -> tuple[str, ...]:
    """Axes that divide a named dimension of this size; none if they cannot."""
    if name == "any":
        return ()
    if name == "rows":
        free = not _groups_mapped.get() and size % row_shards(mesh) == 0
        return ROW_AXES if free else ()
    axis = _AXIS_OF[name]
    return () if size % mesh.shape[axis] else (axis,)


def divided(mesh: AbstractMesh, shape: tuple[int, ...], *names: str) -> PartitionSpec:
    """A spec for ``shard_map``: named dimensions over their axes where these divide them."""
    pairs = zip(shape, names, strict=False)
    return PartitionSpec(*(_axes(mesh, size, name) or None for size, name in pairs))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """``x``, told to lie as ``activation_spec`` has it; without a mesh ``x`` itself."""
    mesh = mesh_in_context()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, names))


def constrain_tree(tree: Any, *names: str | None) -> Any:
    """``constrain`` for every leaf; names beyond a leaf's dimensions are left out."""
    return jax.tree.map(lambda leaf: constrain(leaf, *names[: leaf.ndim]), tree)


def map_groups(function: Callable, groups: int, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
    """``jax.vmap`` over memories; on a mesh that divides them each device maps its own.

    Sharding constraints and ``shard_map`` inside then give the mapped dimension the axes of rows
    (``spmd_axis_name``). Where the mesh does not divide the groups, the rows within them are
    divided if they can be.
    """
    mesh = mesh_in_context()
    shards = 1 if mesh is None else row_shards(mesh)
    if shards == 1 or groups % shards or _groups_mapped.get():
        return jax.vmap(function, in_axes, out_axes)

    @functools.wraps(function)
    def inside(*args):
        token = _groups_mapped.set(True)
        try:
            return function(*args)
        finally:
            _groups_mapped.reset(token)

    return jax.vmap(inside, in_axes, out_axes, spmd_axis_name=ROW_AXES)


_INPUTS, _OUTPUTS = ("embed", "hidden"), ("hidden", "embed")
_RULES: list[tuple[str, tuple[str | None, ...]]] = [
    (r"(^|/)embedding", ("vocab", "embed")),
    (r"(^|/)unembedding", ("embed", "vocab")),
    (r"_norm/scale", (None,)),
    (r"router/selection_bias", (None,)),
    (r"router/gate(/kernel)?", ("embed", None)),
    (r"(q_proj|k_proj|v_proj|query_key_value)/bias", ("heads",)),
    (r"(q_proj|k_proj|v_proj|query_key_value)(/kernel)?", ("embed", "heads")),
    (r"o_proj(/kernel)?", ("heads", "embed")),
    (r"(^|/)experts/(gate_proj|up_proj)(/kernel)?", ("experts", *_INPUTS)),
    (r"(^|/)experts/down_proj(/kernel)?", ("experts", *_OUTPUTS)),
    (r"(gate_proj|up_proj)(/kernel)?", _INPUTS),
    (r"down_proj(/kernel)?", _OUTPUTS),
]
"""End of a parameter's path -> names of its last dimensions; the first rule that fits counts."""

_PART = re.compile(r"/(kernel|delta)(?:/base|/delta)?(/codes|/scales|/A|/B|/W|/key)?$")
"""What stands in the place of a matrix, and which piece of it a leaf is."""


def name_dimensions(path: str, *names: str | None) -> None:
    """Name the last dimensions of a parameter of your own; a backbone's module calls this.

    Args:
        path: end of the parameter's path, a regular expression; it goes before the known ones.
        names: keys of ``PARAMETER_AXIS_OF``, ``None`` for a dimension that stays whole.
    """
    if unknown := set(names) - {None, *PARAMETER_AXIS_OF}:
        raise ValueError(f"names={names} has {unknown}, must be of {[*PARAMETER_AXIS_OF]} or None")
    _RULES.insert(0, (path, names))


def parameter_dimensions(path: str, ndim: int) -> tuple[str | None, ...]:
    """Names of the dimensions of a parameter, or of anything that stands in its place.

    Args:
        path: slash-separated, of a leaf of theta, of an optimiser's state for it, of fast weights
            or of a learned inner loop.
        ndim: how many there are. Those before the named ones (layers of a stack, memories) are
            ``None``.

    Raises:
        ValueError: no rule covers the path, naming it; or it has too few dimensions.
    """
    if ndim == 0:
        return ()
    names = _named_dimensions(path)
    if len(names) > ndim:
        raise ValueError(f"parameter {path} has {ndim} dimensions, its rule names {names}")
    return (*[None] * (ndim - len(names)), *names)


def _named_dimensions(path: str) -> tuple[str | None, ...]:
    if "inner/log_rates/" in path:
        return (None, None)
    matrix, part = path, ""
    if found := _PART.search(path):
        matrix, part = path[: found.start()] + "/kernel", found.group(2) or ""
    elif "inner/start/" in path:
        part = "/A"
    for pattern, names in _RULES:
        if re.search(pattern + "$", matrix):
            return _of_part(names, part)
    raise ValueError(
        f"no sharding rule covers parameter {path}: name its dimensions by "
        "partitioning.name_dimensions in the module of its model"
    )


def _of_part(names: tuple[str | None, ...], part: str) -> tuple[str | None, ...]:
    """Dimensions of a piece of what stands in the place of a matrix."""
    if part == "/key":
        return ()
    if part == "/A":  # [..., in, rank]
        return (*names[:-1], None)
    if part == "/B":  # [..., rank, out]
        return (*names[:-2], None, names[-1])
    return names
