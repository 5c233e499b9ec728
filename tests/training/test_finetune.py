"""The fine-tuning script has a pulse: from the command line to an exported model folder."""

import json
import os
import subprocess
import sys

import jax
import pytest

from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.tokenizer import train_tokenizer
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

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
        "schedule": {{"sampling": "low_discrepancy"}},
    }})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"after {a} and {b}", "response": f"comes {b} {a}"} for a in words for b in words
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "config.py").write_text(CONFIG.format(root=root))
    tokenizer = train_tokenizer((row["prompt"] for row in rows), 290, whole_numbers=False)
    size = tokenizer.vocab_size
    denoiser = LLaDA(LLaDAConfig(size, 16, 2, 2, 1, 32, tokenizer.mask_id, max_length=32))
    hugging_face.save(root / "model", denoiser, denoiser.init(jax.random.key(0)))
    tokenizer.save(root / "model" / "tokenizer.json")
    return root


def run(root, environment, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.finetune", f"--config={root}/config.py", *arguments],
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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.memory.rank=0", "error: config.memory: memory.rank=0 must be at least 1\n"),
        ("--config.train.stepz=3", "error: the config file has no field"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(root, environment, argument, message):
    failed = run(root, environment, argument)
    assert failed.returncode != 0 and message in failed.stderr
    assert "Traceback" not in failed.stderr
