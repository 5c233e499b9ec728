"""Run by ``test_s3`` in processes of their own, which find the server by their environment.

    python -m tests.checkpoints.on_s3 write|read FOLDER PORT COUNT NUMBER

Writes one JSON object, name of a check -> what was found, to FOLDER/JOB-NUMBER.json.
"""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memdlm_jax import processes, storage
from memdlm_jax.checkpoints import orbax_model, orbax_s3
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from memdlm_jax.processes import DistributedConfig
from tests.training import tiny

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
        return {"steps": run.steps(), "best": run.best().step}


def read():
    """What is left after a bit of the newest step was changed and a save of the next was killed."""
    folder = storage.path(RUN)
    largest = max(storage.files_below(folder / "5" / "state"), key=storage.size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    for file in storage.files_below(folder / "4"):
        if file.name != "commit_success.txt":
            (folder / "6" / str(file)[len(str(folder / "4")) + 1 :]).write_bytes(file.read_bytes())
    with checkpoints() as run:
        found = run.restore_latest(state(0))
        same = jax.tree.map(
            lambda one, other: bool(np.all(one == other)), found.state, state(found.step)
        )
        return {
            "step": found.step, "position": found.position, "same": same, "steps": run.steps(),
            "aside": storage.size(folder / "5.corrupt" / "commit_success.txt") > 0,
            "killed": [str(file) for file in storage.files_below(folder / "6")],
            "region": orbax_s3._service("bucket")["aws_region"],
            "model": a_model(), "missing": a_missing_bucket(),
        }  # fmt: skip


def a_model():
    """Whether a model comes back as it was written."""
    theta = tiny.fresh_state().theta
    orbax_model.save("s3://bucket/model", tiny.DENOISER, theta)
    again, found = orbax_model.load("s3://bucket/model")
    same = jax.tree.map(lambda one, other: bool(np.all(one == other)), found, theta)
    return again == tiny.DENOISER and all(jax.tree.leaves(same))


def a_missing_bucket():
    """Whether it is named and not made."""
    try:
        orbax_model.save("s3://nowhere/model", tiny.DENOISER, tiny.fresh_state().theta)
    except FileNotFoundError as error:
        return "s3://nowhere: the bucket must be there" in str(error)
    return False


def main(job, folder, port, count, number):
    processes.start(
        DistributedConfig(
            coordinator=f"127.0.0.1:{port}", num_processes=int(count), process_id=int(number)
        )
    )
    found = {"write": write, "read": read}[job]()
    (Path(folder) / f"{job}-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
