"""Our scores of replies against those of lm-evaluation-harness, recorded and, if it is there, live.

The harness's ``string_match_part`` is the mean over references like ``string_match_all``: its
maximum is taken over the replies of a call, and it is called with one. RULER's own and ours is the
best reference.
"""

import json
from pathlib import Path

import pytest

from memdlm_jax.data.needles import string_match_all
from memdlm_jax.evaluation import babilong
from memdlm_jax.evaluation.babilong import BabilongSample
from memdlm_jax.evaluation.ruler import string_match_part
from tests.golden.harness import record

CASES = json.loads((Path(record.__file__).with_name("scores.json")).read_text())


def of(kind):
    return [case for case in CASES if case["kind"] == kind]


def test_the_record_has_replies_of_every_kind():
    assert len(CASES) == 200
    for kind in record.KINDS:
        scores = {case["score"] for case in of(kind)}
        assert scores >= {0.0, 1.0}
        assert any(not case["reply"] for case in of(kind))
    assert any(0 < case["score"] < 1 for case in of("string_match_all"))
    assert sum(any(c in case["reply"] for c in record.CONTROL) for case in CASES) > 50


def test_string_match_all():
    for case in of("string_match_all"):
        assert string_match_all(case["reply"], case["references"]) == pytest.approx(case["score"])


def test_string_match_part_is_the_best_where_the_harness_has_the_mean():
    for case in of("string_match_part"):
        best = string_match_part(case["reply"], case["references"])
        assert best == float(case["score"] > 0)
        assert string_match_all(case["reply"], case["references"]) == pytest.approx(case["score"])
    assert any(0 < case["score"] < 1 for case in of("string_match_part")), "they differ"


def test_babilong_contains():
    for case in of("babilong"):
        sample = BabilongSample("qa1", "prompt", "Where is Mary?", case["references"][0])
        assert babilong.score(sample, case["reply"])["contains"] == case["score"]


def test_the_record_is_what_the_harness_says():
    pytest.importorskip("lm_eval")
    assert record.cases() == CASES
