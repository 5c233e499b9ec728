"""The comparison of inner loops: a pulse, what it prints, and what it refuses."""

import json

import jax
import numpy as np
import pytest
import scipy.stats

from experiments import compare_inner_loops as script
from experiments.configs import compare_inner_loops as config_file
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.tokenizer import train_tokenizer
from memdlm_jax.models.llada import LLaDA, LLaDAConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A nano model and rows."""
    folder = tmp_path_factory.mktemp("compare")
    rows = [
        {"prompt": f"after {a} and {b}", "response": f"{b} {a}"}
        for a in "abcdefg"
        for b in "hijklmn"
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer((row["prompt"] for row in rows), 290, whole_numbers=False)
    denoiser = LLaDA(
        LLaDAConfig(tokenizer.vocab_size, 8, 2, 2, 1, 16, tokenizer.mask_id, max_length=32)
    )
    hugging_face.save(folder / "model", denoiser, jax.jit(denoiser.init)(jax.random.key(0)))
    tokenizer.save(folder / "model" / "tokenizer.json")
    return folder


@pytest.fixture
def config(tmp_path, folder):
    """Two steps of two variants."""
    config = config_file.get_config()
    config.output = str(tmp_path / "out")
    config.seeds = (1,)
    config.variants = (("fixed", {}), ("learned", {"learned": ("rates",)}))
    tuning = config.finetune
    tuning.init = str(folder / "model")
    tuning.data.directory = str(tmp_path / "data")
    tuning.data.encode = {"max_length": 32}
    tuning.data.sources = ({"kind": "jsonl", "path": str(folder / "rows.jsonl")},)
    tuning.pipeline.buckets, tuning.pipeline.rows_per_batch = (32,), 4
    tuning.memory.update({"rank": 2, "layer_fraction": 0.5, "meta_gradient": "first_order"})
    tuning.memory.steps = 1
    tuning.train.update({"steps": 2, "log_every": 1, "validate_every": 2})
    return config


def test_trains_all_and_takes_up_where_it_stopped(config, tmp_path, capsys):
    results = script.compare(script.from_config_dict(config))
    assert {name: len(runs) for name, runs in results["losses"].items()} == {
        "fixed": 1, "learned": 1,
    }  # fmt: skip
    gap = results["differences"]["learned"]["memory_on"]["values"]
    runs = results["losses"]
    assert gap == [
        a["memory_on"] - b["memory_on"] for a, b in zip(runs["learned"], runs["fixed"], strict=True)
    ]
    assert (tmp_path / "out/learned-seed1/best/inner_parameters.safetensors").exists()
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table + "\n")
    assert script.compare(script.from_config_dict(config))["losses"] == runs
    assert capsys.readouterr().out == table + "\n"


def test_unknown_fields_are_named(config):
    config.bogus = 1
    with pytest.raises(KeyError, match=r"config\.bogus is no field"):
        script.from_config_dict(config)


def test_intervals_are_students():
    runs = {
        "a": [{"memory_off": x, "memory_on": x} for x in (1.0, 2.0, 3.0)],
        "b": [{"memory_off": x, "memory_on": x + 1} for x in (1.1, 2.3, 3.2)],
    }
    found = script.differences(runs)["b"]
    low, high = scipy.stats.t.interval(
        0.95, 2, loc=0.2, scale=np.std([0.1, 0.3, 0.2], ddof=1) / 3**0.5
    )
    assert found["memory_off"]["mean"] == pytest.approx(0.2)
    assert found["memory_off"]["half_width"] == pytest.approx((high - low) / 2)
    assert found["memory_on"]["mean"] == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": ""}, "output='' must name a folder"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\) must be different"),
        ({"seeds": (0, -1)}, r"seeds=\(0, -1\) must be at least 0"),
        ({"variants": (("a", {}), ("b",))}, r"it must be \(name, changes\)"),
        ({"finetune": {"memory": {"enabled": False}}}, r"memory\.enabled must be True"),
        ({"finetune": {"validation_batches": 0}}, r"finetune\.validation_batches=0 must be"),
        ({"finetune": {"train": {"seed": 3}}}, r"finetune\.train\.seed=3 must be 0"),
        ({"seeds": ()}, r"seeds=\(\) must be different numbers, at least one"),
        ({"variants": (("a", {}),)}, r"variants=\['a'\] must be two or more"),
        ({"variants": (("a", {}), ("a", {}))}, "must be two or more different names"),
        ({"variants": (("a", {}), ("b", {"steps": 0}))}, r"config\.variants\.b.*steps=0"),
    ],
)
def test_bad_settings_are_named(config, change, message):
    config.update(change)
    with pytest.raises(ValueError, match=message):
        script.from_config_dict(config)
