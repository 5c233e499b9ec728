"""What the loop reads: batches by step, made and moved to the devices ahead of their step."""

import collections
import concurrent.futures
import hashlib
from collections.abc import Callable, Generator, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from memdlm_jax import processes
from memdlm_jax.training.parallel import CompiledSteps, Placed, most_targets
from memdlm_jax.typing import Batch


class Batches(Protocol):
    """Training data: the batch of a step is a pure function of the step."""

    def batch_at(self, step: int) -> Batch:
        """Return the batch of optimiser step ``step`` as numpy arrays [b, l]."""
        ...

    def target_capacity(self, length: int) -> int:
        """Most targets that a row of a batch of this length can have."""
        ...


@runtime_checkable
class Divisible(Batches, Protocol):
    """Training data that can be read in part."""

    def part_at(
        self, step: int, choose: Callable[[int], Int[np.ndarray, "r"]]
    ) -> Batch:  # fmt: skip
        """Some rows of the batch of a step: those that ``choose`` names, given their number."""
        ...


def capacity_for(data: Batches, validation: Sequence[Batch]) -> Callable[[int], int]:
    """Row length -> target slots that hold the rows of training and of validation.

    The two can differ: a validation row may have a longer response than any training row.
    """
    needed: collections.Counter[int] = collections.Counter()
    for batch in validation:
        length = batch.tokens.shape[1]
        needed[length] = max(needed[length], most_targets(batch))
    return lambda length: max(data.target_capacity(length), needed[length])


def put(steps: CompiledSteps, data: Batches, step: int) -> Placed:
    """The batch of a step, on its way to the devices.

    Of several processes each brings its own rows, and waits for no other.
    """
    if processes.several() and isinstance(data, Divisible):
        return steps.put_rows(data.part_at(step, steps.rows_here))
    return steps.put(data.batch_at(step))


def ahead(
    batch_at: Callable[[int], Placed], start: int, stop: int, depth: int = 2
) -> Generator[Placed, None, None]:
    """Batches of steps ``start .. stop - 1``, ``depth`` of them made in a thread meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(batch_at, i) for i in range(start, stop)[:depth])
        for upcoming in range(start + depth, stop + depth):
            batch = waiting.popleft().result()
            if upcoming < stop:
                waiting.append(pool.submit(batch_at, upcoming))
            yield batch


def batches_digest(batches: Sequence[Batch]) -> str:
    """Sha256 of the content of batches of host arrays, in their order."""
    found = hashlib.sha256()
    for batch in batches:
        for leaf in jax.tree.leaves(batch):
            found.update(f"{leaf.shape} {leaf.dtype} ".encode())
            found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()
