"""Loss curves as an image that needs no other file."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Curve = Sequence[Mapping[str, float | None]]
"""Records of one run, each with ``step`` and the losses that were measured then."""

SERIES = {
    "loss/memory_on": ("training, memory on", "tab:orange"),
    "loss/memory_off": ("training, memory off", "tab:blue"),
    "validation/loss/memory_on": ("validation, memory on", "tab:red"),
    "validation/loss/memory_off": ("validation, memory off", "tab:green"),
}


def read_curve(metrics_file: str | Path) -> list[dict[str, float | None]]:
    """Step and losses of every line of a run's ``metrics.jsonl``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    lines = Path(metrics_file).read_text().splitlines()
    wanted = ("step", *SERIES)
    return [{k: v for k, v in json.loads(line).items() if k in wanted} for line in lines]


def loss_curves(curves: Mapping[str, Curve]) -> str:
    """Draw one panel per run, memory on and memory off in each, on common axes.

    Training losses are noisy (the weight is 1/t): points are single steps, lines their running
    mean over a tenth of the run.

    Returns:
        A data URI of a PNG image.
    """
    figure = Figure(figsize=(5.2 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        for key, (label, colour) in SERIES.items():
            points = [(record["step"], record[key]) for record in curve if _has(record, key)]
            if points:
                _draw(panel, points, label, colour, smooth=key.startswith("loss/"))
        panel.set_title(name)
        panel.set_xlabel("optimiser step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("nats per maskable token")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _has(record: Mapping[str, float | None], key: str) -> bool:
    return record.get(key) is not None


def _draw(panel, points: Sequence[tuple], label: str, colour: str, smooth: bool) -> None:
    steps, values = zip(*points, strict=True)
    if not smooth:
        panel.plot(steps, values, marker="o", ms=3, color=colour, label=label)
        return
    width = max(1, len(values) // 10)
    means = [
        sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
    panel.plot(steps, values, ".", ms=2, alpha=0.35, color=colour)
    # Without memory the two curves are one: dashes let the other show.
    style = "--" if label.endswith("off") else "-"
    panel.plot(steps, means, style, color=colour, label=label)
