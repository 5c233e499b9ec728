"""Run by ``test_processes`` in several real processes that do one job.

    python -m tests.training.on_processes JOB FOLDER PORT COUNT NUMBER

Writes one JSON object, name of a check -> what was found, to FOLDER/JOB-NUMBER.json.
"""

import dataclasses
import fcntl
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments import generate
from experiments.configs import generate as generation
from memdlm_jax import processes
from memdlm_jax.checkpoints import digests
from memdlm_jax.data.example import Example
from memdlm_jax.data.pipeline import Pipeline, PipelineConfig
from memdlm_jax.data.sft import Row
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import asking, likelihood
from memdlm_jax.evaluation.asking import Answers, Asked
from memdlm_jax.evaluation.systems import System
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.processes import DistributedConfig
from memdlm_jax.training import loop, optimizer, run_folder, state
from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.sharding import MeshConfig
from memdlm_jax.training.step import StepSetup
from tests.training import tiny

HEARTBEAT = 10
STEPS, ROWS, LENGTH = 20, 8, 12
SIGTERM_AT = 6
ASSETS = Path(loop.__file__).parents[1] / "assets" / "tiny"
# Epsilon of 1: Adam would otherwise blow up what rounding leaves of a gradient of zero.
SETUP = StepSetup(tiny.DENOISER, optimizer.OptimizerConfig(STEPS, learning_rate=0.1, epsilon=1.0))


class ListOfRows(list):
    """Rows that remember which of them were read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.taken = []

    def take(self, indices):
        self.taken += indices
        return [self[i] for i in indices]


class Data(Pipeline):
    """One length, rows of very unequal numbers of tokens; every row comes once in a run."""

    def __init__(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(5, LENGTH + 1, ROWS * STEPS)
        self.rows = ListOfRows(
            Row(rng.integers(0, 38, n, dtype=np.int32), int(rng.integers(1, 5))) for n in lengths
        )
        both = lengths, np.asarray([row.prompt_length for row in self.rows])
        config = PipelineConfig(buckets=(LENGTH,), rows_per_batch=ROWS)
        super().__init__(self.rows, both, config, pad_id=38, eos_id=38)

    def part_at(self, step, choose):
        self.before(step)
        return super().part_at(step, choose)

    def before(self, step):
        """Called when the rows of a step are asked for."""


class Stopping(Data):
    """Process 1 is told to stop; from then on every step takes its time."""

    def before(self, step):
        if step == SIGTERM_AT and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step >= SIGTERM_AT:
            time.sleep(0.5)


class Dying(Data):
    """The last process goes as in a power cut, when what was saved is on disk."""

    def __init__(self, folder, last):
        super().__init__()
        self.folder, self.last = folder, last

    def before(self, step):
        if step >= self.last and jax.process_index() == jax.process_count() - 1:
            time.sleep(1.5)
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train_config(folder):
    return loop.TrainConfig(
        str(folder / "run"), STEPS, log_every=1, validate_every=5, save_every=2, keep_last=100
    )


def validation():
    return [tiny.batch(1, ROWS, LENGTH)]


def train(folder, data):
    """The run that every job takes its part of."""
    theta = jax.device_get(tiny.DENOISER.init(jax.random.key(0)))
    start = state.create(theta, SETUP.optimizer)
    return loop.run(train_config(folder), SETUP, start, loop.RunData(data, validation()))


def norm_after(step, folder, result):
    """Norm of the parameters that were saved after a step."""
    result = dataclasses.replace(result, best_step=step)
    theta = loop.load_best(train_config(folder), SETUP, result, loop.RunData(None, validation()))
    leaves = [processes.whole(leaf) for leaf in jax.tree.leaves(theta)]
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def step_with_memory():
    """Metrics of one step with a memory for every row, whose A is drawn at random."""
    inner_loop = InnerLoop(tiny.DENOISER, dataclasses.replace(tiny.MEMORY, steps=1))
    setup = dataclasses.replace(SETUP, inner_loop=inner_loop)
    steps = CompiledSteps(setup, lambda length: length)
    theta = jax.device_get(tiny.DENOISER.init(jax.random.key(0)))
    start = steps.place(state.create(theta, setup.optimizer))
    _, metrics = steps.train(start, tiny.batch(0, ROWS, LENGTH), jax.random.key(7), True)
    return {name: float(value) for name, value in metrics.items()}


def questions(folder, report=lambda done: None):
    """Records of five questions that are asked with noise, each process its own."""
    denoiser = LLaDA(LLaDAConfig(4096, 16, 1, 2, 1, 32, mask_token_id=1, max_length=64))
    theta = denoiser.init(jax.random.key(3))
    asked = Asked(
        Tokenizer.load(ASSETS / "tokenizer.json"),
        DecodeConfig(length=2, block_length=1, temperature=1.0), 64, 2, 7, {"mdlm": "w"},
    )  # fmt: skip
    examples = [Example(f"who {'really ' * i}asks?", "x", str(i), "t") for i in range(5)]
    return asking.ask(
        asked, System("mdlm", denoiser, theta), {"task": "t"}, examples,
        lambda i, reply: {"scores": {"length": float(len(reply))}},
        Answers(folder / "answers.jsonl"), report,
    )  # fmt: skip


def generated(folder):
    """The script, with noise and with more prompts than a round of both processes takes."""
    settings = generation.get_config()
    settings.update({
        "model": str(ASSETS), "input": str(folder / "prompts.txt"), "batch_size": 2, "seed": 5,
        "decode": {"length": 2, "block_length": 1, "steps": 0, "temperature": 1.0},
        "output": str(folder / "generated.jsonl"),
    })  # fmt: skip
    generate.main(generate.from_config_dict(settings))


def harness_answers():
    """What each process of the harness's model returns."""
    from memdlm_jax.evaluation.harness.model import HarnessModel  # Slow to import.

    denoiser = LLaDA(LLaDAConfig(4096, 16, 1, 2, 1, 32, mask_token_id=1, max_length=64))
    system = System("mdlm", denoiser, denoiser.init(jax.random.key(3)))
    model = HarnessModel(
        system, Tokenizer.load(ASSETS / "tokenizer.json"), max_length=64, batch_size=2,
        mc_samples=2, decode={"block_length": 1, "steps": 0, "temperature": 1.0},
    )  # fmt: skip
    asked = [(f"who {'really ' * (i % 3)}asks?", {"max_gen_toks": 2}) for i in range(5)]
    scored = [(f"who {i % 3}", f" asks {i}") for i in range(4)]
    turn = lambda *arguments: SimpleNamespace(args=arguments)  # noqa: E731
    return {
        "generate": model.generate_until([turn(*one) for one in asked], True),
        "score": model.loglikelihood([turn(*one) for one in scored], True),
    }


def measured():
    """Some number of every row, each process measuring its own batches."""
    rows = [Row(np.arange(n, dtype=np.int32), 1) for n in (9, 4, 7, 5, 6)]
    return likelihood.over_rows(
        lambda places, batch, capacity: batch.tokens.sum(-1) * 1.5 + places, rows, 0, 2
    ).tolist()


def placed_by_hand():
    """A batch over a mesh that holds tokens of one row on two processes, and not all rows here."""
    steps = CompiledSteps(SETUP, lambda length: length, mesh=MeshConfig(1, sequence=2))
    whole = tiny.batch(rows=4, length=8)
    both = steps.put(whole), steps.put_rows(whole)
    here = [shard.data.shape for shard in both[0].device.tokens.addressable_shards]
    same = all(np.array_equal(processes.whole(one.device.tokens), whole.tokens) for one in both)
    return {"rows": steps.rows_here(4).tolist(), "shapes": here, "equal": same}


def divided():
    """Digest and content of an array of which each process has a part."""
    array = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    mesh = MeshConfig(data=jax.device_count()).build(jax.devices())
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    global_array = jax.make_array_from_callback(array.shape, place, lambda index: array[index])
    processes._GATHERED_AT_ONCE = 4 * 8 * 4  # four of the six rows
    same = np.array_equal(processes.whole(global_array), array)
    return {"digest": digests.digest(global_array), "one": digests.digest(array), "equal": same}


def refused(folder):
    """What each process says where process 0 finds the folder in use."""
    folder.mkdir(exist_ok=True)
    with (folder / run_folder.LOCK).open("a+") as other:
        if processes.is_first():
            fcntl.flock(other, fcntl.LOCK_EX)
        try:
            with run_folder.claimed(folder):
                return "claimed"
        except run_folder.FolderInUse as error:
            return str(error)


def first_job(folder):
    data = Stopping()
    found = {
        "gathered": processes.gather({"number": jax.process_index(), "text": "x" * 9}),
        "alone": processes.first_alone(lambda: (folder / "noted").exists() or _note(folder)),
        "questions": questions(folder),
        "measured": measured(),
        "placed": placed_by_hand(),
        "divided": divided(),
        "refused": refused(folder / "held"),
        "harness": harness_answers(),
        "with_memory": step_with_memory(),
    }
    result = train(folder, data)
    generated(folder)  # From then on SIGTERM ends a process.
    return found | {
        "norm_after_2": norm_after(2, folder, result),
        "step": int(result.state.step), "finished": result.finished, "taken": data.rows.taken
    }  # fmt: skip


def _note(folder):
    (folder / "noted").write_text("")
    return False


def second_job(folder):
    last = max(int(f.name) for f in (folder / "run" / "checkpoints").iterdir())
    processes.wait_for_all()  # before any step is added
    train(folder, Dying(folder, last + 4))


def main(job, folder, port, count, number):
    config = DistributedConfig(f"127.0.0.1:{port}", int(count), int(number), False, HEARTBEAT)
    processes.start(config)
    processes.start(config)  # changes nothing
    with processes.ending_together():
        found = {"first": first_job, "second": second_job}[job](Path(folder))
    Path(folder, f"{job}-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    gc.disable()  # It ends before garbage matters; looking for cycles is a tenth of tracing.
    main(*sys.argv[1:])
