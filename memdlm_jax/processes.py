"""Several processes that do one job: how they find each other, what they tell each other.

Every function is the identity, or nothing, where there is only one process.
"""

import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_PATIENCE = 3600
"""Seconds that a process which is done waits for one that still writes a large checkpoint.

One that is dead is missed by its heartbeat long before."""

T = TypeVar("T")
R = TypeVar("R")

_GATHERED_AT_ONCE = 1 << 28
"""Bytes."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How a process finds the others; without a field set it is alone.

    Attributes:
        coordinator: HOST:PORT of process 0, as all processes reach it.
        num_processes: of the whole job.
        process_id: of this process, in [0, num_processes).
        auto: take all three from what started the job, as JAX does: Cloud TPU, SLURM, Open MPI,
            Kubernetes (with the package ``kubernetes``), or ``JAX_COORDINATOR_ADDRESS``.
        heartbeat_seconds: after this long without a sign of life from one process all others end.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    auto: bool = False
    heartbeat_seconds: int = 100

    def __post_init__(self):
        given = {n: getattr(self, n) for n in ("coordinator", "num_processes", "process_id")}
        named = [f"distributed.{name}={v!r}" for name, v in given.items() if v is not None]
        if self.heartbeat_seconds < 1:
            raise ValueError(
                f"distributed.heartbeat_seconds={self.heartbeat_seconds} must be at least 1"
            )
        if self.auto and named:
            raise ValueError(f"{named[0]} must be empty with distributed.auto=True, which finds it")
        if missing := [f"distributed.{n}" for n, v in given.items() if v is None and named]:
            raise ValueError(f"{named[0]} needs {' and '.join(missing)} too")
        if named:
            self._check()

    def _check(self) -> None:
        assert self.coordinator is not None
        assert self.num_processes is not None and self.process_id is not None
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"distributed.coordinator={self.coordinator!r} must be HOST:PORT")
        if self.num_processes < 1:
            raise ValueError(f"distributed.num_processes={self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"distributed.process_id={self.process_id} must lie in [0, "
                f"distributed.num_processes={self.num_processes})"
            )


def start(config: DistributedConfig) -> None:
    """Join the others, before anything is computed; does nothing alone, or the second time.

    Waits up to five minutes for all processes. From then on JAX notes SIGTERM, which no longer ends
    the process, for the loop of training to ask for, see ``training.interruption``.

    Raises:
        ValueError: ``auto`` finds nothing that started this process as one of several.
        RuntimeError: JAX has already looked for devices.
    """
    if not (config.auto or config.coordinator) or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id,
            # What is given is not completed by what an environment says.
            cluster_detection_method=None if config.auto else "deactivate",
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=_PATIENCE,
        )  # fmt: skip
    except ValueError as error:
        if not config.auto:
            raise
        raise ValueError(
            f"distributed.auto=True: nothing that JAX knows started this process as one of several "
            f"({error}); give distributed.coordinator=HOST:PORT, distributed.num_processes and "
            "distributed.process_id"
        ) from error


def end_at_sigterm() -> None:
    """Let SIGTERM end this process again after ``start``, where no loop asks for it."""
    if several():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def several() -> bool:
    """Whether there are other processes; looks for devices."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which writes what one process writes; looks for devices."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; every process has to call this.

    Args:
        value: anything that can be pickled, below 2 GiB.
    """
    if not several():
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    # A power of two: few shapes, few compilations.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def wait_for_all() -> None:
    """Return when every process has called this."""
    gather(None)


def shared_out(pieces: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
    """What ``work`` returns for each piece, in their order, each done by one process.

    Of n processes each does every n-th piece, one at a time, and is told of the others' results.

    Args:
        pieces: the same in every process.
        work: called for the pieces of this process, in their order; what it returns is pickled.
    """
    count, own = jax.process_count(), jax.process_index()
    for start in range(0, len(pieces), count):
        turn = pieces[start : start + count]
        done = gather([work(piece) for piece in turn[own : own + 1]])
        for results in done[: len(turn)]:
            yield results[0]


def first_alone(work: Callable[[], T]) -> T:
    """What ``work`` returns, called by process 0 before the others: it may leave files to find."""
    if is_first():
        done = work()
        wait_for_all()
    else:
        wait_for_all()
        done = work()
    return done


def whole(leaf: Any) -> np.ndarray:
    """An array on the host, also where this process holds only a share of it.

    It is gathered in slices of some 256 MiB, since a device may have no room for all of it. Every
    process has to call this, for the same arrays in the same order.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    axis = _undivided_axis(leaf)
    size = leaf.shape[axis]
    count = max(1, min(size, _GATHERED_AT_ONCE * size // leaf.nbytes))
    found = np.empty(leaf.shape, leaf.dtype)
    for first in range(0, size, count):
        # The last slice begins earlier where too little is left: one program for all.
        first = min(first, size - count)
        part = multihost_utils.process_allgather(_slice(leaf, first, count, axis), tiled=True)
        found[(slice(None),) * axis + (slice(first, first + count),)] = part
    return found


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(leaf: jax.Array, first: int, count: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, first, count, axis)


def _undivided_axis(leaf: jax.Array) -> int:
    """The longest axis that every device has whole; the first if there is none."""
    spec = [*getattr(leaf.sharding, "spec", ()), *(None,) * leaf.ndim][: leaf.ndim]
    free = [axis for axis in range(leaf.ndim) if spec[axis] is None]
    return max(free, key=lambda axis: (leaf.shape[axis], -axis), default=0)


def abort(message: str) -> NoReturn:
    """End this process at once, so that the others do not wait for it but fail too.

    A regular exit would wait for them, and they for this process's part of what they compute.
    """
    print(f"process {jax.process_index()}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """``abort`` at an error if there are other processes."""
    try:
        yield
    except Exception:
        if not several():
            raise
        abort(traceback.format_exc())
