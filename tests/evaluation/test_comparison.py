import numpy as np
import pytest

from memdlm_jax.data.example import Example
from memdlm_jax.evaluation import comparison
from memdlm_jax.evaluation.tasks import Cell, Question


def cell(task, depths, same="{} {}", **settings):
    questions = tuple(
        Question(i, Example("a\nb?", "x", str(i), "t"), ("x",), depth, same.format(task, i))
        for i, depth in enumerate(depths)
    )
    fields = {"length": 64, "seed": 0, "answer_tokens": 8, "floors": {}, "is_standard": True}
    fields["changes"] = {}
    return Cell(task, questions=questions, score=lambda i, reply: {}, **(fields | settings))


def rows(values, name="score"):
    return [{"prompt": "a\nb?\n", "reply": str(v), "scores": {name: v}} for v in values]


def test_a_cell_has_means_and_depths():
    here = cell("niah_single_1", [0.0, 0.1, 0.5, 1.0])
    found = comparison.cell_results(here, {"mdlm": rows([1.0, 0.0, 0.5, 1.0])})
    system = found["systems"]["mdlm"]
    assert system["score"]["mean"] == 0.625 and system["score"]["n"] == 4
    low, high = system["score"]["interval"]
    assert 0 <= low < 0.625 < high <= 1
    assert [part["n"] for part in system["by_depth"]] == [2, 0, 1, 0, 1]
    assert [part["mean"] for part in system["by_depth"]] == [0.5, None, 0.5, None, 1.0]
    assert found["samples"][1] == {"question": "b?", "references": ["x"], "mdlm": "0.0"}
    nowhere = cell("niah_single_1", [None, 0.5])
    assert "by_depth" not in comparison.cell_results(nowhere, {"a": rows([1, 0])})["systems"]["a"]


def test_comparisons_are_paired_and_adjusted():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 40).astype(float)
    better = np.minimum(first + (rng.random(40) < 0.5), 1)
    cells = [
        (cell("niah_single_1", [0.5] * 40), {"a": rows(first), "b": rows(better)}),
        (
            cell("babilong_qa1", [None] * 40),
            {"a": rows(first, "contains"), "b": rows(first, "contains")},
        ),
    ]
    found = comparison.comparisons(cells)
    assert [c["task"] for c in found] == ["", "niah_single_1", "babilong_qa1"]
    whole, needles, stories = found
    assert whole["n"] == 80 and needles["n"] == 40
    assert needles["difference"] == pytest.approx((better - first).mean())
    assert whole["difference"] == pytest.approx(needles["difference"] / 2)
    assert needles["p_value"] < 0.01 and stories["p_value"] == 1
    assert stories["interval"][0] < 0 < stories["interval"][1], "no difference is no certainty"
    # Of the tasks' two tests the smaller p-value counts twice.
    assert needles["p_adjusted"] == pytest.approx(2 * needles["p_value"])
    assert whole["p_adjusted"] == whole["p_value"]
    assert len(comparison.comparisons(cells[:1])) == 1


def test_a_question_that_several_cells_ask_counts_once():
    one = (cell("babilong_qa1", [None] * 6), {"a": rows([1, 0, 1, 0, 1, 1]), "b": rows([1] * 6)})
    names = ("contains", "strict")
    one[1].update(
        {
            k: [r | {"scores": dict.fromkeys(names, r["scores"]["score"])} for r in v]
            for k, v in one[1].items()
        }
    )
    alone, thrice = comparison.comparisons([one]), comparison.comparisons([one] * 3)
    assert alone == thrice and alone[0]["n"] == 6
    other = (cell("babilong_qa1", [None] * 6, same="other {} {}"), one[1])
    assert comparison.comparisons([one, other])[0]["n"] == 12
