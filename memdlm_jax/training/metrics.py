"""Metrics to JSON lines and TensorBoard."""

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from memdlm_jax import processes, storage

PUBLISH_SECONDS = 60.0


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard event files of one folder.

    Of several processes the first does; in the others it does nothing. Where the folder is in a
    bucket, the files are written in a temporary folder and copied by ``publish``, which is called
    once in ``PUBLISH_SECONDS`` too.
    """

    def __init__(self, folder: str | Path, step: int = 0):
        """Open for a run that continues after ``step``; lines beyond it are cut off."""
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._folder = folder = storage.path(folder)
        self._local: tempfile.TemporaryDirectory | None = None
        self._published = time.monotonic()
        if storage.is_remote(folder):
            self._local = tempfile.TemporaryDirectory()
            old, folder = folder / "metrics.jsonl", Path(self._local.name)
            if old.exists():
                (folder / "metrics.jsonl").write_bytes(old.read_bytes())
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        cut_after(self.path, step)
        self._file = self.path.open("a")
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line and its curves; values that are not finite become null in JSON."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if time.monotonic() - self._published > PUBLISH_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Let a folder in a bucket have what was written; elsewhere it has it already."""
        if self._writes and self._local is not None:
            self._board.flush()
            storage.copy_folder(Path(self._local.name), self._folder)
            self._published = time.monotonic()

    def close(self) -> None:
        """Flush and close both."""
        if not self._writes:
            return
        self._file.close()
        self._board.close()
        self.publish()
        if self._local is not None:
            self._local.cleanup()


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a line that a killed process left unfinished."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if 0 <= _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
