"""Rows divided over devices, run in a process of its own, against all rows on one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.inference import data_parallel, generation
from tests.inference.test_generation import MEMORY, arguments, assert_same, generator_of

CONFIG = DecodeConfig(length=8, block_length=4, threshold=0.5, cache="dual")


def test_two_devices_answer_as_one():
    """Three rows: the devices do not divide them."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    code = "from tests.inference import test_data_parallel as t; t.on_two_devices()"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)


def on_two_devices():
    assert jax.local_device_count() == 2
    given = arguments("llada")
    theta, prompts = given
    placed = data_parallel.replicate(theta)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(placed))
    over_both = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x"))
    parts = {"matrix": jax.device_put(np.ones((4, 2)), over_both)}
    assert data_parallel.replicate(parts) is parts
    generator = generator_of("llada", MEMORY, CONFIG)
    written, _ = generation.write(generator, *given)
    first = jax.tree.map(lambda leaf: leaf[:1], written)
    for phi, record in ((None, True), (first, False)):
        one = generation.generate(generator, *given, phi=phi, record=record)
        two = data_parallel.generate(generator, placed, prompts, phi=phi, record=record)
        assert len(two.tokens.sharding.device_set) == 2
        assert_same(jax.device_get(two), jax.device_get(one))
        np.testing.assert_array_equal(two.steps, one.steps)
        assert int(two.whole) == int(one.whole) and int(two.parts) <= int(one.parts)
        assert (two.history is None) == (not record)
        if record:
            np.testing.assert_array_equal(two.history, one.history)
    # XLA ends a CPU's process if one device waits for another longer than 40 s.
    shared, pairs = (placed, None, first), jax.tree.map(lambda leaf: leaf[:2], prompts)
    mesh = data_parallel._mesh(tuple(jax.local_devices()))
    # Inside of ``shard_map`` nothing is added by the compiler: what stands here is all there is.
    program = data_parallel._generate.lower(generator, mesh, False, shared, pairs).as_text()
    assert "while" in program and "manual_computation" in program
    assert not any(kind in program for kind in ("all_reduce", "all_gather", "permute"))
    alone = data_parallel.generate(
        generator, placed, jax.tree.map(lambda leaf: leaf[:1], prompts), phi=first
    )
    assert len(alone.tokens.sharding.device_set) == 1
    np.testing.assert_array_equal(alone.tokens, one.tokens[:1])
    with pytest.raises(ValueError, match="phi has 3 groups; it must have 1, for all rows"):
        data_parallel.generate(generator, placed, prompts, phi=written)
