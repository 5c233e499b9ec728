"""Stages of a long job: a finished one is read back as long as its settings are the same.

Of several processes all compute a stage, and the first notes it.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memdlm_jax import processes, storage

Stage = tuple[Any, float]
"""Result of a stage, JSON-ready, and the seconds it took."""


def stage(path: Path, compute: Callable[[], Any]) -> Stage:
    """Compute a stage and note it in ``path``, or read back that note."""
    first = processes.is_first()
    # What the first process finds, all go by.
    noted = processes.gather(path.read_text() if first and path.exists() else None)[0]
    if noted is None:
        if first:
            print(f"working on {path} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        noted = json.dumps({"result": compute(), "seconds": time.monotonic() - start})
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage.replacing(path) as file:
                file.write_text(noted)
    elif first:
        print(f"done before: {path}", file=sys.stderr, flush=True)
    stored = json.loads(noted)
    return stored["result"], stored["seconds"]


def digest(settings: Any) -> str:
    """Short digest of anything that JSON can hold: equal settings, equal stage."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
