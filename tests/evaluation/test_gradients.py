"""Measures of how far one gradient is from another, and the study that prints them."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import meta_gradient_study
from experiments.configs import meta_gradient_study as study_config
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.evaluation import gradients
from memdlm_jax.memory.inner_loop import InnerLoop
from tests.memory import tiny

EXACT = {"layers": {"mlp": np.array([[3.0, 0.0], [0.0, 4.0]])}, "embedding": np.array([0.0, 12.0])}


def changed(**leaves):
    return {"layers": {"mlp": leaves.get("mlp", EXACT["layers"]["mlp"])}} | {
        "embedding": leaves.get("embedding", EXACT["embedding"])
    }


class TestCompare:
    def test_equal_gradients_have_no_error(self):
        found = gradients.compare(EXACT, EXACT)
        assert found["size"] == 1
        assert found["angle"] == found["error"] == found["worst_tensor"] == found["wrong_sign"] == 0

    def test_a_zero_gradient_is_refused(self):
        with pytest.raises(ValueError, match="the exact gradient has square norm"):
            gradients.compare(EXACT, jax.tree.map(np.zeros_like, EXACT))

    def test_a_right_angle(self):
        turned = {"layers": {"mlp": np.zeros((2, 2))}, "embedding": np.array([13.0, 0.0])}
        found = gradients.compare(turned, EXACT)
        assert found["angle"] == pytest.approx(90)
        assert found["error"] == pytest.approx(np.sqrt(2))
        assert found["size"] == pytest.approx(1)

    def test_the_worst_tensor_is_a_single_layers(self):
        """Layer 0 has twice its gradient: hardly an angle, a whole derivative wrong."""
        wrong = changed(mlp=np.array([[6.0, 0.0], [0.0, 4.0]]))
        found = gradients.compare(wrong, EXACT)
        assert found["worst_tensor"] == pytest.approx(1)
        assert found["error"] == pytest.approx(3 / 13)
        assert found["angle"] < 13

    def test_wrong_signs_are_counted_by_entry(self):
        found = gradients.compare(changed(embedding=np.array([1.0, -12.0])), EXACT)
        assert found["wrong_sign"] == pytest.approx(1 / 6)

    def test_parts_are_divided_at_the_split(self):
        wrong = changed(mlp=np.array([[3.0, 0.0], [0.0, 2.0]]))
        parts = gradients.compare_parts(wrong, EXACT, split=1)
        assert set(parts) == {"trunk mlp", "head mlp", "embedding"}
        assert parts["trunk mlp"]["error"] == 0 and parts["head mlp"]["error"] == 0.5

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("embedding", "embedding"),
            ("final_norm/scale", "final_norm"),
            ("03/attention/q_proj/kernel", "trunk attention"),
            ("04/attention_norm/scale", "head attention"),
        ],
    )
    def test_names_of_parts(self, name, part):
        assert gradients.part_of(name, split=4) == part


def test_the_exact_gradient_is_the_slope_and_the_others_are_not():
    """On a denoiser whose first-order gradient is far off."""
    memory = dataclasses.replace(tiny.CONFIG, scope="global", clip="none", learning_rate=0.05)
    schedule, key = LinearSchedule(0.5, "low_discrepancy"), jax.random.key(1)
    with tiny.float64():
        theta, batch = tiny.MODEL.init(0), tiny.batch_of(0)
        direction = gradients.unit_direction(0, theta)
        assert gradients.along(direction, direction) == pytest.approx(1)

        def loss(theta):
            loop = InnerLoop(tiny.MODEL, memory)
            return gradients.memory_on_loss(loop, schedule, theta, batch, key)

        truth = gradients.slope(loss, theta, direction, step=1e-4)
        errors = {}
        for mode in gradients.MODES:
            config = dataclasses.replace(memory, meta_gradient=mode)
            loop = InnerLoop(tiny.MODEL, config)
            found = gradients.gradient(loop, schedule, theta, batch, key)
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(float)}
            errors[mode] = abs(gradients.along(found, direction) / truth - 1)
    assert errors["exact"] < 1e-7
    assert errors["trunk_stopped"] > 1e-3 and errors["first_order"] > 1e-3


def test_spread_of_batches():
    rows = [{"angle": 1.0}, {"angle": 3.0}]
    assert gradients.summarise(rows) == {"angle": (2.0, pytest.approx(np.sqrt(2)))}
    assert gradients.spread([5.0]) == (5.0, 0.0)


CONFIG = """
from experiments.configs import meta_gradient_study

def get_config():
    config = meta_gradient_study.get_config()
    config.output, config.data.directory = "{root}/study", "{root}/data"
    config.models = (("newest", "NEWEST:{root}/mod*"),)
    config.batches, config.directions, config.checked = 1, 2, 1
    config.data.encode = {{"max_length": 32}}
    config.data.sources = ({{"kind": "jsonl", "path": "{root}/rows.jsonl"}},)
    config.pipeline = {{"buckets": (32,), "rows_per_batch": 2}}
    config.schedule.minimum_time = 0.9
    config.memory.rank, config.memory.layer_fraction, config.memory.steps = 2, 0.5, 1
    config.memory.target_modules = ("up_proj",)
    return config
"""


def test_the_study_from_the_command_line(tmp_path, denoiser, tokenizer):
    hugging_face.save(tmp_path / "model", denoiser, jax.jit(denoiser.init)(jax.random.key(0)))
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    rows = [{"prompt": f"the cat {i} sat", "response": f"on mats {i}"} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.py").write_text(CONFIG.format(root=tmp_path))
    command = [sys.executable, "-m", "experiments.meta_gradient_study"]
    done = subprocess.run(
        [*command, f"--config={tmp_path}/config.py"], capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(results["models"]) == {"newest"}
    found = results["models"]["newest"]
    (check,) = found["central_differences"]
    assert check["exact"] == pytest.approx(check["central"], rel=1e-5, abs=1e-9)
    assert set(found["whole"]) == {"first_order", "trunk_stopped"}
    assert len(found["slopes"]["exact"]) == 2
    assert "first_order" in (tmp_path / "study" / "table.md").read_text()
    assert (tmp_path / "study" / "study.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": {"learned": ("rates",)}}, r"memory\.learned=.* must be \(\)"),
        ({"output": ""}, "output='' must name a folder"),
        ({"batches": 0}, "batches=0 must be at least 1"),
        ({"checked": 30}, "checked=30 must lie in"),
        ({"models": ()}, r"models=\(\) must name"),
    ],
)
def test_bad_settings_of_the_study_are_named(change, message):
    config = study_config.get_config()
    config.update(change)
    with pytest.raises(ValueError, match=message):
        meta_gradient_study.from_config_dict(config)


def test_a_model_that_is_not_there_is_said():
    with pytest.raises(FileNotFoundError, match="no folder matches nowhere/x-"):
        meta_gradient_study.model_folder("NEWEST:nowhere/x-*")
