"""The benchmarks measure what they say: the public way is our step, computed at greater cost."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import _shapes, step
from benchmarks._shapes import Shape
from benchmarks.naive_step import naive_step
from memdlm_jax.training import flops
from memdlm_jax.training.step import train_step

TINY = Shape(61, 3, 3, 20, 8, 0.34, width=16, hidden_features=24, num_heads=2, rank=3)


def test_the_public_way_takes_the_same_step():
    """Outer adapters alone are trained, so that theta is in two parts."""
    shape = dataclasses.replace(TINY, lora_rank=2)
    memory = shape.memory(scope="global", learning_rate=1.0)
    state, frozen = shape.state()
    setup, batch, key = shape.setup(memory), shape.batch(), jax.random.key(3)

    def ours(state, frozen, batch, key):
        return train_step(state, batch, key, False, setup=setup, frozen=frozen)

    def public(state, frozen, batch, key):
        return naive_step(state, batch, key, setup, frozen)

    with jax.default_matmul_precision("highest"):
        after, metrics = jax.jit(ours)(state, frozen, batch, key)
        other, loss = jax.jit(public)(state, frozen, batch, key)
    assert metrics["loss/memory_on"] == pytest.approx(float(loss), rel=1e-5)
    # Adam's first update has the size of its rate whatever the gradient: its moments tell more.
    moments, others = (
        [np.asarray(leaf) for leaf in jax.tree.leaves(s.optimizer_state)] for s in (after, other)
    )
    for mine, theirs in zip(moments, others, strict=True):
        scale = float(np.abs(mine).max()) + 1e-12
        np.testing.assert_allclose(mine / scale, theirs / scale, atol=2e-4)
    arguments = state, frozen, batch, key
    assert flops.matmul_flops(public, *arguments) > 1.2 * flops.matmul_flops(ours, *arguments)


def test_the_table_is_of_ratios_to_the_plain_step(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(_shapes.SHAPES, "tiny", TINY)
    file = tmp_path / "found.json"
    step.main(["--shape=tiny", "--only=first_order", "--repeats=2", f"--json={file}"])
    assert "first_order" in capsys.readouterr().out
    found = json.loads(file.read_text())["shapes"]["tiny"]
    assert list(found) == ["mdlm", "first_order"]
    assert found["mdlm"]["flops ratio"] == 1 and found["mdlm"]["time ratio"]["median"] == 1
    row = found["first_order"]
    assert row["flops"] / found["mdlm"]["flops"] == row["flops ratio"] > 1
    seconds = np.divide(row["seconds"], found["mdlm"]["seconds"])
    assert row["time ratio"]["median"] == pytest.approx(np.median(seconds))
    with pytest.raises(SystemExit):
        step.main(["--shape=nope"])
