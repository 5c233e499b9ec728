import json
import re

import numpy as np
import pytest

from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.evaluation import figures, needles, report, samples
from memdlm_jax.evaluation.needles import NeedleSuite

RUN = {
    "command": "python -m experiments.evaluate <now>",
    "config": {"seed": 0},
    "versions": {"jax": "1.2.3"},
    "seconds": {"needles": 1.25},
    "notes": ["On one machine."],
}
LIKELIHOOD = {
    "config": {"samples": 4, "seed": 0},
    "rows": 50,
    "maskable_tokens": 700,
    "systems": {
        "mdlm": {"loss": 5.0, "standard_error": 0.1},
        "memdlm": {"loss": 4.9, "standard_error": 0.1},
    },
    "comparisons": [
        {
            "first": "mdlm",
            "second": "memdlm",
            "loss": -0.1,
            "standard_error": 0.04,
            "interval": [-0.18, -0.02],
            "p_value": 0.01,
            "p_adjusted": 0.02,
        },
        {
            "first": "memdlm",
            "second": "mdlm",
            "loss": 0.1,
            "standard_error": 0.05,
            "interval": [-0.01, 0.21],
            "p_value": 0.04,
            "p_adjusted": 0.06,
        },
    ],
}


@pytest.fixture(scope="module")
def results(tokenizer, sentences):
    suite = NeedleSuite(NeedleConfig(template="short"), (128,), (2, 3), episodes=20)
    silent = dict.fromkeys(("mdlm", "memdlm_train_only"), lambda episodes: ["<b>1</b>"] * 20)
    curve = [
        {"step": s, "loss/memory_on": 3 / s, "loss/memory_off": 4 / s, "validation/x": None}
        for s in range(1, 30)
    ]
    decoded = Decoded(
        np.array([[9, 8, 3]]), np.array([[1, 0, -1]]), np.array([[0.25, 1.0, 0.0]]),
        np.array([2]), np.array(2), np.array(0),
    )  # fmt: skip
    history = samples.denoising_history(decoded, 0, tokenizer)
    return {
        "title": "A test",
        "run": RUN,
        "needles": needles.evaluate(
            suite, tokenizer, sentences, silent | {"memdlm": needles.oracle}
        ),
        "likelihood": LIKELIHOOD,
        "curves": {"mdlm": curve, "memdlm": curve},
        "samples": [
            {"prompt": "hi <there>", "response": "ho", "replies": {"mdlm": "x", "memdlm": "y"}}
        ],
        "history": {"system": "memdlm", "prompt": "hi"} | history,
    }


def test_the_page_stands_alone_and_escapes(results, tmp_path):
    page = report.write(tmp_path, results).read_text()
    assert not re.search(r"https?:|src=\"(?!data:)|<link|<script|@import", page)
    assert "hi &lt;there&gt;" in page and "<there>" not in page
    assert "python -m experiments.evaluate &lt;now&gt;" in page
    assert page.count("data:image/png;base64,") == 1
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_findings_say_both_what_differs_and_what_does_not(results):
    said = report.findings(results)
    assert "no difference between memdlm_train_only and mdlm was detected (+0.0 points" in said[0]
    assert "memdlm answers more questions than mdlm (+100.0 points" in said[1]
    assert "n = 40" in said[1] and "p < 0.0001, < 0.0001 adjusted" in said[1]
    assert sum("above the chance floor" in s and "2 of 2" in s for s in said) == 1
    assert sum("above the chance floor" in s and "0 of 2" in s for s in said) == 2
    assert (
        "memdlm is lower than mdlm (-0.1000 nats per maskable token, 95 % interval -0.1800 to"
        in said[-2]
    )
    assert "no difference between mdlm and memdlm was detected" in said[-1]


def test_several_lengths_have_a_map_of_each_system(results):
    cells = results["needles"]["cells"]
    longer = results["needles"] | {"cells": [*cells, cells[0] | {"length": 256}]}
    page = report.render({"title": "T", "run": RUN, "needles": longer})
    assert page.count("data:image/png;base64,") == 3


def test_parts_may_be_missing(results):
    page = report.render({"title": "Little", "run": RUN})
    assert "Needles" not in page and "Held-out loss" not in page
    page = report.render({"title": "Loss", "run": RUN, "likelihood": LIKELIHOOD})
    assert "Held-out loss" in page and "Training curves" not in page


def test_a_failure_leaves_the_old_report(results, tmp_path):
    report.write(tmp_path, {"title": "Old", "run": RUN})
    broken = {"title": "New", "run": RUN, "likelihood": LIKELIHOOD | {"rows": float("nan")}}
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write(tmp_path, broken)
    assert "Old" in (tmp_path / "report.html").read_text()


def test_history_shows_tokens_as_they_are_committed(results, tokenizer):
    history = results["history"]
    assert history["steps"] == 2
    assert [t["step"] for t in history["tokens"]] == [1, 0]
    assert [t["confidence"] for t in history["tokens"]] == [0.25, 1.0]
    assert history["tokens"][0]["text"] == tokenizer.decode([9], skip_special=False)


def test_curves_are_read_from_a_runs_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/memory_on": 2.5, "tokens": 7}\n')
    assert figures.read_curve(path) == [{"step": 1, "loss/memory_on": 2.5}]
    with pytest.raises(FileNotFoundError):
        figures.read_curve(tmp_path / "nothing.jsonl")


def rate(value, n=10):
    return {"value": value, "n": n, "interval": [0.0, 1.0]}


def test_retrieval_is_judged_against_another_prompts_memory():
    memories = {
        memory: {
            "accuracy": rate(0.5), "at_once": {"log_probability": -1.5, "standard_error": 0.1}
        }
        for memory in ("off", "on", "control")
    }  # fmt: skip

    def compared(first, p, difference):
        both = {"difference": difference, "interval": [-0.1, 0.4], "p_adjusted": p}
        return {
            "condition": "removed", "first": first, "second": "on", "accuracy": both,
            "at_once": both, "left_to_right": both,
        }  # fmt: skip

    part = {"uniform": 0.1} | {m: {"mean": [[0.2, 0.3], [0.4, 0.5]]} for m in ("off", "on")}
    system = {"attention": {"parts": {"needle": part}}}
    found = {
        "config": {"written": "prompt"},
        "cells": [{"length": 192, "systems": {"memdlm": system, "mdlm": {}}}],
        "pooled": {
            "memdlm": {
                "conditions": {"removed": memories},
                "comparisons": [compared("off", 0.001, 0.2), compared("control", 0.3, 0.2)],
            }
        },
    }
    results = {"title": "T", "run": RUN, "retrieval": found}
    (said,) = report.findings(results)
    assert said.startswith("Retrieval, memdlm, context removed: no effect of what was written")
    assert "+0.2000 nats per token beside another prompt's" in said
    page = report.render(results)
    assert page.count("data:image/png;base64,") == 1 and "-1.500" in page
    found["pooled"]["memdlm"]["comparisons"][1] = compared("control", 0.01, -0.2)
    assert "memory makes its value less probable" in report.findings(results)[0]
