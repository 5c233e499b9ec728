"""One folder's worth of evidence: ``results.json``, and ``report.html`` rendered from it alone."""

import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from memdlm_jax.evaluation import figures

PARTS = ("needles", "likelihood", "curves", "samples", "history")
"""Parts of the results that may be missing."""

LEVEL = 0.05
"""A difference is called detected if its p-value, adjusted for the number of tests, is below."""


def write(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write ``results.json`` and ``report.html`` and return the latter's path.

    Args:
        folder: made if missing; both files in it are replaced.
        results: JSON-ready. ``title`` and ``run`` (``command``, ``config``, ``versions``,
            ``seconds`` by stage, ``notes``) are always shown; shown where present are ``needles``
            (``needles.evaluate``), ``likelihood`` (``likelihood.evaluate``), ``curves`` (run ->
            ``figures.read_curve``), ``samples`` (``samples.sample_replies``) and ``history``
            (``samples.denoising_history``).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Rendered first: a failure leaves an older pair of files as it was.
    page = render(results)
    _replace(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    _replace(folder / "report.html", page)
    return folder / "report.html"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def render(results: Mapping[str, Any]) -> str:
    """The report as one HTML page without any reference to another file or host."""
    source = importlib.resources.files(__package__) / "report.html.j2"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "interval": interval, "signed": signed, "p": p_text}
    curves = results.get("curves")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        results=dict.fromkeys(PARTS) | dict(results),
        findings=findings(results),
        figure=figures.loss_curves(curves) if curves else None,
        config=json.dumps(results["run"]["config"], indent=1),
    )


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
    if needles := results.get("needles"):
        said += [_needle_sentence(comparison) for comparison in needles["comparisons"]]
        said += _floor_sentences(needles["cells"])
    if likelihood := results.get("likelihood"):
        said += [
            _loss_sentence(comparison, likelihood["rows"])
            for comparison in likelihood["comparisons"]
        ]
    return said


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
