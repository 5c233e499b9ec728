"""The loop around the step: data, validation, checkpoints, metrics, resuming, stopping."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from memdlm_jax import processes, storage
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from memdlm_jax.progress import Progress
from memdlm_jax.training import feed, run_folder
from memdlm_jax.training.feed import Batches
from memdlm_jax.training.interruption import stop_on_sigterm
from memdlm_jax.training.metrics import MetricsWriter
from memdlm_jax.training.parallel import CompiledSteps, Placed
from memdlm_jax.training.sharding import MeshConfig
from memdlm_jax.training.speed import Speed, Trace
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import Metrics, StepSetup, metrics_of
from memdlm_jax.typing import Batch, Theta

logger = logging.getLogger(__name__)

_MUST_BE_FINITE = ("loss/memory_on", "gradient_norm", "parameter_norm")


class NotFinite(FloatingPointError):
    """The outer loss or its gradient is not finite."""


Probe = Callable[[Theta], Mapping[str, float]]
"""Measures theta in any other way: name -> value."""


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
        peak_flops: FLOPs a second of a device, for the utilisation; 0 takes what is published.
        count_flops: report FLOPs, utilisation and the inner loop's share of them. Counting traces
            the step up to twice more per batch length, which takes long for large models.
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
    peak_flops: float = 0.0
    count_flops: bool = True

    def __post_init__(self):
        if not self.output:
            raise ValueError("train.output='' must name a folder")
        try:
            storage.path(self.output)
        except ValueError as error:
            raise ValueError(f"train.output: {error}") from error
        for field in ("steps", "log_every", "save_every", "keep_last"):
            self._at_least(field, 1)
        for field in ("seed", "validation_seed", "validate_every", "profile_steps", "peak_flops"):
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

    state: TrainState = dataclasses.field(repr=False)
    best_step: int | None
    best_loss: float
    finished: bool


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        train: training batches; batches of equal length share one compilation. Of several processes
            each reads its own rows if the data is ``Divisible``; else it makes whole batches.
        validation: batches of host arrays, scored with the same masks every time.
        identity: dotted name -> JSON value of what a resumed run must share with the first.
    """

    train: Batches
    validation: Sequence[Batch] = ()
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(
    config: TrainConfig,
    setup: StepSetup,
    state: TrainState,
    data: RunData,
    probe: Probe | None = None,
    frozen: Theta = None,
    mesh: MeshConfig | None = None,
) -> Result:
    """Train to ``config.steps``, resuming from the newest good checkpoint of ``config.output``.

    A run that was stopped, even by SIGKILL, and started again ends in the same state to the bit as
    one that was not, on the same devices and mesh. SIGTERM saves and returns.

    Several processes (``processes.start``) do one run over the devices of all: each calls this with
    the same arguments and sees the same folder. Process 0 writes metrics, all write checkpoints.

    Args:
        config: settings of the loop.
        setup: of the step.
        state: before the first step; donated, and freed before a checkpoint takes its place.
        data: batches to train and to validate on, and their identity.
        probe: further numbers of ``state.theta`` to log at every validation.
        frozen: the part of theta that is not trained, see ``step.train_step``; it is in no
            checkpoint, so ``data.identity`` has to name it.
        mesh: see ``CompiledSteps``; a run may go on on another one.

    Returns:
        The last state, and which step validated best.

    Raises:
        FolderInUse: if another run works in ``config.output``.
        NotFinite: if loss or gradient of a step is not finite, naming the step.
        ConfigMismatch: if identity, validation or shapes are not those of the checkpoint.
    """
    with (
        run_folder.claimed(config.output),
        contextlib.closing(_checkpoints(config, setup, data)) as checkpoints,
    ):
        capacity_of = feed.capacity_for(data.train, data.validation)
        steps = CompiledSteps(setup, capacity_of, frozen, mesh)
        for note in steps.undivided(state.theta):
            logger.info("%s", note)
        progress = _restored(checkpoints, steps, state)
        with contextlib.closing(MetricsWriter(config.output, progress.step)) as writer:
            loop = _Loop(config, steps, data, checkpoints, writer, progress, probe)
            return loop.run()


def load_best(
    config: TrainConfig,
    setup: StepSetup,
    result: Result,
    data: RunData,
) -> Theta:
    """Theta of the step that validated best; the last one if nothing was validated.

    Args:
        config: as given to ``run``.
        setup: as given to ``run``.
        result: what ``run`` returned; if another step is loaded, its optimiser state is freed.
        data: as given to ``run``.

    Raises:
        FolderInUse: another run works in ``config.output``.
        CorruptCheckpoint, NoUsableCheckpoint: that step cannot be trusted, or is gone.
    """
    if result.best_step in (None, int(result.state.step)):
        return result.state.theta
    with (
        run_folder.claimed(config.output),
        contextlib.closing(_checkpoints(config, setup, data)) as checkpoints,
    ):
        last = result.state
        best = checkpoints.restore(result.best_step, last, frees=last.optimizer_state)
        return best.state.theta


def _checkpoints(config: TrainConfig, setup: StepSetup, data: RunData) -> TrainingCheckpoints:
    same = describe(setup) | {
        "train.seed": config.seed,
        # The best step is the best on these rows and masks only.
        "train.validation_seed": config.validation_seed,
        "validation.batches": feed.batches_digest(data.validation),
    }
    folder = storage.path(config.output) / "checkpoints"
    return TrainingCheckpoints(folder, same | dict(data.identity), config.keep_last)


def describe(setup: StepSetup) -> dict[str, Any]:
    """Dotted name -> JSON value of the settings that a resumed run must have in common.

    The inner loop is among them: its loss, optimiser, masking strategy and meta-gradient by name.
    """
    parts = {
        "model": setup.denoiser,
        "memory": None if setup.inner_loop is None else setup.inner_loop.config,
        "optimizer": setup.optimizer,
        "schedule": setup.schedule,
        "schedule.kind": type(setup.schedule).__name__,
        "corruption": setup.corruption,
        "corruption.kind": _name(setup.corruption),
        "loss": setup.loss,
    }
    return {name: value for prefix, part in parts.items() for name, value in _flat(prefix, part)}


def _name(part: Any) -> str | None:
    """Module and name of a function, or of an object's class."""
    if part is None:
        return None
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


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


def _restored(
    checkpoints: TrainingCheckpoints, steps: CompiledSteps, state: TrainState
) -> _Progress:
    """The newest good checkpoint, or the beginning."""
    restored = checkpoints.restore_latest(steps.abstract(state), frees=state)
    if restored is None:
        return _Progress(steps.place(state))
    logger.info("resuming after step %d of %s", restored.step, checkpoints.folder)
    best_step, best_loss = restored.extra["best"] or (None, math.inf)
    if best_step != (kept := checkpoints.best()).step:
        logger.warning(
            "step %s was the best, but it is gone or its loss is not known; of the steps that are "
            "left %s is the best", best_step, kept.step,
        )  # fmt: skip
        best_step, best_loss = kept.step, kept.loss
    return _Progress(restored.state, restored.position, best_step, best_loss)


@dataclasses.dataclass
class _Loop:
    """One process's run."""

    config: TrainConfig
    steps: CompiledSteps
    data: RunData
    checkpoints: TrainingCheckpoints
    writer: MetricsWriter
    progress: _Progress
    probe: Probe | None

    def run(self) -> Result:
        """Take the steps that are left."""
        c, p = self.config, self.progress
        self.speed = Speed(self.steps, c.peak_flops, c.count_flops)
        self.pending: list[tuple[int, Metrics]] = []
        self.lengths: set[int] = set()
        self.saved = p.step
        trace = Trace(c.output, p.step, c.profile_steps if processes.is_first() else 0)
        batches = feed.ahead(
            lambda step: feed.put(self.steps, self.data.train, step), p.step, c.steps
        )
        self.bar = Progress("training", c.steps, "step", done=p.step)
        with contextlib.closing(batches), stop_on_sigterm() as stop, trace, self.bar:
            while p.step < c.steps and not stop(p.step):
                self._take_step(next(batches))
                self.bar.update()
                trace.after_step(p.step, p.state)
                if self._reporting():
                    self._report()
            with self.bar.doing("saving"):
                if p.step > self.saved:
                    self._save()
                self.checkpoints.wait()
        return Result(p.state, p.best_step, p.best_loss, p.step >= c.steps)

    def _due(self, *periods: int) -> bool:
        """Whether the step just taken is the last, or a multiple of one of the periods."""
        step = self.progress.step
        return step == self.config.steps or any(n and step % n == 0 for n in periods)

    def _reporting(self) -> bool:
        c = self.config
        return self._due(c.log_every, c.save_every, c.validate_every)

    def _take_step(self, batch: Placed) -> None:
        """Dispatch one step; nothing here waits for the device."""
        c, p = self.config, self.progress
        key = jax.random.fold_in(jax.random.key(c.seed), p.step)
        length = batch.shapes.tokens.shape[-1]
        new = length not in self.lengths
        self.lengths.add(length)
        with self.bar.doing(f"compiling for rows of {length} tokens" if new else ""):
            self.speed.count(p.state, batch.shapes)
            p.step += 1
            p.state, metrics = self.steps.train(p.state, batch, key, self._reporting())
        self.pending.append((p.step, metrics))

    def _report(self) -> None:
        """Check, validate and save as is due; write one line of metrics."""
        taken = self._checked()
        metrics = taken[-1] if taken else {}
        metrics |= self.speed.since_last_report(int(sum(one["tokens"] for one in taken)))
        self.bar.update(0, loss=metrics["loss/memory_off"])
        loss, every = None, self.config.validate_every
        if self.data.validation and every and self._due(every):
            scores = self._validate()
            loss = scores["loss/memory_off"]
            if self.probe is not None:
                scores |= self.probe(self.progress.state.theta)
            metrics |= {f"validation/{name}": value for name, value in scores.items()}
        self.writer.write(self.progress.step, metrics)
        self._save_if_due(loss)
        self.speed.restart()

    def _checked(self) -> list[dict[str, float]]:
        """Fetch and return the pending metrics of each step; the state is good if this returns."""
        pending, self.pending = jax.device_get(self.pending), []
        for step, metrics in pending:
            found = {name: float(metrics[name]) for name in _MUST_BE_FINITE}
            if not all(map(math.isfinite, found.values())):
                raise NotFinite(
                    f"step {step}: {found}; nothing was saved since step {self.saved}. "
                    "Lower optimizer.learning_rate or set optimizer.clip_norm"
                )
        return [{name: float(value) for name, value in one.items()} for _, one in pending]

    def _validate(self) -> dict[str, float]:
        p, seed = self.progress, self.config.validation_seed
        with self.bar.doing("validating"):
            scores = validate(self.steps, p.state.theta, self.data.validation, seed)
        if not math.isfinite(scores["loss/memory_off"]):
            raise NotFinite(f"step {p.step}: validation loss is {scores}")
        return scores

    def _save_if_due(self, loss: float | None) -> None:
        """Save at the period, and whenever validation improves."""
        p = self.progress
        if loss is not None and loss < p.best_loss:
            p.best_step, p.best_loss = p.step, loss
        if p.best_step == p.step or self._due(self.config.save_every):
            self._save(loss)

    def _save(self, loss: float | None = None) -> None:
        self._checked()
        self.writer.publish()  # A resumed run finds the lines up to its step.
        p = self.progress
        best = None if p.best_step is None else [p.best_step, p.best_loss]
        self.checkpoints.save(p.step, p.state, position=p.step, loss=loss, extra={"best": best})
        self.saved = p.step


def validate(
    steps: CompiledSteps, theta: Theta, batches: Sequence[Batch], seed: int
) -> dict[str, float]:
    """Losses with and without memory over all batches, and the inner loop's metrics.

    Names and units are those of ``step.metrics_of``. Batch i is masked with a key that depends on
    ``seed`` and i alone.
    """
    key = jax.random.key(seed)
    sums = [
        steps.evaluate(theta, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(batches)
    ]
    total = jax.tree.map(lambda *leaves: sum(leaves), *jax.device_get(sums))
    return {name: float(value) for name, value in metrics_of(total).items()}
