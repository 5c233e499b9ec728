"""The memory benchmark sees what a process holds."""

import json

import numpy as np
import pytest

from benchmarks import _shapes, memory
from benchmarks._shapes import Shape

TINY = Shape(61, 2, 2, 16, 8, 0.5, width=16, hidden_features=24, num_heads=2, rank=2)


def test_the_peak_is_of_what_was_held_since_it_was_forgotten():
    size = 96 * 2**20
    held = np.ones(size, np.uint8)
    del held
    memory.forget_peak()
    before = memory.resident("VmRSS")
    assert memory.resident("VmHWM") < before + size / 4
    held = np.ones(size, np.uint8)
    del held
    # The kernel counts to some hundred pages.
    assert 0.98 * size <= memory.resident("VmHWM") - before < 1.5 * size
    assert memory.resident("VmRSS") < before + size / 4


def test_a_variant_is_measured_in_its_process(monkeypatch):
    monkeypatch.setitem(_shapes.SHAPES, "tiny", TINY)
    found = memory.measure_here("tiny", "first_order")
    assert found["temporary bytes"] > 2 * 8 * 61 * 4, "logits of the targets at least"
    assert found["resident bytes"] >= 0


def test_the_table_is_of_ratios_to_the_plain_step(monkeypatch, tmp_path, capsys):
    bytes_of = {"mdlm": 100, "exact": 250}
    monkeypatch.setattr(
        memory, "measure",
        lambda shape, name: {"temporary bytes": bytes_of[name], "resident bytes": bytes_of[name]},
    )  # fmt: skip
    file = tmp_path / "found.json"
    memory.main(["--shape=B", "--only=exact", f"--json={file}"])
    found = json.loads(file.read_text())["memory"]["B"]
    assert found["exact"]["temporary ratio"] == 2.5 and found["mdlm"]["resident ratio"] == 1
    assert "2.50 x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory.main(["--only=nope"])
