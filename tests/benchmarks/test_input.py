"""The input benchmark counts what the batches hold, and its report says the same."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import _shapes, input, report
from benchmarks.input import Work
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.pipeline import PipelineConfig, make_pipeline
from memdlm_jax.data.prepare import DataConfig, prepare
from memdlm_jax.data.sft import EncodeConfig
from tests.benchmarks.test_step import TINY

WORK = Work(tokenised=30, fed=3, trained=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "own.jsonl"
    lines = [{"prompt": f"Count {i}: " + "and on " * (i % 40), "response": "."} for i in range(400)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def found(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_shapes.SHAPES, "tiny", TINY)
        folder, file = rows.parent, rows.parent / "found.json"
        asked = ["--shape=tiny", f"--rows={rows}", "--max_length=128", f"--cache={folder}"]
        input.main([*asked, "--repeats=3", f"--json={file}"], WORK)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def prepared(rows, found):
    source = SourceConfig("jsonl", str(rows))
    return prepare(
        DataConfig(str(rows.parent), (source,), EncodeConfig(128), tokenizer=input.TOKENIZER)
    )


def test_the_padding_is_that_of_an_epoch_of_batches(found, prepared):
    pipeline, shown = make_pipeline(prepared, "train", PipelineConfig()), found["input"]
    batches = [pipeline.batch_at(step) for step in range(pipeline.steps_per_epoch)]
    tokens = sum(int(batch.valid.sum()) for batch in batches)
    positions = sum(batch.valid.size for batch in batches)
    assert shown["tokens"] == tokens
    assert shown["padding"] == pytest.approx(1 - tokens / positions)
    assert {batch.valid.shape[1] for batch in batches} == set(shown["buckets"])
    assert shown["least padding"][len(shown["buckets"]) - 1] == pytest.approx(shown["padding"])


def test_rates_count_the_tokens_of_data(prepared):
    source = SourceConfig("jsonl", prepared.summary["config"]["sources"][0]["path"])
    config = DataConfig("unused", (source,), EncodeConfig(128), tokenizer=input.TOKENIZER)
    tokenise = input.Tokenise(config, prepared, 30)
    tokenise()
    total, _ = prepared.lengths("train")
    stored = sum(sorted(total.tolist()))
    assert 0 < tokenise.tokens < stored
    whole = input.Tokenise(config, prepared, 10_000)
    whole()
    assert whole.tokens == stored
    pipeline = make_pipeline(prepared, "train", PipelineConfig())
    feed = input.Feed(pipeline, TINY, 3)
    for start in (0, 3):
        feed()
        assert feed.tokens == sum(pipeline.batch_at(start + i).valid.sum() for i in range(3))


def test_ratios_are_of_each_turn(found):
    rates, ratios = (found["input"][n] for n in ("tokens per second", "times the training rate"))
    for name in ("tokenise", "feed"):
        each = np.divide(rates[name], rates["train"])
        assert len(each) == 3
        assert ratios[name]["median"] == pytest.approx(np.median(each))
        assert (ratios[name]["least"], ratios[name]["most"]) == (each.min(), each.max())


def test_a_program_is_divided_by_its_own_time(monkeypatch):
    @dataclasses.dataclass
    class Counting:
        tokens: int

        def __call__(self):
            self.tokens += 10

    # The round that warms up is not timed to its end.
    times = iter([0, 1, 2, 4, 4, 8, 8, 12, 12, 20])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    found = input.per_second({"a": Counting(0), "b": Counting(100)}, 2)
    assert found == {"a": [10.0, 7.5], "b": [30.0, 16.25]}


def test_the_report_has_a_table_of_it(found, tmp_path, capsys):
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found))
    report.main([str(file)])
    page, data = capsys.readouterr().out, found["input"]
    assert f"**{data['padding']:.1%} padding**" in page
    assert f"| feed | {np.median(data['tokens per second']['feed']):,.0f} |" in page
    assert "| train | " in page and f"| {data['least padding'][0]:.1%} |" in page
