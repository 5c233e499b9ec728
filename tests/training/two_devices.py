"""Run by ``test_parallel`` on two simulated devices: the same batch under ``pmap`` and ``jit``."""

import dataclasses
import functools
import sys

import jax
import numpy as np

from memdlm_jax.models import lora
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.quantize import quantized_tree
from memdlm_jax.parameters import partition
from memdlm_jax.training import state, step
from memdlm_jax.training.parallel import CompiledSteps
from tests.training import tiny

MEMORIES = {
    "example": tiny.STEADY_MEMORY,
    "global": dataclasses.replace(tiny.STEADY_MEMORY, scope="global", meta_gradient="exact"),
    "frozen": dataclasses.replace(tiny.STEADY_MEMORY, scope="global", meta_gradient="exact"),
}


def start(name):
    """The state before the first step, and the part of theta that is not trained."""
    whole = tiny.fresh_state()
    if name != "frozen":
        return whole, None
    narrow = quantized_tree(whole.theta, "int8", lambda path: path.endswith("up_proj/kernel"), 8)
    theta = lora.add(jax.random.key(1), tiny.DENOISER, narrow, LoraConfig(rank=2))
    parts = partition(theta, lora.is_adapter)
    return state.create(parts.trainable, tiny.OPTIMIZER), parts.frozen


def main(name):
    assert jax.local_device_count() == 2
    setup = tiny.setup(MEMORIES[name], corruption=tiny.corrupt)
    batch, key = tiny.batch(), jax.random.key(7)
    on_one = jax.jit(functools.partial(step.train_step, setup=setup))
    first, frozen = start(name)
    expected = jax.device_get(on_one(first, batch, key, True, frozen=frozen))
    steps = CompiledSteps(setup, lambda length: length, frozen)
    shards = steps.put(batch).device.tokens.addressable_shards
    assert {shard.device for shard in shards} == set(jax.local_devices())
    found = jax.device_get(steps.train(steps.place(start(name)[0]), batch, key, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), *(
        (after.theta, metrics) for after, metrics in (found, expected)
    ))  # fmt: skip
    try:
        steps.evaluate(steps.place(start(name)[0].theta), tiny.batch(rows=3), key)
    except ValueError as error:
        assert "batch of 3 rows cannot be split over 2 devices" in str(error)
    else:
        raise AssertionError("three rows were split over two devices")


if __name__ == "__main__":
    for memory in sys.argv[1:]:
        print(memory, file=sys.stderr)
        main(memory)
