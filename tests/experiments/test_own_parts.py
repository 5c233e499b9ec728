"""A user's own inner loss and optimiser, named in a config, from training to the harness."""

import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import finetune as script
from memdlm_jax.checkpoints.training_state import ConfigMismatch
from memdlm_jax.memory.config import MemoryConfig
from tests.training.test_finetune import CONFIG, make_root

PARTS = '''
import dataclasses

import jax
import optax

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Square(Schedule):
    """alpha(t) = 1 - t^2."""

    minimum_time: float = 0.1

    def alpha(self, t):
        return 1 - t**2

    def alpha_derivative(self, t):
        return -2 * t


def loss(denoiser, config, theta, student, teacher, targets):
    """Cross-entropy with label smoothing."""
    log_p = jax.nn.log_softmax(denoiser.readout(theta, student))
    return 0.9 * objective.label_losses(denoiser, theta, student, targets) - 0.1 * log_p.mean(-1)


def adam(config):
    return optax.adam(config.learning_rate, eps_root=1e-8)
'''

OWN_CONFIG = (
    CONFIG
    + """
standard = get_config

def get_config():
    config = standard()
    config.train.steps = 2
    with config.unlocked():
        config.memory.update({{
            "loss": "parts_of_mine:loss", "optimizer": "parts_of_mine:adam",
            "learning_rate": 0.5,
        }})
        config.schedule = {{"name": "parts_of_mine:Square"}}
        config.train.count_flops = False
    return config
"""
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    (root / "modules").mkdir()
    (root / "modules" / "parts_of_mine.py").write_text(PARTS)
    return make_root(root, OWN_CONFIG)


@pytest.fixture(scope="module")
def parts(root):
    """The user's module, on Python's path of this process."""
    sys.path.insert(0, str(root / "modules"))
    yield
    sys.path.remove(str(root / "modules"))
    sys.modules.pop("parts_of_mine", None)


def finetune(root, steps, **memory):
    """Run, or resume, the script with some changes; in this process, which has the module."""
    namespace = {}
    exec((root / "config.py").read_text(), namespace)
    config = namespace["get_config"]()
    config.train.steps = steps
    config.memory.update(memory)
    return script.finetune(script.from_config_dict(config))


@pytest.fixture(scope="module")
def trained(root, parts):
    """A finished run of two steps."""
    assert finetune(root, 2).finished
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

    denoiser, theta, _ = _model.load(str(model), "float32")
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
    config.decode.length, config.decode.block_length = 4, 4
    config.memory.enabled = True
    settings = generate.from_config_dict(config)
    assert settings.memory.loss == "parts_of_mine:loss"
    generate.main(settings)
    capsys.readouterr()

    from experiments import lm_eval

    given = {"pretrained": str(trained / "best"), "memory": True, "max_length": 32}
    lm = lm_eval.MemDLM(**given)
    memory = lm.system.memory
    assert (memory.loss, memory.optimizer) == ("parts_of_mine:loss", "parts_of_mine:adam")

    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", {}, ("after one and two", " comes two one"), 0)
    own = lm.loglikelihood([request], disable_tqdm=True)
    plain = lm_eval.MemDLM(**given, memory_loss="ce", memory_optimizer="sgd")
    assert own != plain.loglikelihood([request], disable_tqdm=True)


def test_a_run_resumes_under_the_same_parts_and_no_others(root, trained, caplog):
    """The number of steps may grow; another inner loss or optimiser is refused by name."""
    for field, value, own in (("loss", "ce", "loss"), ("optimizer", "sgd", "adam")):
        said = rf"memory\.{field}.*parts_of_mine:{own}.*{value}"
        with pytest.raises(ConfigMismatch, match=said):
            finetune(root, 4, **{field: value})
    with caplog.at_level(logging.INFO):
        assert int(finetune(root, 4).state.step) == 4
    assert "resuming after step 2" in caplog.text


def test_without_the_module_the_folder_is_refused_by_field(trained, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("modules")])
    sys.modules.pop("parts_of_mine", None)
    stored = json.loads((Path(trained) / "best" / "memory.json").read_text())
    with pytest.raises(ValueError, match=r"memory\.loss='parts_of_mine:loss' cannot be imported"):
        MemoryConfig(**stored | {"target_modules": ("mlp",)})
