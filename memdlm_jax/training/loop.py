"""The loop around the step: data, validation, checkpoints, metrics, resuming, stopping."""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import tqdm

from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from memdlm_jax.training.metrics import MetricsWriter
from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import Metrics, StepSetup
from memdlm_jax.typing import Batch, Theta

logger = logging.getLogger(__name__)


class NotFinite(FloatingPointError):
    """The outer loss or its gradient is not finite."""


class Batches(Protocol):
    """Training data: a pure function of the step."""

    def batch_at(self, step: int) -> Batch:
        """Return the batch of optimiser step ``step`` as numpy arrays [b, l]."""
        ...

    def target_capacity(self, length: int) -> int:
        """Most targets that a row of a batch of this length can have."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop; none of them changes a training step but ``seed``.

    Attributes:
        output: folder of checkpoints and metrics; running again with the same one resumes.
        steps: optimiser steps to take in all.
        seed: seed of every draw of the training steps.
        validation_seed: seed of the masks of validation, the same at every validation.
        log_every: steps between reports.
        validate_every: steps between validations; 0 for none.
        save_every: steps between checkpoints; the last step is always saved.
        keep_last: newest checkpoints to keep, beside the best.
        profile_steps: steps to record with ``jax.profiler`` once warmed up; 0 for none.
    """

    output: str
    steps: int
    seed: int = 0
    validation_seed: int = 1
    log_every: int = 10
    validate_every: int = 0
    save_every: int = 1000
    keep_last: int = 2
    profile_steps: int = 0

    def __post_init__(self):
        if not self.output:
            raise ValueError("train.output='' must name a folder")
        for field in ("steps", "log_every", "save_every", "keep_last"):
            self._at_least(field, 1)
        for field in ("seed", "validation_seed", "validate_every", "profile_steps"):
            self._at_least(field, 0)

    def _at_least(self, field: str, bound: int) -> None:
        value = getattr(self, field)
        if value < bound:
            raise ValueError(f"train.{field}={value!r} must be at least {bound}")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        state: the last state.
        best_step: step of the lowest memory-off validation loss, if any was measured.
        best_loss: that loss, nats per maskable token (weighted as in training).
        finished: False if a signal stopped the run before its last step.
    """

    state: TrainState
    best_step: int | None
    best_loss: float
    finished: bool


def run(
    config: TrainConfig,
    setup: StepSetup,
    state: TrainState,
    data: Batches,
    validation: Sequence[Batch] = (),
    identity: Mapping[str, Any] | None = None,
) -> Result:
    """Train to ``config.steps``, resuming from the newest good checkpoint of ``config.output``.

    A run that was stopped, even by SIGKILL, and started again ends in the same state to the bit
    as one that was not, on the same kind and number of devices. SIGTERM saves and returns.

    Args:
        config: settings of the loop.
        setup: of the step.
        state: before the first step; donated.
        data: training batches; batches of equal length share one compilation.
        validation: batches of host arrays, scored with the same masks every time.
        identity: dotted name -> JSON value of what a resumed run must have in common with the
            first (model, optimiser, digest of the data).

    Returns:
        The last state, and which step validated best.

    Raises:
        NotFinite: if loss or gradient of a step is not finite, naming the step.
        ValueError: from the checkpoint, if ``identity`` or the shapes of the state differ.
    """
    folder = Path(config.output)
    identity = describe(setup) | {"train.seed": config.seed} | dict(identity or {})
    checkpoints = TrainingCheckpoints(folder / "checkpoints", identity, config.keep_last)
    with contextlib.closing(checkpoints):
        steps = CompiledSteps(setup, data.target_capacity)
        progress = _restored(checkpoints, steps.place(state))
        with contextlib.closing(MetricsWriter(folder, progress.step)) as writer:
            return _Loop(config, steps, data, validation, checkpoints, writer, progress).run()


def describe(setup: StepSetup) -> dict[str, Any]:
    """Dotted name -> JSON value of the settings that a resumed run must have in common."""
    parts = {
        "model": setup.denoiser,
        "memory": setup.memory,
        "optimizer": setup.optimizer,
        "schedule": setup.schedule,
    }
    return {name: value for prefix, part in parts.items() for name, value in _flat(prefix, part)}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _flat(f"{prefix}.{field.name}", getattr(value, field.name))
    elif value is None or isinstance(value, bool | int | float | str | list | tuple):
        yield prefix, value


@dataclasses.dataclass
class _Progress:
    """Where a run stands; all of it is in a checkpoint."""

    state: TrainState
    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf


def _restored(checkpoints: TrainingCheckpoints, state: TrainState) -> _Progress:
    """The newest good checkpoint, or the beginning."""
    restored = checkpoints.restore_latest(state)
    if restored is None:
        return _Progress(state)
    logger.info("resuming after step %d of %s", restored.step, checkpoints.folder)
    best_step, best_loss = restored.extra["best_step"], restored.extra["best_loss"]
    best_loss = math.inf if best_loss is None else best_loss
    return _Progress(restored.state, restored.position, best_step, best_loss)


@dataclasses.dataclass
class _Loop:
    """One process's run."""

    config: TrainConfig
    steps: CompiledSteps
    data: Batches
    validation: Sequence[Batch]
    checkpoints: TrainingCheckpoints
    writer: MetricsWriter
    progress: _Progress

    def run(self) -> Result:
        """Take the steps that are left."""
        c, p = self.config, self.progress
        self.speed = Speed(self.steps)
        self.pending: list[tuple[int, Metrics]] = []
        self.saved = p.step
        trace = _Trace(c, p.step)
        with _stop_on_sigterm() as stop, trace, _bar(c.steps, p.step) as bar:
            while p.step < c.steps and not stop.is_set():
                self._take_step()
                bar.update()
                trace.after_step(p.step, p.state)
                if self._due(c.log_every, c.save_every, c.validate_every):
                    self._report(bar)
            if p.step > self.saved:
                self._save()
        self.checkpoints.wait()
        return Result(p.state, p.best_step, p.best_loss, p.step >= c.steps)

    def _due(self, *periods: int) -> bool:
        """Whether the step just taken is the last, or a multiple of one of the periods."""
        step = self.progress.step
        return step == self.config.steps or any(n and step % n == 0 for n in periods)

    def _take_step(self) -> None:
        """Dispatch one step; nothing here waits for the device."""
        c, p = self.config, self.progress
        batch = self.data.batch_at(p.step)
        key = jax.random.fold_in(jax.random.key(c.seed), p.step)
        self.speed.count(p.state, batch)
        p.step += 1
        report = self._due(c.log_every, c.save_every, c.validate_every)
        p.state, metrics = self.steps.train(p.state, batch, key, report)
        self.pending.append((p.step, metrics))

    def _report(self, bar: tqdm.tqdm) -> None:
        """Check, validate and save as is due; write one line of metrics."""
        metrics = self._checked() | self.speed.since_last_report()
        bar.set_postfix(loss=metrics["loss/memory_off"])
        loss = None
        if self.validation and self.config.validate_every and self._due(self.config.validate_every):
            scores = self._validate()
            loss = scores["memory_off"]
            metrics |= {f"validation/{name}": value for name, value in scores.items()}
        self.writer.write(self.progress.step, metrics)
        self._save_if_due(loss)
        self.speed.restart()

    def _checked(self) -> dict[str, float]:
        """Fetch the pending metrics and return the newest; the state is good if this returns."""
        pending, self.pending = jax.device_get(self.pending), []
        for step, metrics in pending:
            loss, norm = metrics["loss/memory_on"], metrics["gradient_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(
                    f"step {step}: loss={loss}, gradient_norm={norm}; nothing was saved since "
                    f"step {self.saved}. Lower optimizer.learning_rate or set optimizer.clip_norm"
                )
        return {name: float(value) for name, value in pending[-1][1].items()} if pending else {}

    def _validate(self) -> dict[str, float]:
        p = self.progress
        scores = validate(self.steps, p.state.theta, self.validation, self.config.validation_seed)
        if not math.isfinite(scores["memory_off"]):
            raise NotFinite(f"step {p.step}: validation loss is {scores['memory_off']}")
        return scores

    def _save_if_due(self, loss: float | None) -> None:
        """Save at the period, and whenever validation improves."""
        p = self.progress
        better = loss is not None and loss < p.best_loss
        if better:
            p.best_step, p.best_loss = p.step, loss
        if better or self._due(self.config.save_every):
            self._save(loss)

    def _save(self, loss: float | None = None) -> None:
        self._checked()
        p = self.progress
        best_loss = None if p.best_step is None else p.best_loss
        extra = {"best_step": p.best_step, "best_loss": best_loss}
        self.checkpoints.save(p.step, p.state, position=p.step, loss=loss, extra=extra)
        self.saved = p.step


def validate(
    steps: CompiledSteps, theta: Theta, batches: Sequence[Batch], seed: int
) -> dict[str, float]:
    """Losses with and without memory over all batches, in nats per maskable token.

    Batch i is masked with a key that depends on ``seed`` and i alone.
    """
    key = jax.random.key(seed)
    sums = [
        steps.evaluate(theta, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(batches)
    ]
    sums = jax.device_get(sums)
    maskable = max(sum(int(one.maskable) for one in sums), 1)
    on = sum(float(one.memory_on) for one in sums) / maskable
    off = sum(float(one.memory_off) for one in sums) / maskable
    return {"memory_on": on, "memory_off": off}


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


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """Turn SIGTERM into a flag; the step at hand is finished first."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar(total: int, done: int) -> tqdm.tqdm:
    """Progress with the time left; silent where the output is no terminal."""
    return tqdm.tqdm(total=total, initial=done, unit="step", disable=None, dynamic_ncols=True)


class _Trace(contextlib.AbstractContextManager):
    """Record ``profile_steps`` steps, after two that warm up."""

    def __init__(self, config: TrainConfig, start: int):
        self._folder = str(Path(config.output) / "profile")
        self._first = start + 2
        self._last = self._first + config.profile_steps if config.profile_steps else -1
        self._running = False

    def after_step(self, step: int, state: TrainState) -> None:
        if step == self._first and self._last > 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step >= self._last:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *_) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
