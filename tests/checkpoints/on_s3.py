"""Run by ``test_s3`` in processes of their own, which find the server by their environment.

    python -m tests.checkpoints.on_s3 write|read PORT COUNT NUMBER

Prints one JSON object, name of a check -> what was found.
"""

import contextlib
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memdlm_jax import processes, storage
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from memdlm_jax.processes import DistributedConfig

RUN = "s3://bucket/deep/run"
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 2.0}


def state(step):
    """Two arrays that are cut over the devices of all processes and one that is not."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    values = np.random.default_rng(step).normal(size=(2, 8, 500)).astype(np.float32)
    cut = NamedSharding(mesh, PartitionSpec(None, "all"))
    whole = NamedSharding(mesh, PartitionSpec())
    parts = {"a": (values[0], cut), "b": (values[1], cut), "n": (np.int32([step]), whole)}
    return {
        name: jax.make_array_from_callback(value.shape, place, lambda i, value=value: value[i])
        for name, (value, place) in parts.items()
    }


def checkpoints():
    return contextlib.closing(TrainingCheckpoints(RUN, {"seed": 1}, keep_last=2))


def write():
    """All steps; the server is asked again, since Orbax remembers what it saved."""
    with checkpoints() as run:
        for step, loss in LOSSES.items():
            run.save(step, state(step), position=10 * step, loss=loss)
        run.wait()
    with checkpoints() as run:
        return {"steps": run.steps(), "best": run.best_step()}


def read():
    """What is left once a bit of the newest step's largest object has changed."""
    folder = storage.path(RUN)
    objects = storage.files_below(folder / "5" / "state")
    largest = max(objects, key=storage.size)
    if processes.is_first():
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(bytes(content))
    processes.wait_for_all()
    with checkpoints() as run:
        found = run.restore_latest(state(0))
        same = jax.tree.map(
            lambda one, other: bool(np.all(processes.whole(one) == processes.whole(other))),
            found.state, state(found.step),
        )  # fmt: skip
        return {
            "step": found.step, "position": found.position, "same": same, "steps": run.steps(),
            "aside": storage.size(folder / "5.corrupt" / "commit_success.txt") > 0,
        }  # fmt: skip


if __name__ == "__main__":
    job, port, count, number = sys.argv[1], *map(int, sys.argv[2:])
    processes.start(
        DistributedConfig(coordinator=f"127.0.0.1:{port}", num_processes=count, process_id=number)
    )
    print(json.dumps({"write": write, "read": read}[job]()))
