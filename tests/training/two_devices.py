"""Run by ``test_parallel`` on two simulated devices: the same batch under ``pmap`` and ``jit``."""

import dataclasses
import functools
import sys

import jax
import numpy as np

from memdlm_jax.training import step
from memdlm_jax.training.parallel import CompiledSteps
from tests.training import tiny

MEMORIES = {
    "example": tiny.STEADY_MEMORY,
    "global": dataclasses.replace(tiny.STEADY_MEMORY, scope="global", meta_gradient="exact"),
}


def main(name):
    assert jax.local_device_count() == 2
    setup = tiny.setup(MEMORIES[name], corrupt=tiny.corrupt)
    batch, key = tiny.batch(), jax.random.key(7)
    on_one = jax.jit(functools.partial(step.train_step, setup=setup))
    expected = jax.device_get(on_one(tiny.fresh_state(), batch, key, True))
    steps = CompiledSteps(setup, lambda length: length)
    found = jax.device_get(steps.train(steps.place(tiny.fresh_state()), batch, key, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), *(
        (state.theta, metrics) for state, metrics in (found, expected)
    ))  # fmt: skip
    try:
        steps.evaluate(steps.place(tiny.fresh_state().theta), tiny.batch(rows=3), key)
    except ValueError as error:
        assert "batch of 3 rows cannot be split over 2 devices" in str(error)
    else:
        raise AssertionError("three rows were split over two devices")


if __name__ == "__main__":
    main(sys.argv[1])
