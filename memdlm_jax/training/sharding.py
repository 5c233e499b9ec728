"""Where parameters, optimiser state and batches lie on a mesh of devices.

A mesh has five axes (``MeshConfig``). Every parameter is placed by the rule for the end of its path
(``partitioning.parameter_dimensions``); what follows a parameter, such as Adam's moments, has its
path at the end of its own and so lies with it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from memdlm_jax import partitioning
from memdlm_jax.partitioning import AXES, PARAMETER_AXIS_OF
from memdlm_jax.typing import Batch

LARGEST_REPLICATED = 64 * 2**20
"""Bytes of an array: no larger one may lie whole on every device for want of a divisor."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes of a mesh; their product is the number of devices.

    Attributes:
        data: rows of a batch are divided; parameters are whole. -1 is all devices that are left.
        fsdp: rows are divided, and parameters and optimiser state too, along the width.
        tensor: heads, inner sizes of feed-forward blocks and the vocabulary are divided.
        expert: experts are divided; the rest is computed on every device of the axis.
        sequence: tokens of a row are divided; keys and values are gathered.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{name}={size} must be at least 1, or -1 for the rest")
        if (rest := self._rest()) and len(rest) > 1:
            raise ValueError(f"mesh has {' and '.join(rest)} at -1: only one axis can be the rest")

    def _rest(self) -> list[str]:
        return [name for name, size in dataclasses.asdict(self).items() if size == -1]

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis -> size on so many devices, in the order of ``partitioning.AXES``.

        Raises:
            ValueError: the sizes do not multiply to ``devices``.
        """
        asked = dataclasses.asdict(self)
        known = math.prod(size for size in asked.values() if size != -1)
        for name in self._rest():
            asked[name] = devices // known
        if math.prod(asked.values()) != devices:
            given = ", ".join(f"mesh.{n}={v}" for n, v in dataclasses.asdict(self).items())
            raise ValueError(
                f"{given} do not multiply to the {devices} devices: "
                + ("the others must divide them" if self._rest() else "make one axis -1, the rest")
            )
        return {axis: asked[axis] for axis in AXES}

    def build(self, devices: Sequence[Any]) -> Mesh:
        """Mesh over these devices, real ones or those of a topology; neighbours where it matters.

        Raises:
            ValueError: as ``sizes``.
        """
        sizes = tuple(self.sizes(len(devices)).values())
        # A side of a torus may hold two axes: 16 chips as 4 of ``tensor`` and 4 of ``fsdp``.
        placed = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Whole:
    """A dimension that stays whole because its axis does not divide it.

    Attributes:
        path: of the array.
        dimension: what the rules call it.
        size: of the dimension.
        axis: of the mesh.
        bytes: of the array.
    """

    path: str
    dimension: str
    size: int
    axis: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.dimension}={self.size} is not divided over mesh.{self.axis}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places of all arrays of a training or decoding step on one mesh.

    Every function takes pytrees of arrays or of ``jax.ShapeDtypeStruct`` alike, and the mesh may be
    one of a topology without hardware.
    """

    mesh: Mesh

    def spec(self, path: str, leaf: Any) -> PartitionSpec:
        """How an array is divided.

        Args:
            path: slash-separated, of the array in theta or in a state.
            leaf: has ``shape`` and ``dtype``.

        Raises:
            ValueError: no rule covers the path; or the array is larger than 64 MB and no axis that
                the mesh has divides its dimension, naming it.
        """
        return self._placed(path, leaf)[0]

    def shardings(self, tree: Any) -> Any:
        """``NamedSharding`` of every leaf of theta, of a state or of a part; raises as ``spec``."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, self.spec(_name(path), leaf)), tree
        )

    def where(self, dtype: Any) -> Callable[[str, tuple[int, ...]], NamedSharding]:
        """(path, shape) -> place of a parameter of this dtype, as loading a checkpoint asks."""

        def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
            return NamedSharding(self.mesh, self.spec(path, jax.ShapeDtypeStruct(shape, dtype)))

        return place

    def place(self, tree: Any) -> Any:
        """Put arrays where they belong; raises as ``spec``.

        Among several processes each has the same whole arrays, or arrays of the mesh already.
        """
        places = self.shardings(tree)
        if self.mesh.is_multi_process:
            return jax.tree.map(_put_share, tree, places)
        return jax.device_put(tree, places)

    def abstract(self, tree: Any) -> Any:
        """The tree as ``jax.ShapeDtypeStruct`` with places: what ``lower`` and a restore take."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree, self.shardings(tree),
        )  # fmt: skip

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Rows over ``data`` and ``fsdp``, tokens over ``sequence``: for leaves [b, l]."""
        spec = PartitionSpec(partitioning.ROW_AXES, partitioning.SEQUENCE)
        return NamedSharding(self.mesh, spec)

    def rows_here(self, count: int) -> Int[np.ndarray, "r"]:
        """Which of a batch's ``count`` rows the devices of this process hold, ascending.

        Raises:
            ValueError: they cannot be divided over the mesh.
        """
        if count % (shards := partitioning.row_shards(self.mesh)):
            raise ValueError(
                f"a batch of {count} rows must be a multiple of mesh.data * mesh.fsdp = {shards}"
            )
        by_row = NamedSharding(self.mesh, PartitionSpec(partitioning.ROW_AXES))
        found = by_row.addressable_devices_indices_map((count,)).values()
        return np.unique([row for (part,) in filter(None, found) for row in range(count)[part]])

    def put_batch(self, batch: Batch) -> Batch:
        """Start to move a whole batch of host arrays [b, l] to the devices.

        Of a context [t, m, k] each device gets whole texts.
        """
        texts = NamedSharding(self.mesh, PartitionSpec(partitioning.ROW_AXES))
        put = _put_share if self.mesh.is_multi_process else jax.device_put
        return jax.tree.map(lambda x: put(x, self.rows if x.ndim == 2 else texts), batch)

    def put_rows(self, part: Batch) -> Batch:
        """``put_batch`` of a batch of which this process has only its ``rows_here``."""
        here, length = part.tokens.shape
        count = self.rows_in_all(here)
        mine = self.rows_here(count)

        def share(leaf):
            def of(index):
                rows, columns = index
                return leaf[np.searchsorted(mine, range(count)[rows]), columns]

            return jax.make_array_from_callback((count, length), self.rows, of)

        return jax.tree.map(share, part)

    def rows_in_all(self, here: int) -> int:
        """Rows of a batch of which this process's devices hold ``here``."""
        shards = partitioning.row_shards(self.mesh)
        return here * shards // len(self.rows_here(shards))

    def check_batch(self, rows: int, length: int, accumulation: int = 1) -> None:
        """Raise ValueError if a batch [rows, length] cannot be divided over the mesh."""
        shards = partitioning.row_shards(self.mesh)
        if rows % (shards * accumulation):
            raise ValueError(
                f"a batch of {rows} rows must be a multiple of mesh.data * mesh.fsdp = {shards} "
                f"times optimizer.accumulation = {accumulation}"
            )
        if length % (parts := self.mesh.shape[partitioning.SEQUENCE]):
            raise ValueError(f"rows of {length} tokens must be a multiple of mesh.sequence={parts}")

    def whole(self, tree: Any) -> list[Whole]:
        """Dimensions that stay whole although the mesh has an axis for them."""
        return [note for path, leaf in _named(tree) for note in self._placed(path, leaf)[1]]

    def bytes_per_device(self, tree: Any) -> int:
        """Bytes of the tree's arrays on one device."""
        total = 0
        for path, leaf in _named(tree):
            sharding = NamedSharding(self.mesh, self.spec(path, leaf))
            total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return total

    def replicated_bytes(self, tree: Any) -> dict[str, int]:
        """Path -> bytes of the arrays that lie whole on every device."""
        return {path: _bytes(leaf) for path, leaf in _named(tree) if not any(self.spec(path, leaf))}

    def _placed(self, path: str, leaf: Any) -> tuple[PartitionSpec, list[Whole]]:
        names = partitioning.parameter_dimensions(path, len(leaf.shape))
        axes: list[str | None] = []
        notes: list[Whole] = []
        for size, name in zip(leaf.shape, names, strict=True):
            axis = PARAMETER_AXIS_OF.get(name or "")
            if axis is None or name is None or self.mesh.shape[axis] == 1:
                axes.append(None)
            elif size % self.mesh.shape[axis]:
                notes.append(Whole(path, name, size, axis, _bytes(leaf)))
                axes.append(None)
            else:
                axes.append(axis)
        if notes and not any(axes) and _bytes(leaf) > LARGEST_REPLICATED:
            raise ValueError(
                f"{'; '.join(map(str, notes))}: {_bytes(leaf) / 2**20:.0f} MB would lie whole on "
                "every device. Choose sizes of the mesh that divide it"
            )
        return PartitionSpec(*axes), notes


def _put_share(leaf: Any, place: NamedSharding) -> jax.Array:
    """An array that every process has, or one of the mesh, where it belongs on several processes.

    ``jax.device_put`` would first compare what the processes have.
    """
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.sharding == place:
            return leaf
        return jax.jit(lambda x: x, out_shardings=place)(leaf)
    return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), leaf


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _bytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
