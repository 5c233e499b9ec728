"""A tiny model, its settings and its data, for all tests of training."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.training import loop, optimizer, state, step
from memdlm_jax.typing import Batch

DENOISER = LLaDA(LLaDAConfig(40, 16, 2, 2, 1, 32, mask_token_id=39, max_length=32))
MEMORY = MemoryConfig(layer_fraction=0.5, rank=2, alpha=4.0)
# Nothing of this memory depends on where a row stands: no random A, no extra positions.
STEADY_MEMORY = dataclasses.replace(MEMORY, adapter="full", pre_anchor_scale=1.0, steps=1)
OPTIMIZER = optimizer.OptimizerConfig(total_steps=12, learning_rate=3e-3)


def batch(seed=0, rows=4, length=12):
    """Random tokens; the first three of each row are its prompt, the last of row 0 is padding."""
    tokens = np.random.default_rng(seed).integers(0, 38, (rows, length), dtype=np.int32)
    maskable, valid = np.ones((2, rows, length), bool)
    maskable[:, :3] = False
    maskable[0, -1] = valid[0, -1] = False
    return Batch(tokens, maskable, valid)


def corrupt(key, rows):
    """A corruption that is a function of the row's tokens alone, unequal between rows."""
    del key
    mask = rows.maskable & ((rows.tokens + jnp.arange(rows.tokens.shape[1])) % 3 > 0)
    return mask, 1.0 + rows.tokens[:, 0] / 10


def no_loss(denoiser, config, theta, student, teacher, targets):
    """An inner loss that teaches nothing."""
    return 0.0 * student.sum(-1)


class Data:
    """Two bucket lengths in turn."""

    def batch_at(self, step):
        return batch(100 + step, length=(8, 12)[step % 2])

    def target_capacity(self, length):
        return length - 3


def setup(memory=None, **changes):
    return step.StepSetup(DENOISER, OPTIMIZER, inner_loop_for(DENOISER, memory), **changes)


@functools.cache
def _theta():
    return jax.device_get(DENOISER.init(jax.random.key(0)))


def fresh_state(config=OPTIMIZER):
    return state.create(jax.tree.map(jnp.array, _theta()), config)


def train_config(folder, **changes):
    defaults = {"steps": 12, "log_every": 2, "validate_every": 4, "save_every": 3}
    return loop.TrainConfig(str(folder), **(defaults | changes))


def validation():
    return [batch(1), batch(2)]


def run(folder, memory=None, data=None, **changes):
    """A whole run of the loop."""
    given = loop.RunData(data or Data(), validation())
    return loop.run(train_config(folder, **changes), setup(memory), fresh_state(), given)


class DyingData(Data):
    """Kills the process, as a power cut would, when a batch is asked for."""

    def __init__(self, last):
        self.last = last

    def batch_at(self, step):
        if step >= self.last:
            import os
            import signal
            import time

            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch_at(step)


if __name__ == "__main__":
    run(Path(sys.argv[1]), data=DyingData(int(sys.argv[2])))
