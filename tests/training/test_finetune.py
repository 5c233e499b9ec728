"""The fine-tuning script has a pulse: from the command line to an exported model folder."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import finetune
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.tokenizer import train_tokenizer
from memdlm_jax.models import lora
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.training.run_folder import LOCK, claimed
from tests.training.test_loop import live_bytes

CONFIG = """
from ml_collections import config_dict

def get_config():
    return config_dict.ConfigDict({{
        "init": "{root}/model", "validation_batches": 1,
        "data": {{"directory": "{root}/data", "encode": {{"max_length": 32}},
                 "sources": ({{"kind": "jsonl", "path": "{root}/rows.jsonl"}},)}},
        "pipeline": {{"buckets": (32,), "rows_per_batch": 4}},
        "optimizer": {{"total_steps": 4, "learning_rate": 1e-3}},
        "train": {{"output": "{root}/run", "steps": 4, "seed": 0, "log_every": 1,
                  "validate_every": 2}},
        "memory": {{"enabled": True, "steps": 1, "layer_fraction": 0.5, "rank": 2}},
        "lora": {{"enabled": False, "rank": 2, "alpha": 4.0, "dropout": 0.1}},
        "base": "float32",
        "schedule": {{"sampling": "low_discrepancy"}},
    }})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("finetune"))


def make_root(root, config=CONFIG):
    """A folder with a config, rows and a small model."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"after {a} and {b}", "response": f"comes {b} {a}"} for a in words for b in words
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "config.py").write_text(config.format(root=root))
    tokenizer = train_tokenizer((row["prompt"] for row in rows), 290, whole_numbers=False)
    size = tokenizer.vocab_size
    denoiser = LLaDA(LLaDAConfig(size, 16, 2, 2, 1, 32, tokenizer.mask_id, max_length=32))
    hugging_face.save(root / "model", denoiser, denoiser.init(jax.random.key(0)))
    tokenizer.save(root / "model" / "tokenizer.json")
    return root


def run(root, environment, *arguments, config="config.py"):
    chosen = [f"--config={root}/{config}"] if config else []
    return subprocess.run(
        [sys.executable, "-m", "experiments.finetune", *chosen, *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_from_the_command_line_to_a_model_folder(root, environment):
    done = run(root, environment, "--config.train.seed=1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["validation/loss/memory_on"] < lines[1]["validation/loss/memory_off"]
    _, theta = hugging_face.load(root / "run" / "best")
    _, start = hugging_face.load(root / "model")
    assert not (theta["embedding"] == start["embedding"]).all()
    same = (root / "model" / "tokenizer.json").read_bytes()
    assert (root / "run" / "best" / "tokenizer.json").read_bytes() == same


def test_a_second_start_ends_in_one_line_and_leaves_no_trace(root, environment):
    with claimed(root / "held"):
        failed = run(root, environment, f"--config.train.output={root}/held")
    assert_one_line(failed, f"{root}/held is in use by another run (process {os.getpid()} on ")
    assert [file.name for file in (root / "held").iterdir()] == [LOCK]


def test_resuming_frees_the_model_it_started_from(root, monkeypatch):
    namespace = {}
    exec((root / "config.py").read_text(), namespace)
    settings = namespace["get_config"]()
    settings.train.output, settings.validation_batches = str(root / "freed"), 0
    settings.train.steps = settings.optimizer.total_steps = 1
    config = finetune.from_config_dict(settings)
    before, found = live_bytes(), []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(finetune.finetune(config).state))
    restore = ocp.CheckpointManager.restore

    def measured(manager, step, *, args):
        found.append(live_bytes() - before)
        return restore(manager, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", measured)
    result = finetune.finetune(config)
    notes, arrays = found[:2]
    assert result.finished and arrays < size / 20 < size <= notes, (found, size)


def test_adapters_over_a_narrow_base(root, environment):
    """Trained, resumed, exported as PEFT has it; the base is in no checkpoint."""
    narrow = ["--config.lora.enabled=True", "--config.base=int8"]
    output = f"--config.train.output={root}/lora"
    done = run(root, environment, *narrow, output)
    assert done.returncode == 0, done.stderr
    best = root / "lora" / "best"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        file.name for file in best.iterdir()
    }
    kept = {path.parent.name for path in (root / "lora" / "checkpoints").glob("4/state")}
    assert kept and not (best / "model.safetensors").exists()
    notes = json.loads(next((root / "lora" / "checkpoints" / "4").rglob("notes/*")).read_text())
    arrays = notes["notes"]["arrays"]
    sizes = [np.prod(a["shape"]) for name, a in arrays.items() if name.startswith("theta")]
    assert sizes and sum(sizes) == 2 * 2 * (4 * 16 + 16 + 8 + 16 + 8 + 16 + 3 * (16 + 32) - 16)
    _, theta = hugging_face.load(best)
    adapted = [leaf for leaf in lora.kernels(theta).values() if isinstance(leaf, lora.Adapted)]
    assert len(adapted) == 7 and all(leaf.B.any() for leaf in adapted)
    again = run(root, environment, *narrow, output, f"--config.init={best}")
    assert_one_line(again, "init.sha256=")
    further = f"--config.train.output={root}/further"
    done = run(root, environment, *narrow, further, f"--config.init={best}")
    assert done.returncode == 0, done.stderr
    _, longer = hugging_face.load(root / "further" / "best")
    moved = longer["layers"]["mlp"]["up_proj"]["kernel"].B
    assert (moved != theta["layers"]["mlp"]["up_proj"]["kernel"].B).any()


def test_a_narrow_base_needs_adapters(root, environment):
    assert_one_line(run(root, environment, "--config.base=nf4"), "base='nf4' must be 'float32'")


def assert_one_line(failed, message):
    assert failed.returncode == 1
    assert message in failed.stderr and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.memory.rank=0", "error: config.memory: memory.rank=0 must be at least 1\n"),
        ("--config.init=nowhere", "error: nowhere/config.json is missing"),
        ("--config.pipeline.buckets=(64,)", "beyond the model's max_length=32\n"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(root, environment, argument, message):
    assert_one_line(run(root, environment, argument), message)


@pytest.mark.parametrize("config", ["config.py", ""], ids=["with", "without"])
def test_a_field_that_is_not_there_is_named_with_and_without_a_config(root, environment, config):
    failed = run(root, environment, "--config.train.stepz=3", config=config)
    assert_one_line(
        failed, "error: the config file has no such field: 'stepz' Did you mean \"steps"
    )


def test_bad_input_ends_in_one_line(root, environment):
    where = "--config.data.sources[0].path"
    missing = run(root, environment, f"{where}={root}/none.jsonl")
    assert_one_line(missing, "none.jsonl' of a data source is not there")
    (root / "bad.jsonl").write_text("{")
    bad = run(root, environment, f"{where}={root}/bad.jsonl")
    assert_one_line(bad, "bad.jsonl:1: not valid JSON")
    (root / "few.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    few = run(root, environment, f"{where}={root}/few.jsonl")
    assert_one_line(few, "validation_batches=1 must be 0: the split 'validation' has no row")
    shown = run(root, environment, f"{where}={root}/bad.jsonl", "--verbosity=1")
    assert shown.returncode == 1 and "Traceback" in shown.stderr
