"""The step functions compiled for one device or several, in three ways.

``jit`` on one device; ``pmap`` on several of one process, every one with all parameters; ``jit``
over a mesh that divides rows, parameters and activations (``sharding``), also over the devices of
several processes.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Int

from memdlm_jax import partitioning
from memdlm_jax.training import flops, step
from memdlm_jax.training.sharding import Layout, MeshConfig, Whole
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import Metrics, StepSetup, Sums
from memdlm_jax.typing import Batch, Denoiser, Key, Theta

AXIS = "batch"


@runtime_checkable
class Configurable(Denoiser, Protocol):
    """A denoiser that says what its backward pass computes again."""

    def with_config(self, **changes: Any) -> Self:
        """The same model with some settings changed."""
        ...


@dataclasses.dataclass(frozen=True)
class Placed:
    """A batch that is on its way to the devices.

    Attributes:
        host: the batch as it was given, numpy arrays [b, l], or this process's rows of it.
        device: the whole batch on the device, or [devices, b / devices, l] divided among several.
    """

    host: Batch
    device: Batch

    @property
    def shapes(self) -> Batch:
        """Shapes and dtypes of the whole batch, [b, l]; of a context [t, m, k]."""

        def whole(host, device):
            rest = host.shape[1:]
            return jax.ShapeDtypeStruct((device.size // math.prod(rest), *rest), device.dtype)

        return jax.tree.map(whole, self.host, self.device)


def _abstract(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def mesh_for(mesh: MeshConfig | None) -> MeshConfig | None:
    """The mesh to use: among several processes, where none is given, rows over all devices."""
    return MeshConfig() if mesh is None and jax.process_count() > 1 else mesh


def most_targets(batch: Batch) -> int:
    """Most maskable tokens of any row of a batch of host arrays [b, l]."""
    return int(np.sum(batch.maskable, axis=-1).max(initial=0))


class _OneDevice:
    """``jit`` on one device."""

    axis_name: str | None = None

    def __init__(self, devices: Sequence[jax.Device]):
        (self._device,) = devices

    def place(self, tree: Any) -> Any:
        return jax.device_put(tree, self._device)

    def abstract(self, tree: Any) -> Any:
        return _abstract(tree, SingleDeviceSharding(self._device))

    def put(self, batch: Batch, accumulation: int) -> Batch:
        del accumulation
        return jax.device_put(batch, self._device)

    def wrap(self, function: Callable, donate: tuple[int, ...], extra: int, tree: Any) -> Any:
        del extra, tree
        return jax.jit(function, donate_argnums=donate)


class _Mapped:
    """``pmap``: every device holds all parameters and its share of the rows."""

    axis_name: str | None = AXIS

    def __init__(self, devices: Sequence[jax.Device]):
        self._devices = list(devices)
        self._mesh = Mesh(np.array(self._devices), (AXIS,))

    def place(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def abstract(self, tree: Any) -> Any:
        return _abstract(tree, NamedSharding(self._mesh, PartitionSpec()))

    def put(self, batch: Batch, accumulation: int) -> Batch:
        """[b, l] -> [devices, b / devices, l]."""
        del accumulation
        count = len(self._devices)
        for rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
            if rows % count:
                raise ValueError(f"a batch of {rows} rows cannot be split over {count} devices")
        parts = jax.tree.map(lambda x: np.reshape(x, (count, -1, *x.shape[1:])), batch)
        return jax.device_put(parts, NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def wrap(self, function: Callable, donate: tuple[int, ...], extra: int, tree: Any) -> Any:
        del tree
        return jax.pmap(
            function, AXIS, in_axes=(None, None, 0, *(None,) * extra), out_axes=None,
            devices=self._devices, donate_argnums=donate,
        )  # fmt: skip


class _OnMesh:
    """``jit`` over a mesh: the step of one device, which the compiler divides."""

    axis_name: str | None = None

    def __init__(self, layout: Layout):
        self.layout = layout

    def place(self, tree: Any) -> Any:
        return self.layout.place(tree)

    def abstract(self, tree: Any) -> Any:
        return self.layout.abstract(tree)

    def put(self, batch: Batch, accumulation: int) -> Batch:
        rows, length = batch.tokens.shape
        self.layout.check_batch(rows, length, accumulation)
        return self.layout.put_batch(batch)

    def put_rows(self, part: Batch, accumulation: int) -> Batch:
        """This process's rows to the devices."""
        here, length = part.tokens.shape
        self.layout.check_batch(self.layout.rows_in_all(here), length, accumulation)
        return self.layout.put_rows(part)

    def wrap(self, function: Callable, donate: tuple[int, ...], extra: int, tree: Any) -> Any:
        del extra
        return compile_ready(self.layout, function, donate, tree)


def compile_ready(layout: Layout, function: Callable, donate: tuple[int, ...], tree: Any) -> Any:
    """``jax.jit`` of a step over a mesh, not yet traced.

    Args:
        layout: of the mesh, which may be one of a topology without hardware.
        function: (tree, ...) -> (new tree, metrics) if it donates, else -> sums.
        donate: positions of arguments whose memory is reused.
        tree: the first argument, arrays or ``jax.ShapeDtypeStruct``.
    """

    def on_mesh(*arguments):
        with partitioning.context(layout.mesh):
            return function(*arguments)

    whole = layout.replicated
    places = (layout.shardings(tree), whole) if donate else whole
    return jax.jit(on_mesh, donate_argnums=donate, out_shardings=places)


class CompiledSteps:
    """Train and validation steps, compiled once per batch shape.

    Attributes:
        compile_seconds: wall time spent tracing and compiling so far.
    """

    def __init__(
        self,
        setup: StepSetup,
        capacity_of: Callable[[int], int],
        frozen: Theta = None,
        mesh: MeshConfig | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepare for the devices.

        Args:
            setup: of the step; its ``capacity`` and ``axis_name`` are set here.
            capacity_of: row length -> target slots of a row.
            frozen: the part of theta that is not trained, see ``step.train_step``.
            mesh: how to divide parameters and rows; ``None`` is as ``mesh_for`` has it: ``jit`` on
                one device and ``pmap`` on more.
            devices: to run on, all of all processes if not given.

        Raises:
            ValueError: the mesh does not fit the devices, see ``MeshConfig.sizes``; or ``frozen``,
                see ``Layout.spec``.
        """
        self._setup, self._capacity_of = setup, capacity_of
        devices, mesh = jax.devices() if devices is None else list(devices), mesh_for(mesh)
        self._way: _OneDevice | _Mapped | _OnMesh
        if mesh is not None:
            self._way = _OnMesh(Layout(mesh.build(devices)))
        else:
            self._way = _OneDevice(devices) if len(devices) == 1 else _Mapped(devices)
        self._compiled: dict[tuple, Callable] = {}
        self._flops: dict[tuple, tuple[int, float]] = {}
        self.compile_seconds = 0.0
        self._frozen = self.place(frozen)

    def place(self, state: Any) -> Any:
        """Put a pytree on all devices: a whole copy on each, or on a mesh each its share."""
        return self._way.place(state)

    def abstract(self, state: Any) -> Any:
        """What ``place`` would return, as ``jax.ShapeDtypeStruct``; nothing is allocated."""
        return self._way.abstract(state)

    def undivided(self, theta: Theta) -> list[Whole]:
        """Dimensions of trained and frozen parameters that no device has less than all of.

        Only those for which the mesh has an axis, see ``Layout.whole``.
        """
        if not isinstance(self._way, _OnMesh):
            return []
        return [note for tree in (theta, self._frozen) for note in self._way.layout.whole(tree)]

    def put(self, batch: Batch) -> Placed:
        """Start to move a batch of host arrays [b, l] to the devices; waits for nothing.

        May be called in another thread while a step runs.

        Raises:
            ValueError: a row has more maskable tokens than target slots, or the rows cannot be
                divided among the devices.
        """
        self._check_capacity(batch)
        return Placed(batch, self._way.put(batch, self._setup.optimizer.accumulation))

    def rows_here(self, count: int) -> Int[np.ndarray, "r"]:
        """Which rows of a batch of ``count`` this process has to give to ``put_rows``, ascending.

        Raises:
            ValueError: so many rows cannot be divided among the devices.
        """
        if isinstance(self._way, _OnMesh):
            return self._way.layout.rows_here(count)
        return np.arange(count)

    def put_rows(self, part: Batch) -> Placed:
        """``put`` of a batch of which this process has only its rows, see ``rows_here``."""
        if not isinstance(self._way, _OnMesh):
            return self.put(part)
        self._check_capacity(part)
        return Placed(part, self._way.put_rows(part, self._setup.optimizer.accumulation))

    def train(
        self, state: TrainState, batch: Batch | Placed, key: Key, report: bool
    ) -> tuple[TrainState, Metrics]:
        """``step.train_step`` on host arrays [b, l] or on what ``put`` gave; donates ``state``.

        Raises:
            ValueError: see ``put``.
        """
        return self._run(step.train_step, (0,), state, batch, key, np.bool_(report))

    def evaluate(self, theta: Theta, batch: Batch | Placed, key: Key) -> Sums:
        """``step.eval_step`` on host arrays [b, l] or on what ``put`` gave; raises as ``put``."""
        return self._run(step.eval_step, (), theta, batch, key)

    def inner_loop_share(self, state: TrainState, batch: Batch) -> tuple[int, float]:
        """Matrix-product FLOPs of one step on this batch, and the inner loop's share of them.

        Counted on the traced step (see ``flops``) of one device that holds the whole batch, the
        memory-off loss and what remat computes again left out: model FLOPs. The share is
        1 - plain / with memory, where plain is the same step without an inner loop. Traced once
        per batch shape; ``batch`` may hold ``jax.ShapeDtypeStruct``.
        """
        name = _shapes(batch)
        if name not in self._flops:
            start = time.monotonic()
            setup = dataclasses.replace(self._setup_for(batch.tokens.shape[1]), axis_name=None)
            if isinstance(setup.denoiser, Configurable):
                denoiser = setup.denoiser.with_config(remat="none", vocab_chunk=0)
                setup = setup.with_denoiser(denoiser)
            without = dataclasses.replace(setup, inner_loop=None)
            plain = _count(without, state, self._frozen, batch)
            full = plain if setup.inner_loop is None else _count(setup, state, self._frozen, batch)
            self._flops[name] = full, 1 - plain / full if full else 0.0
            self.compile_seconds += time.monotonic() - start
        return self._flops[name]

    def _setup_for(self, length: int) -> StepSetup:
        capacity = self._capacity_of(length)
        axis_name = self._way.axis_name
        return dataclasses.replace(self._setup, capacity=capacity, axis_name=axis_name)

    def _check_capacity(self, batch: Batch) -> None:
        """Refuse a batch that the compiled loss would silently drop targets of."""
        length, most = batch.tokens.shape[1], most_targets(batch)
        if most > (capacity := self._capacity_of(length)):
            raise ValueError(
                f"a row of a batch of length {length} has {most} maskable tokens, more than its "
                f"{capacity} target slots: target_capacity({length}) must be at least {most}"
            )

    def _run(self, function: Callable, donate: tuple[int, ...], tree, given, *rest):
        batch = (given if isinstance(given, Placed) else self.put(given)).device
        name = (function, _shapes(batch))
        if name not in self._compiled:
            start = time.monotonic()
            setup = self._setup_for(batch.tokens.shape[-1])

            def bound(tree, frozen, batch, *rest):
                return function(tree, batch, *rest, setup=setup, frozen=frozen)

            wrapped = self._way.wrap(bound, donate, len(rest), tree)
            self._compiled[name] = wrapped.lower(tree, self._frozen, batch, *rest).compile()
            self.compile_seconds += time.monotonic() - start
        return self._compiled[name](tree, self._frozen, batch, *rest)


def _shapes(batch: Batch) -> tuple:
    """What tells programs for batches apart."""
    return (jax.tree.structure(batch), *(leaf.shape for leaf in jax.tree.leaves(batch)))


def _count(setup: StepSetup, state: TrainState, frozen: Theta, batch: Batch) -> int:
    def one(state, frozen, batch, key):
        return step.train_step(state, batch, key, False, setup=setup, frozen=frozen)

    return flops.matmul_flops(one, state, frozen, batch, jax.random.key(0))
