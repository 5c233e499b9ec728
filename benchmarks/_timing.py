"""Times of several programs, taken in turn, and how they are shown."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


def in_turn(
    programs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every program, ``repeats`` times each.

    The programs take turns, so that a slow minute of the machine falls on all of them alike; the
    first ``warm_up`` rounds, compilation among them, do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(warm_up + repeats):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program())
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """How many times as long the first took, turn by turn: median and extremes."""
    each = np.divide(first, second)
    return {"median": float(np.median(each)), "least": float(each.min()), "most": float(each.max())}


def shown(ratio: Mapping[str, float], digits: int = 2) -> str:
    """A ratio with its spread over the turns."""
    low, high = ratio["least"], ratio["most"]
    return f"{ratio['median']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def machine() -> dict[str, Any]:
    """Where the times were taken."""
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def write_json(path: str, results: Mapping[str, Any]) -> None:
    """Write results with the machine they were taken on; no path writes nothing."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine()} | dict(results), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")
