"""Figures as images that need no other file."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from memdlm_jax import storage

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
    lines = storage.path(metrics_file).read_text().splitlines()
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
    return _data_uri(figure)


def accuracy_curves(curves: Mapping[str, Curve], chance: float) -> str:
    """Draw right answers from memory against training steps, one line per run.

    Args:
        curves: run -> records with ``step`` and ``on``, the share of right answers.
        chance: of guessing.

    Returns:
        A data URI of a PNG image.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    for name, curve in curves.items():
        steps, values = zip(*((record["step"], record["on"]) for record in curve), strict=True)
        panel.plot(steps, values, marker="o", ms=3, label=name)
    panel.axhline(chance, ls=":", color="grey", label="guessing a value of the text")
    panel.set_ylim(-0.03, 1.03)
    panel.set_xlabel("optimiser step")
    panel.set_ylabel("right answers, text absent")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return _data_uri(figure)


def scores_by_length(cells: Sequence[Mapping[str, Any]]) -> str:
    """Draw the tasks' own scores against length: one panel per task, one line per system.

    Args:
        cells: of ``comparison.cell_results``. Seeds of one length are averaged; the bar of their
            mean is that of one seed over the root of their number.

    Returns:
        A data URI of a PNG image.
    """
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure = Figure(figsize=(4.2 * min(len(tasks), 3), 3.4 * -(-len(tasks) // 3)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(-(-len(tasks) // 3), min(len(tasks), 3), sharey=True, squeeze=False)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for panel, task in zip(panels.flat, tasks, strict=False):
        here = [cell for cell in cells if cell["task"] == task]
        lengths = sorted({cell["length"] for cell in here})
        places = range(len(lengths))
        score = next(iter(next(iter(here[0]["systems"].values()))))
        for index, name in enumerate(here[0]["systems"]):
            rows = [
                [c["systems"][name][score] for c in here if c["length"] == length]
                for length in lengths
            ]
            means = [_average(r["mean"] for r in row) for row in rows]
            low, high = ([_average(r["interval"][i] for r in row) for row in rows] for i in (0, 1))
            roots = [len(row) ** 0.5 for row in rows]
            bars = [
                [(m - a) / n for m, a, n in zip(means, low, roots, strict=True)],
                [(b - m) / n for m, b, n in zip(means, high, roots, strict=True)],
            ]
            # A little apart, so that equal scores show.
            at = [place + 0.06 * (index - 1) for place in places]
            panel.errorbar(at, means, bars, marker="o", ms=4, capsize=3, label=name)
        floors = [
            [c["floors"][score] for c in here if c["length"] == length and score in c["floors"]]
            for length in lengths
        ]
        if all(floors):
            averages = [_average(floor) for floor in floors]
            panel.plot(places, averages, ":", color="grey", label="chance")
        panel.set_xticks(places, ["no filler" if n == 0 else str(n) for n in lengths])
        panel.set_ylim(-0.03, 1.03)
        panel.set_title(task)
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("score")
    panels[0][0].legend(fontsize=8)
    return _data_uri(figure)


def exposure_curves(exposure: Mapping[str, Any]) -> str:
    """Draw what ``exposure_bias.evaluate`` found: losses, and their ratio with its interval.

    Returns:
        A data URI of a PNG image.
    """
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    losses, ratios = figure.subplots(1, 2)
    masked = exposure["mask_ratio"]
    for index, (name, found) in enumerate(exposure["systems"].items()):
        colour = f"C{index}"
        losses.plot(masked, found["static"], "--", color=colour, label=f"{name}, static")
        losses.plot(masked, found["sequential"], color=colour, label=f"{name}, sequential")
        ratios.plot(masked, found["ratio"], color=colour, label=name)
        ratios.fill_between(masked, *found["interval"], color=colour, alpha=0.15, lw=0)
    ratios.axhline(1, color="grey", lw=0.8)
    losses.set_ylabel("nats per masked token")
    ratios.set_ylabel("sequential / static")
    for panel in (losses, ratios):
        panel.invert_xaxis()  # Decoding goes from all masked to none.
        panel.set_xlabel("share of the response that is masked")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return _data_uri(figure)


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def heat_map(
    values: Sequence[Sequence[float | None]],
    depths: Sequence[Sequence[float]],
    lengths: Sequence[int],
    title: str = "",
) -> str:
    """Draw accuracy by depth of the needle, from top to bottom, and length, from left to right.

    Args:
        values: accuracies in [0, 1], [lengths][depths]; a cell that is ``None`` shows a dash.
        depths: (from, to) shares of the context, in [0, 1].
        lengths: tokens.
        title: above the figure.

    Returns:
        A data URI of a PNG image.

    Raises:
        ValueError: there is no cell, or the values do not fit the depths and lengths, or lie
            outside [0, 1].
    """
    if not lengths or not depths:
        raise ValueError(f"{len(lengths)} lengths and {len(depths)} depths: one at least is needed")
    if [len(row) for row in values] != [len(depths)] * len(lengths):
        raise ValueError(
            f"values has rows of {[len(row) for row in values]} cells; {len(lengths)} rows "
            f"(lengths) of {len(depths)} (depths) are needed"
        )
    for value in (value for row in values for value in row if value is not None):
        if not 0 <= value <= 1:
            raise ValueError(f"values has {value}, which must lie in [0, 1]")
    numbers = np.array(values, float).T  # None becomes NaN, which is not coloured.
    figure = Figure(
        figsize=(2.2 + 0.8 * len(lengths), 1.4 + 0.5 * len(depths)), layout="constrained"
    )
    panel = figure.subplots()
    image = panel.imshow(numbers, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(numbers):
        text = "–" if np.isnan(value) else f"{100 * value:.0f}"
        panel.text(column, row, text, ha="center", va="center", fontsize=9)
    panel.set_xticks(range(len(lengths)), list(map(str, lengths)))
    panel.set_yticks(range(len(depths)), [f"{100 * a:.0f}–{100 * b:.0f} %" for a, b in depths])
    panel.set_xlabel("length in tokens")
    panel.set_ylabel("depth of the needle")
    panel.set_title(title)
    figure.colorbar(image, label="accuracy")
    return _data_uri(figure)


def attention_profile(
    modes: Mapping[str, Sequence[Sequence[float]]], uniform: float, title: str = ""
) -> str:
    """Draw attention on the needle by layer: each head a point, their mean a line.

    Args:
        modes: name, such as ``off`` and ``on`` -> shares of attention in [0, 1], [layers][heads].
        uniform: share that uniform attention would give, a dashed line.
        title: above the figure.

    Returns:
        A data URI of a PNG image.

    Raises:
        ValueError: there is no mode, or they differ in their layers.
    """
    counts = {len(layers) for layers in modes.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"modes have {sorted(counts)} layers; one number, at least 1, is needed")
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    panel = figure.subplots()
    for index, (name, layers) in enumerate(modes.items()):
        colour, style = f"C{index}", ("-", "--", ":")[index % 3]
        for layer, heads in enumerate(layers):
            panel.plot([layer] * len(heads), heads, ".", ms=4, alpha=0.4, color=colour)
        means = [sum(heads) / len(heads) for heads in layers]
        panel.plot(range(len(layers)), means, style, color=colour, label=f"memory {name}")
    panel.axhline(uniform, ls="--", lw=0.8, color="grey", label="uniform attention")
    panel.set_xticks(range(counts.pop()))
    panel.set_xlabel("layer")
    panel.set_ylabel("share of attention")
    panel.set_title(title)
    panel.legend(fontsize=8)
    return _data_uri(figure)


def _data_uri(figure: Figure) -> str:
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
