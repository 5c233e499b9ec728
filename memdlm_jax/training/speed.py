"""How fast training goes, and a profiler trace of it."""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

import jax

from memdlm_jax import storage
from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.state import TrainState
from memdlm_jax.typing import Batch

PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOPs a second that makers publish, by the start of ``device_kind``."""


def peak_flops(device_kind: str) -> float | None:
    """What a device can do in a second; ``None`` if nobody says."""
    fitting = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


class Speed:
    """Tokens and matrix-product FLOPs per second between reports.

    Compilation, validation and saving do not count.
    """

    def __init__(self, steps: CompiledSteps, peak: float = 0.0, count_flops: bool = True):
        """Start the clock.

        Args:
            steps: count the FLOPs of their step.
            peak: FLOPs a second of one device, 0 to look it up.
            count_flops: whether to count them; else the step is not traced, and tokens are all
                that is reported.
        """
        self._steps = steps
        self._counts = count_flops
        devices = jax.devices()
        self._peak = (peak or peak_flops(devices[0].device_kind) or 0.0) * len(devices)
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self._flops, self._share = 0, 0.0
        self._start, self._compiled = time.monotonic(), self._steps.compile_seconds

    def count(self, state: TrainState, batch: Batch) -> None:
        """Add one step on this batch, arrays [b, l] or their shapes."""
        if not self._counts:
            return
        flops, self._share = self._steps.inner_loop_share(state, batch)
        self._flops += flops

    def since_last_report(self, tokens: int) -> dict[str, float]:
        """Rates since the last restart, in which ``tokens`` were read; call it when all is done.

        ``inner_flops_share`` is the inner loop's share of the matrix products of the newest step,
        see ``CompiledSteps.inner_loop_share``; ``model_flop_utilisation`` is the rate of model
        FLOPs over the peak of the devices, where that is known.
        """
        compiling = self._steps.compile_seconds - self._compiled
        seconds = max(time.monotonic() - self._start - compiling, 1e-9)
        rates = {"speed/tokens_per_second": tokens / seconds}
        if not self._counts:
            return rates
        rates["speed/matmul_flops_per_second"] = self._flops / seconds
        rates["speed/inner_flops_share"] = self._share
        if self._peak:
            rates["speed/model_flop_utilisation"] = self._flops / seconds / self._peak
        return rates


class Trace(contextlib.AbstractContextManager):
    """Profiler trace of a few steps, after two that warm up."""

    def __init__(self, folder: str | Path, start: int, steps: int):
        """Plan to record ``steps`` steps into ``folder/profile``; 0 records nothing."""
        self._folder = storage.path(folder) / "profile"
        self._first = start + 2
        self._last = self._first + steps if steps else -1
        self._running = False

    def after_step(self, step: int, state: TrainState) -> None:
        """Start or stop if it is time; waits for the device only then."""
        if step == self._first and self._last > 0:
            jax.block_until_ready(state)
            self._local = tempfile.mkdtemp() if storage.is_remote(self._folder) else None
            jax.profiler.start_trace(self._local or str(self._folder))
            self._running = True
        elif self._running and step >= self._last:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *_) -> None:
        """Stop if still recording."""
        if self._running:
            jax.profiler.stop_trace()
            if self._local is not None:
                storage.copy_folder(Path(self._local), self._folder)
                shutil.rmtree(self._local)
        self._running = False
