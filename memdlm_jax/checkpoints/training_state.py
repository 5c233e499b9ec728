"""Training state on disk: Orbax for the arrays, our own digests for trust.

Orbax commits a step by renaming a temporary folder, in a bucket by a file that says so, so a
process killed while it saves leaves the step before usable. It detects neither a flipped byte nor
a changed dtype at restore; the digests written here do.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from memdlm_jax import processes, storage
from memdlm_jax.checkpoints import digests, orbax_s3
from memdlm_jax.checkpoints.trees import named

logger = logging.getLogger(__name__)

Json = Any
"""What ``json`` reads and writes: None, bool, int, float, str, list, dict."""


class ConfigMismatch(ValueError):
    """The checkpoint was written under another configuration."""


class NoUsableCheckpoint(RuntimeError):
    """There are checkpoints, but none of them can be trusted."""


class CorruptCheckpoint(RuntimeError):
    """A step on disk is not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
        step: optimiser steps taken.
        state: pytree of arrays, like the template.
        position: data position, batches consumed.
        extra: the caller's notes.
    """

    step: int
    state: Any
    position: int
    extra: dict[str, Json]


class Best(NamedTuple):
    """A step with the lowest validation loss, the first of equals.

    Attributes:
        step: ``None`` if no loss was measured.
        loss: infinite then.
    """

    step: int | None
    loss: float


class TrainingCheckpoints:
    """Checkpoints of one run in one folder: the newest ``keep_last`` and the best one."""

    def __init__(self, folder: str | Path, config: Mapping[str, Json], keep_last: int = 2):
        """Open or make ``folder``.

        Args:
            folder: where the steps lie.
            config: dotted name -> value of everything that must not change within a run (model
                shapes, optimiser, memory, digest of the data).
            keep_last: newest steps to keep, at least 1; 2 or more leave one to fall back to.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1")
        self.folder = storage.absolute(folder)
        if orbax_s3.is_on_s3(self.folder):
            orbax_s3.teach(self.folder)
        self.config = json.loads(json.dumps(dict(config), sort_keys=True))
        self._keep_last = keep_last
        self._mend_losses()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        keep = policies.AnyPreservationPolicy([policies.LatestN(self._keep_last), _KeepBest()])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_loss,  # without it Orbax would not write the metrics
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _mend_losses(self) -> None:
        """Write damaged files of losses anew; Orbax, which reads all at once, would fail.

        The loss comes from the step's notes. Where these have none, the step counts as one
        without validation. A step's arrays and notes are verified when it is restored.
        """
        with _failing_together(OSError, f"{self.folder}: "):
            if processes.is_first() and self.folder.is_dir():
                for step in self.folder.iterdir():
                    if step.name.isdigit() and _is_committed(step):
                        _mend_loss(step)

    def save(
        self,
        step: int,
        state: Any,
        position: int,
        *,
        loss: float | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> None:
        """Write one step; returns when the arrays are copied, the disk may still be busy.

        Args:
            step: optimiser steps taken, above that of every step saved before.
            state: pytree of arrays.
            position: data position, batches consumed.
            loss: validation loss of this state; the step with the lowest is kept as the best, the
                first of those that are equal.
            extra: notes that come back with ``restore``.
        """
        notes = {
            "config": self.config,
            "position": position,
            "loss": loss,
            "extra": dict(extra or {}),
            "arrays": {name: _describe(leaf) for name, leaf in named(state).items()},
        }
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            notes=ocp.args.JsonSave({"notes": notes, "sha256": _json_digest(notes)}),
        )
        # Orbax warns about steps without metrics once it tracks a best one.
        metrics = {"loss": math.inf if loss is None else loss}
        self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def wait(self) -> None:
        """Block until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release Orbax's threads."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> Best:
        """The best of the steps on disk, which is the one that is kept."""
        return _best({step: self._manager.metrics(step) for step in self.steps()})

    def restore_latest(self, template: Any, frees: Any = None) -> Restored | None:
        """Restore the newest step that passes verification.

        A step that does not pass is renamed to ``STEP.corrupt`` and the one before is tried.

        Args:
            template: pytree of arrays, or of ``jax.ShapeDtypeStruct`` with sharding: structure,
                shapes, dtypes and placement that the result must have.
            frees: pytree of arrays that are not needed once there is a checkpoint. They are deleted
                before memory for its arrays is allocated.

        Returns:
            The checkpoint, or ``None`` if the folder holds none.

        Raises:
            NoUsableCheckpoint: if there are steps but all of them are corrupt.
            ConfigMismatch: if configuration or arrays differ from the present ones, naming the
                first field that does.
        """
        steps = self.steps()[::-1]
        for step in steps:
            try:
                return self.restore(step, template, frees)
            except CorruptCheckpoint as error:
                logger.warning(
                    "checkpoint %d in %s is corrupt (%s); falling back to the one before",
                    step, self.folder, error,
                )  # fmt: skip
                self._set_aside(step)
        if steps:
            raise NoUsableCheckpoint(
                f"all checkpoints in {self.folder} are corrupt (steps {steps}, renamed to "
                "STEP.corrupt); move the folder away to start from the beginning"
            )
        return None

    def restore(self, step: int, template: Any, frees: Any = None) -> Restored:
        """Restore one step, verified; arguments are those of ``restore_latest``.

        Raises:
            NoUsableCheckpoint: if there is no such step.
            CorruptCheckpoint: if what is on disk is not what was saved.
            ConfigMismatch: as ``restore_latest``.
        """
        if step not in (found := self.steps()):
            raise NoUsableCheckpoint(f"step {step} is not in {self.folder}, only {found} are")
        arguments = ocp.args.Composite(notes=ocp.args.JsonRestore())
        with _failing_together(CorruptCheckpoint, "its notes: "):
            notes = _checked_notes(self._manager.restore(step, args=arguments)["notes"])
        self._check_config(step, notes["config"])
        _check_arrays(step, notes["arrays"], template)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        for leaf in jax.tree.leaves(frees):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        with _failing_together(CorruptCheckpoint):
            state = self._manager.restore(step, args=arguments)["state"]
        for name, leaf in named(state).items():
            saved = notes["arrays"][name]
            if _describe(leaf, next(kind for kind in _DIGESTS if kind in saved)) != saved:
                raise CorruptCheckpoint(f"the digest of array {name} is not the one saved")
        return Restored(step, state, notes["position"], notes["extra"])

    def _check_config(self, step: int, saved: dict[str, Json]) -> None:
        for name in sorted(saved.keys() | self.config.keys()):
            old, new = saved.get(name, "(absent)"), self.config.get(name, "(absent)")
            if old != new:
                raise ConfigMismatch(
                    f"checkpoint {step} in {self.folder} has {name}={old!r}, this run has "
                    f"{name}={new!r}; restore the value or choose another folder"
                )

    def _set_aside(self, step: int) -> None:
        """Rename a step so that neither Orbax nor a later run sees it."""
        self._manager.close()
        aside = self.folder / f"{step}.corrupt"
        for number in range(1, 1000):
            if not aside.exists():
                break
            aside = self.folder / f"{step}.corrupt.{number}"
        with _failing_together(OSError, f"{self.folder / str(step)} cannot be renamed: "):
            if processes.is_first():
                storage.move_folder(self.folder / str(step), aside)
        self._manager = self._open()


@contextlib.contextmanager
def _failing_together(kind: type[Exception], what: str = "") -> Iterator[None]:
    """Turn any error into one of this kind, on every process if one of them has it."""
    found: Exception | None = None
    try:
        yield
    except Exception as error:
        found = error
    said = [line for line in processes.gather(found and _first_line(found)) if line]
    if said:
        raise kind(what + said[0]) from found


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _is_committed(step: Path) -> bool:
    """Whether a step is whole; in a bucket a file says so, on a disk its name does."""
    return not storage.is_remote(step) or (step / "commit_success.txt").exists()


def _mend_loss(step: Path) -> None:
    """Check the file of a step's loss, and write it anew if it is damaged."""
    file = step / "metrics" / "metrics"
    try:
        _loss_of(storage.read_text(file))
        return
    except FileNotFoundError:
        damage = "missing"
    except ValueError as error:
        damage = f"damaged ({_first_line(error)})"
    loss = None
    # Damaged notes are found when the step is restored.
    with contextlib.suppress(
        FileNotFoundError, CorruptCheckpoint, ValueError, LookupError, TypeError
    ):
        stored = json.loads(storage.read_text(step / "notes" / "metadata"))
        loss = _checked_notes(stored).get("loss")
    if damage == "missing" and loss is None:
        return
    found = "its loss is not known" if loss is None else f"the notes have its loss, {loss}"
    logger.warning("%s is %s; written anew: %s", file, damage, found)
    file.parent.mkdir(exist_ok=True)
    with storage.replacing(file) as new:
        new.write_text(json.dumps({"loss": math.inf if loss is None else loss}))


def _loss_of(text: str) -> float:
    """The loss in a file of metrics; raises ValueError."""
    found = json.loads(text)
    loss = found.get("loss") if isinstance(found, dict) else None
    if not isinstance(loss, int | float) or isinstance(loss, bool) or math.isnan(loss):
        raise ValueError(f'must be {{"loss": NUMBER}}, is {text!r}')
    return loss


def _best(metrics: Mapping[int, Mapping[str, float] | None]) -> Best:
    losses = {step: _loss(found) for step, found in metrics.items() if found}
    measured = [(loss, step) for step, loss in losses.items() if loss < math.inf]
    loss, step = min(measured, default=(math.inf, None))
    return Best(step, loss)


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keep the step that ``best`` names; of equal losses Orbax's own keeps the last."""

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        best = _best({checkpoint.step: checkpoint.metrics for checkpoint in checkpoints}).step
        return [checkpoint.step == best for checkpoint in checkpoints]


_DIGESTS = {"digest": digests.digest, "sha256": digests.sha256}
"""Name in the notes -> what computes it; the last is what older checkpoints have."""


def _describe(leaf: Any, kind: str = "digest") -> dict[str, Json]:
    shape, dtype = list(np.shape(leaf)), str(leaf.dtype)
    return {"shape": shape, "dtype": dtype, kind: _DIGESTS[kind](leaf)}


def _json_digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _checked_notes(stored: dict[str, Json]) -> dict[str, Json]:
    if _json_digest(stored["notes"]) != stored["sha256"]:
        raise CorruptCheckpoint("their digest is not the one saved")
    return stored["notes"]


def _check_arrays(step: int, saved: dict[str, Json], template: Any) -> None:
    """Compare names, shapes and dtypes; Orbax would cast a differing dtype without a word."""
    expected = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for name, leaf in named(template).items()
    }
    for name in sorted(saved.keys() | expected.keys()):
        old = {k: v for k, v in saved.get(name, {}).items() if k not in _DIGESTS}
        new = expected.get(name, {})
        if old != new:
            raise ConfigMismatch(
                f"array {name} of checkpoint {step} is {old or 'absent'}, "
                f"this run has {new or 'none'}"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
