"""From the scores of systems on cells of questions to means, intervals and paired tests."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memdlm_jax.evaluation import statistics
from memdlm_jax.evaluation.tasks import Cell

DEPTHS = 5
"""Parts of the context that depths are counted in."""

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""System -> a record of each question with its scores, in the order of the questions."""


def cell_results(cell: Cell, records: Records) -> dict[str, Any]:
    """What the systems scored in a cell, JSON-ready.

    Returns:
        ``{"task", "length", "seed", "n", "is_standard", "answer_tokens", "floors", "systems",
        "samples"}``; of every system ``{score: {"n", "mean", "interval"}}`` and, where all
        questions ask for one place, ``"by_depth"`` with the task's own score in parts of the
        context. Intervals are 95 %, by bootstrap over questions.
    """
    firsts = zip(cell.questions, next(iter(records.values())), strict=True)
    return {
        "task": cell.task,
        "length": cell.length,
        "seed": cell.seed,
        "n": len(cell.questions),
        "is_standard": cell.is_standard,
        "answer_tokens": cell.answer_tokens,
        "floors": cell.floors,
        "systems": {name: _system(cell, rows) for name, rows in records.items()},
        "samples": [
            {"question": _end(first["prompt"]), "references": list(question.references)}
            | {name: rows[question.index]["reply"] for name, rows in records.items()}
            for question, first in itertools.islice(firsts, 2)
        ],
    }


def _end(prompt: str) -> str:
    """The last line of a prompt, where the question is."""
    return prompt.strip().splitlines()[-1][-300:]


def _system(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: _mean(scores(rows, name)) for name in cell.score_names}
    depths = [question.depth for question in cell.questions]
    if None not in depths:
        bins = np.minimum((np.array(depths, float) * DEPTHS).astype(int), DEPTHS - 1)
        own = scores(rows, cell.score_names[0])
        found["by_depth"] = [
            {"from": part / DEPTHS, "to": (part + 1) / DEPTHS} | _mean(own[bins == part])
            for part in range(DEPTHS)
        ]
    return found


def _mean(values: np.ndarray) -> dict[str, Any]:
    """Mean and interval; ``None`` for the mean of nothing, (0, 1) for what one value tells."""
    if len(values) < 2:
        mean = float(values[0]) if len(values) else None
        return {"n": len(values), "mean": mean, "interval": [0.0, 1.0]}
    mean, low, high = statistics.mean_interval(values)
    return {"n": len(values), "mean": mean, "interval": [low, high]}


def scores(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """[n] one score of every record."""
    return np.array([row["scores"][name] for row in rows], np.float64)


def comparisons(cells: Sequence[tuple[Cell, Records]]) -> list[dict[str, Any]]:
    """Paired comparisons of every two systems: over all cells, and over those of each task.

    Every cell asks other questions, so that those of several can be pooled; the score is each
    task's own.

    Returns:
        JSON-ready ``[{"task", "first", "second", "n", "difference", "interval", "p_value",
        "p_adjusted"}]``; ``task`` is empty for all. p-values are adjusted by Holm among all of one
        task, and among those over all cells.
    """
    names = list(cells[0][1])
    tasks = list(dict.fromkeys(cell.task for cell, _ in cells))
    found = []
    for task in ["", *tasks] if len(tasks) > 1 else [""]:
        chosen = [(cell, records) for cell, records in cells if task in ("", cell.task)]
        pooled = {
            name: np.concatenate([scores(r[name], c.score_names[0]) for c, r in chosen])
            for name in names
        }
        pairs = list(itertools.combinations(names, 2))
        tests = [statistics.paired_means(pooled[a], pooled[b]) for a, b in pairs]
        adjusted = statistics.holm([test.p_value for test in tests])
        found += [
            {"task": task, "first": a, "second": b}
            | dataclasses.asdict(test)
            | {"interval": list(test.interval), "p_adjusted": p}
            for (a, b), test, p in zip(pairs, tests, adjusted, strict=True)
        ]
    return found
