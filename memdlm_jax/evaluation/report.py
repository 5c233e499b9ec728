"""One folder's worth of evidence: ``results.json``, and ``report.html`` rendered from it alone."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from memdlm_jax import storage
from memdlm_jax.evaluation import figures, retrieval

PARTS = (
    "written",
    "needles",
    "tasks",
    "likelihood",
    "exposure",
    "retrieval",
    "curves",
    "samples",
    "history",
)
"""Parts of the results that may be missing."""

LEVEL = 0.05
"""A difference is called detected if its p-value, adjusted for the number of tests, is below."""


def write(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write ``results.json`` and ``report.html`` and return the latter's path.

    Args:
        folder: made if missing; both files in it are replaced.
        results: JSON-ready. ``title`` and ``run`` (``command``, ``config``, ``versions``,
            ``seconds`` by stage, ``notes``) are always shown; shown where present are ``written``
            (``table``, rows of ``experiments.written_memory``; ``curves``, run -> records with
            ``step`` and ``on``; ``chance``), ``needles``
            (``needles.evaluate``), ``tasks`` (``cells`` of ``comparison.cell_results`` and
            ``comparisons``), ``exposure`` (``exposure_bias.evaluate``), ``retrieval``
            (``retrieval.evaluate``), ``likelihood`` (``likelihood.evaluate``), ``curves`` (run ->
            ``figures.read_curve``), ``samples`` (``samples.sample_replies``) and ``history``
            (``samples.denoising_history``).
    """
    folder = storage.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Rendered first: a failure leaves an older pair of files as it was.
    page = render(results)
    _replace(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    _replace(folder / "report.html", page)
    return folder / "report.html"


def _replace(path: Path, text: str) -> None:
    with storage.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """The report as one HTML page without any reference to another file or host."""
    source = importlib.resources.files(__package__) / "report.html.j2"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "interval": interval, "signed": signed, "p": p_text}
    curves, exposure = results.get("curves"), results.get("exposure")
    written = results.get("written")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        results=dict.fromkeys(PARTS) | dict(results),
        findings=findings(results),
        figure=figures.loss_curves(curves) if curves else None,
        written_figure=figures.accuracy_curves(written["curves"], written["chance"])
        if written
        else None,
        needle_figures=_needle_figures(results.get("needles")),
        attention_figures=_attention_figures(results.get("retrieval")),
        exposure_figure=figures.exposure_curves(exposure) if exposure else None,
        exposure_rows=_some(len(exposure["mask_ratio"])) if exposure else (),
        task_figures=_task_figures(results["tasks"]) if results.get("tasks") else None,
        config=json.dumps(results["run"]["config"], indent=1),
    )


def _needle_figures(found: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Accuracy by depth and length of every system, where there are several lengths."""
    cells = found["cells"] if found else []
    if len({cell["length"] for cell in cells}) < 2:
        return []
    maps = []
    for name in cells[0]["systems"]:
        parts = ((cell["length"], cell["systems"][name]["by_depth"]) for cell in cells)
        table = retrieval.by_depth_and_length(parts)
        values = [[part["value"] for part in row] for row in table["cells"]]
        title = f"needles, {name}"
        source = figures.heat_map(values, table["depths"], table["lengths"], title)
        maps.append({"title": title, "source": source})
    return maps


def _attention_figures(probed: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Attention on the needle by layer, for every cell and system it was measured in."""
    found = []
    for cell in probed["cells"] if probed else ():
        for name, system in cell["systems"].items():
            if "attention" in system:
                part = system["attention"]["parts"]["needle"]
                title = f"{name}, {cell['length']} tokens: attention on the needle"
                modes = {mode: part[mode]["mean"] for mode in ("off", "on") if mode in part}
                source = figures.attention_profile(modes, part["uniform"], title)
                found.append({"title": title, "source": source})
    return found


def _some(steps: int) -> list[int]:
    """At most seven steps, evenly apart, the last one among them."""
    return sorted({round(i * (steps - 1) / 6) for i in range(7)})


def _task_figures(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Score against length, and by depth and length where questions ask for one place."""
    cells = tasks["cells"]
    maps = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        for system in cells[0]["systems"]:
            here = [cell for cell in cells if cell["task"] == task]
            parts = [(c["length"], c["systems"][system].get("by_depth")) for c in here]
            if all(found for _, found in parts):
                title = f"{task}, {system}"
                maps.append({"title": title, "source": _depth_map(parts, title)})
    return {"lengths": figures.scores_by_length(cells), "depths": maps}


def _depth_map(parts: Sequence[tuple[int, Any]], title: str) -> str:
    """Heat map of the mean score by depth; cells of one length are of different questions."""
    lengths = sorted({length for length, _ in parts})
    divisions = [(part["from"], part["to"]) for part in parts[0][1]]

    def mean(length: int, index: int) -> float | None:
        here = [found[index] for at, found in parts if at == length]
        n = sum(part["n"] for part in here)
        return sum(part["n"] * part["mean"] for part in here if part["n"]) / n if n else None

    values = [[mean(length, index) for index in range(len(divisions))] for length in lengths]
    return figures.heat_map(values, divisions, lengths, title)


def percent(share: float | None) -> str:
    """A share as per cent with one decimal; a dash where nothing was counted."""
    return "–" if share is None else f"{100 * share:.1f}"


def interval(bounds: Sequence[float]) -> str:
    """Bounds of a share in per cent."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}"


def p_text(value: float) -> str:
    """A p-value with two digits."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def findings(results: Mapping[str, Any]) -> list[str]:
    """What was measured, one sentence each, whichever way it came out."""
    said: list[str] = []
    if written := results.get("written"):
        said += [_written_sentence(row) for row in written["table"]]
    if needles := results.get("needles"):
        said += [_needle_sentence(comparison) for comparison in needles["comparisons"]]
        said += _floor_sentences(needles["cells"])
    if tasks := results.get("tasks"):
        said += [_task_sentence(comparison) for comparison in tasks["comparisons"]]
    if probed := results.get("retrieval"):
        said += [
            _retrieval_sentence(name, comparison)
            for name, found in probed["pooled"].items()
            for comparison in found["comparisons"]
            if (comparison["first"], comparison["second"]) == ("control", "on")
        ]
    if likelihood := results.get("likelihood"):
        said += [
            _loss_sentence(comparison, likelihood["rows"])
            for comparison in likelihood["comparisons"]
        ]
    return said


def _written_sentence(row: Mapping[str, Any]) -> str:
    on, off, other = row["on"], row["off"]["right"], row["other"]["right"]
    bounds = interval((on["low"], on["high"]))
    return (
        f"Answers with the text gone, {row['task']}: {percent(on['right'])} % right from the "
        f"memory of the text (95 % interval {bounds}, n = {row['n']}), {percent(off)} % without "
        f"memory, {percent(other)} % from the memory of another text; guessing one of the text's "
        f"answers gives {percent(row['guessing'])} %."
    )


def _needle_sentence(c: Mapping[str, Any]) -> str:
    numbers = (
        f"{signed(c['difference'])} points, 95 % interval {interval(c['interval'])}, n = {c['n']}; "
        f"exact McNemar p {_equals(c['p_value'])}, {_equals(c['p_adjusted'])} adjusted"
    )
    if c["p_adjusted"] >= LEVEL:
        return (
            f"Needles: no difference between {c['second']} and {c['first']} was detected "
            f"({numbers})."
        )
    word = "more" if c["difference"] > 0 else "fewer"
    return f"Needles: {c['second']} answers {word} questions than {c['first']} ({numbers})."


def _task_sentence(c: Mapping[str, Any]) -> str:
    where = c["task"] or "All tasks"
    numbers = (
        f"{signed(c['difference'])} points, 95 % interval {interval(c['interval'])}, n = {c['n']}; "
        f"paired p {_equals(c['p_value'])}, {_equals(c['p_adjusted'])} adjusted"
    )
    if c["p_adjusted"] >= LEVEL:
        return (
            f"{where}: no difference between {c['second']} and {c['first']} was detected "
            f"({numbers})."
        )
    word = "more" if c["difference"] > 0 else "less"
    return f"{where}: {c['second']} scores {word} than {c['first']} ({numbers})."


def _retrieval_sentence(name: str, c: Mapping[str, Any]) -> str:
    """A memory of the prompt beside one of another prompt: any writing shifts the model."""
    score, right = c["at_once"], c["accuracy"]
    numbers = (
        f"{score['difference']:+.4f} nats per token beside another prompt's, 95 % interval "
        f"{score['interval'][0]:+.4f} to {score['interval'][1]:+.4f}, p adjusted "
        f"{_equals(score['p_adjusted'])}; {signed(right['difference'])} points of accuracy, p "
        f"adjusted {_equals(right['p_adjusted'])}"
    )
    where = f"Retrieval, {name}, context {c['condition']}"
    if score["p_adjusted"] >= LEVEL:
        return f"{where}: no effect of what was written was detected ({numbers})."
    word = "more" if score["difference"] > 0 else "less"
    return f"{where}: the prompt's memory makes its value {word} probable ({numbers})."


def _equals(p: float) -> str:
    return p_text(p) if p < 1e-4 else f"= {p_text(p)}"


def _floor_sentences(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """For every system, in how many cells its interval lies above the chance floor."""
    said = []
    for name in cells[0]["systems"]:
        above = sum(
            cell["systems"][name]["accuracy"]["interval"][0] > cell["value_of_context_floor"]
            for cell in cells
        )
        said.append(
            f"Needles: {name} is above the chance floor (values of the context at random) in "
            f"{above} of {len(cells)} cells."
        )
    return said


def _loss_sentence(c: Mapping[str, Any], rows: int) -> str:
    low, high = c["interval"]
    numbers = (
        f"{c['loss']:+.4f} nats per maskable token, 95 % interval {low:+.4f} to {high:+.4f}, "
        f"n = {rows} rows; Student's t p {_equals(c['p_value'])}, "
        f"{_equals(c['p_adjusted'])} adjusted"
    )
    if c["p_adjusted"] >= LEVEL:
        return (
            f"Held-out loss: no difference between {c['second']} and {c['first']} was detected "
            f"({numbers})."
        )
    word = "lower" if c["loss"] < 0 else "higher"
    return f"Held-out loss: {c['second']} is {word} than {c['first']} ({numbers})."
