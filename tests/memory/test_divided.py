"""Rows divided over devices, run in a process of its own, against all rows on one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.memory import divided, generation
from memdlm_jax.memory.generation import Generator
from tests.memory.test_generation import MEMORY, arguments, assert_same
from tests.models.small import small

CONFIG = DecodeConfig(length=8, block_length=4, threshold=0.5, cache="dual")


def test_two_devices_answer_as_one():
    """Three rows: the devices do not divide them."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    code = "from tests.memory import test_divided as t; t.on_two_devices()"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)


def on_two_devices():
    assert jax.local_device_count() == 2
    given = arguments("llada")
    theta, keys, *prompts = given
    placed = divided.replicate(theta)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(placed))
    over_both = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x"))
    parts = {"matrix": jax.device_put(np.ones((4, 2)), over_both)}
    assert divided.replicate(parts) is parts
    written, _ = generation.write(Generator(small("llada"), MEMORY, CONFIG), *given)
    first = jax.tree.map(lambda leaf: leaf[:1], written)
    generator = Generator(small("llada"), MEMORY, CONFIG)
    for phi, record in ((None, True), (first, False)):
        one = generation.generate(generator, *given, phi=phi, record=record)
        two = divided.generate(generator, placed, keys, *prompts, phi=phi, record=record)
        assert len(two.tokens.sharding.device_set) == 2
        assert_same(jax.device_get(two), jax.device_get(one))
        np.testing.assert_array_equal(two.steps, one.steps)
        assert int(two.whole) == int(one.whole) and int(two.parts) <= int(one.parts)
        assert (two.history is None) == (not record)
        if record:
            np.testing.assert_array_equal(two.history, one.history)
    # XLA ends a CPU's process if one device waits for another longer than 40 s.
    shared, rows = (placed, None, first), (keys, *prompts, None)
    pairs = jax.tree.map(lambda leaf: leaf[:2], rows)
    mesh = divided._mesh(tuple(jax.local_devices()))
    # Inside of ``shard_map`` nothing is added by the compiler: what stands here is all there is.
    program = divided._generate.lower(generator, mesh, False, shared, pairs).as_text()
    assert "while" in program and "manual_computation" in program
    assert not any(kind in program for kind in ("all_reduce", "all_gather", "permute"))
    alone = divided.generate(generator, placed, keys[:1], *(x[:1] for x in prompts), phi=first)
    assert len(alone.tokens.sharding.device_set) == 1
    np.testing.assert_array_equal(alone.tokens, one.tokens[:1])
    with pytest.raises(ValueError, match="phi has 3 groups; it must have 1, for all rows"):
        divided.generate(generator, placed, keys, *prompts, phi=written)
