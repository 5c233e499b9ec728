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
        ``{"task", "length", "seed", "n", "is_standard", "changes", "answer_tokens", "floors",
        "systems", "samples"}``; of every system ``{score: {"n", "mean", "interval"}}`` and, where
        all questions ask for one place, ``"by_depth"`` with the task's own score in parts of the
        context. Intervals are 95 %, by bootstrap over questions.
    """
    firsts = zip(cell.questions, next(iter(records.values())), strict=True)
    return {
        "task": cell.task,
        "length": cell.length,
        "seed": cell.seed,
        "n": len(cell.questions),
        "is_standard": cell.is_standard,
        "changes": cell.changes,
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

    The score is each task's own. A question that several cells ask (``Question.same``) counts once,
    with its mean score: otherwise it would be taken for several independent ones.

    Returns:
        JSON-ready ``[{"task", "first", "second", "n", "difference", "interval", "p_value",
        "p_adjusted"}]``; ``task`` is empty for all, ``n`` counts different questions. p-values are
        adjusted by Holm among those of all single tasks, and among those over all cells.
    """
    names = list(cells[0][1])
    pairs = list(itertools.combinations(names, 2))
    tasks = list(dict.fromkeys(cell.task for cell, _ in cells))
    whole = _family([""], pairs, cells)
    return whole + (_family(tasks, pairs, cells) if len(tasks) > 1 else [])


def _family(
    tasks: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    cells: Sequence[tuple[Cell, Records]],
) -> list[dict[str, Any]]:
    """Comparisons whose p-values are adjusted together."""
    tests = []
    for task, (a, b) in itertools.product(tasks, pairs):
        chosen = [(cell, records) for cell, records in cells if task in ("", cell.task)]
        first, second = (_by_question([(c, r[name]) for c, r in chosen]) for name in (a, b))
        tests.append((task, a, b, statistics.paired_means(first, second)))
    adjusted = statistics.holm([test.p_value for *_, test in tests])
    return [
        {"task": task, "first": a, "second": b}
        | dataclasses.asdict(test)
        | {"interval": list(test.interval), "p_adjusted": p}
        for (task, a, b, test), p in zip(tests, adjusted, strict=True)
    ]


def _by_question(cells: Sequence[tuple[Cell, Sequence[Mapping[str, Any]]]]) -> list[float]:
    """Mean own score of each different question."""
    found: dict[str, list[float]] = {}
    for cell, rows in cells:
        own = scores(rows, cell.score_names[0])
        for question, value in zip(cell.questions, own, strict=True):
            found.setdefault(question.same, []).append(float(value))
    return [sum(values) / len(values) for values in found.values()]
