"""How fast training goes, and a profiler trace of it."""

import contextlib
import time
from pathlib import Path

import jax

from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.state import TrainState
from memdlm_jax.typing import Batch


class Speed:
    """Tokens and matrix-product FLOPs per second between reports.

    Compilation, validation and saving do not count.
    """

    def __init__(self, steps: CompiledSteps):
        """Start the clock."""
        self._steps = steps
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self._tokens, self._flops, self._share = 0, 0, 0.0
        self._start, self._compiled = time.monotonic(), self._steps.compile_seconds

    def count(self, state: TrainState, batch: Batch) -> None:
        """Add one step on this batch."""
        flops, self._share = self._steps.inner_loop_share(state, batch)
        self._flops += flops
        self._tokens += int(batch.valid.sum())

    def since_last_report(self) -> dict[str, float]:
        """Rates since the last restart; call it when the device is done.

        ``inner_flops_share`` is the inner loop's share of the matrix products of the newest step,
        see ``CompiledSteps.inner_loop_share``.
        """
        compiling = self._steps.compile_seconds - self._compiled
        seconds = max(time.monotonic() - self._start - compiling, 1e-9)
        return {
            "speed/tokens_per_second": self._tokens / seconds,
            "speed/matmul_flops_per_second": self._flops / seconds,
            "speed/inner_flops_share": self._share,
        }


class Trace(contextlib.AbstractContextManager):
    """Profiler trace of a few steps, after two that warm up."""

    def __init__(self, folder: str | Path, start: int, steps: int):
        """Plan to record ``steps`` steps into ``folder/profile``; 0 records nothing."""
        self._folder = str(Path(folder) / "profile")
        self._first = start + 2
        self._last = self._first + steps if steps else -1
        self._running = False

    def after_step(self, step: int, state: TrainState) -> None:
        """Start or stop if it is time; waits for the device only then."""
        if step == self._first and self._last > 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step >= self._last:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *_) -> None:
        """Stop if still recording."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
