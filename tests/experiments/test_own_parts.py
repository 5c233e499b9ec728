"""A user's own inner loss and optimiser, named in a config, from training to the harness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.tokenizer import train_tokenizer
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

PARTS = '''
import jax
import optax

from memdlm_jax.diffusion import objective


def loss(denoiser, config, theta, student, teacher, targets):
    """Cross-entropy with label smoothing."""
    log_p = jax.nn.log_softmax(denoiser.readout(theta, student))
    return 0.9 * objective.label_losses(denoiser, theta, student, targets) - 0.1 * log_p.mean(-1)


def adam(config, rates):
    return optax.adam(config.learning_rate, eps_root=1e-8)
'''

CONFIG = """
from ml_collections import config_dict

def get_config():
    return config_dict.ConfigDict({{
        "init": "{root}/model", "validation_batches": 1,
        "data": {{"directory": "{root}/data", "encode": {{"max_length": 32}},
                 "sources": ({{"kind": "jsonl", "path": "{root}/rows.jsonl"}},)}},
        "pipeline": {{"buckets": (32,), "rows_per_batch": 4}},
        "optimizer": {{"total_steps": 4, "learning_rate": 1e-3}},
        "train": {{"output": "{root}/run", "steps": 2, "seed": 0, "log_every": 1,
                  "validate_every": 2}},
        "memory": {{"enabled": True, "steps": 1, "layer_fraction": 0.5, "rank": 2,
                   "loss": "parts_of_mine:loss", "optimizer": "parts_of_mine:adam",
                   "learning_rate": 0.5, "meta_gradient": "exact"}},
        "schedule": {{"name": "cosine", "minimum_time": 0.1}},
    }})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"after {a} and {b}", "response": f"comes {b} {a}"} for a in words for b in words
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "config.py").write_text(CONFIG.format(root=root))
    (root / "modules").mkdir()
    (root / "modules" / "parts_of_mine.py").write_text(PARTS)
    tokenizer = train_tokenizer((row["prompt"] for row in rows), 290, whole_numbers=False)
    size = tokenizer.vocab_size
    denoiser = LLaDA(LLaDAConfig(size, 16, 2, 2, 1, 32, tokenizer.mask_id, max_length=48))
    hugging_face.save(root / "model", denoiser, denoiser.init(jax.random.key(0)))
    tokenizer.save(root / "model" / "tokenizer.json")
    return root


@pytest.fixture(scope="module")
def parts(root):
    """The user's module, on Python's path of this process."""
    sys.path.insert(0, str(root / "modules"))
    yield
    sys.path.remove(str(root / "modules"))
    sys.modules.pop("parts_of_mine", None)


def finetune(root, *arguments):
    path = os.pathsep.join([str(root / "modules"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "experiments.finetune", f"--config={root}/config.py", *arguments],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(root, parts):
    """A finished run of two steps."""
    done = finetune(root)
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_the_model_folder_remembers_its_parts(trained):
    stored = json.loads((trained / "best" / "memory.json").read_text())
    assert stored["loss"] == "parts_of_mine:loss"
    assert stored["optimizer"] == "parts_of_mine:adam"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss/memory_on"]) for line in lines)


def written(model, **changes):
    """What ``generate`` writes into memory for one prompt, by its own path."""
    from experiments import _memory, _model
    from memdlm_jax.evaluation.systems import System, write_context
    from memdlm_jax.memory.inner_loop import InnerLoop

    denoiser, theta, _ = _model.load(str(model))
    loop = InnerLoop(denoiser, _memory.settings(str(model), changes))
    phi, _ = write_context(System("memdlm", denoiser, theta, loop), [7, 8, 9, 10, 11], 0, 0)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(phi)])


def test_prompts_are_written_with_them(trained):
    own = written(trained / "best")
    standard = written(trained / "best", loss="ce", optimizer="sgd")
    other_loss = written(trained / "best", loss="ce")
    assert np.abs(own - standard).max() > 0.01
    assert np.abs(own - other_loss).max() > 1e-6


def test_scripts_decode_and_score_with_them(trained, capsys):
    from experiments import generate
    from experiments.configs import generate as generate_config

    config = generate_config.get_config()
    config.model, config.prompt = str(trained / "best"), "after one and two"
    config.decode.length, config.memory.enabled = 4, True
    settings = generate.from_config_dict(config)
    assert settings.memory.loss == "parts_of_mine:loss"
    generate.main(settings)
    capsys.readouterr()

    from experiments import lm_eval

    given = {"pretrained": str(trained / "best"), "memory": True, "max_length": 48}
    lm = lm_eval.MemDLM(**given)
    memory = lm.system.memory
    assert (memory.loss, memory.optimizer) == ("parts_of_mine:loss", "parts_of_mine:adam")

    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", {}, ("after one and two", " comes two one"), 0)
    own = lm.loglikelihood([request], disable_tqdm=True)
    plain = lm_eval.MemDLM(**given, memory_loss="ce", memory_optimizer="sgd")
    assert own != plain.loglikelihood([request], disable_tqdm=True)


def test_a_run_resumes_under_the_same_parts_and_no_others(root, trained):
    """The step count may grow; another inner loss or optimiser is refused by name."""
    for field, value in (("loss", "ce"), ("optimizer", "sgd")):
        refused = finetune(root, "--config.train.steps=4", f"--config.memory.{field}={value}")
        assert refused.returncode == 1
        assert f"memory.{field}" in refused.stderr and "parts_of_mine:" in refused.stderr
        assert len(refused.stderr.strip().splitlines()[-1]) < 400
    resumed = finetune(root, "--config.train.steps=4")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 2" in resumed.stderr


def test_without_the_module_the_folder_is_refused_by_field(trained, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("modules")])
    sys.modules.pop("parts_of_mine", None)
    stored = json.loads((Path(trained) / "best" / "memory.json").read_text())
    with pytest.raises(ValueError, match=r"memory\.loss='parts_of_mine:loss' cannot be imported"):
        MemoryConfig(**stored | {"target_modules": ("mlp",)})
