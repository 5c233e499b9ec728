"""Stages of a long job: a finished one is read back as long as its settings are the same."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Stage = tuple[Any, float]
"""Result of a stage, JSON-ready, and the seconds it took."""


def stage(path: Path, compute: Callable[[], Any]) -> Stage:
    """Compute a stage and note it in ``path``, or read back that note."""
    if path.exists():
        print(f"done before: {path}", file=sys.stderr, flush=True)
    else:
        print(f"working on {path} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        done = {"result": compute(), "seconds": time.monotonic() - start}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(done))
        temporary.replace(path)
    stored = json.loads(path.read_text())
    return stored["result"], stored["seconds"]


def digest(settings: Any) -> str:
    """Short digest of anything that JSON can hold: equal settings, equal stage."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
