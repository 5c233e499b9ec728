"""The pretraining and data scripts have a pulse on nano settings, and refuse bad ones by name."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import finetune, prepare_data, pretrain
from experiments.configs import prepare_data as prepare_config
from experiments.configs import tiny_pretrain
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data import sources
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.models.llada import LLaDA
from memdlm_jax.training import pretraining
from memdlm_jax.training.loop import Result
from memdlm_jax.training.state import TrainState

TOKENIZER = "memdlm_jax/assets/tiny/tokenizer.json"


def settings(tmp_path, **changes):
    config = tiny_pretrain.get_config()
    config.tokenizer = TOKENIZER
    config.validation_batches = 1
    config.model.update(width=16, num_heads=2, num_kv_heads=2, hidden_features=24)
    config.induction.update({"written_channels": 4})
    config.data.update(
        text_length=32, text_rows=2, needle_lengths=(96,), needle_tokens=192, max_keys=1,
        needle_only_batches=1,
    )  # fmt: skip
    config.train.update(
        output=str(tmp_path), steps=2, log_every=1, validate_every=2, save_every=2
    )  # fmt: skip
    config.probe.update(lengths=(128,), num_keys=(1,), episodes=2)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def small_corpus(monkeypatch):
    """Two hundred conversations instead of seven thousand."""
    turns = [pair for pair, _ in zip(sources.chitchat_turns(), range(200), strict=False)]
    monkeypatch.setattr(sources, "chitchat_turns", lambda: iter(turns))


def test_pretrain_trains_measures_exports_and_starts_again_from_it(tmp_path, small_corpus):
    first = pretrain.from_config_dict(settings(tmp_path / "a"))
    folder, result = pretrain.run(first)
    assert result.finished
    denoiser, _ = hugging_face.load(folder)
    assert denoiser.config == first.model
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 <= lines[-1]["validation/needles_128_1"] <= 1
    second = pretrain.from_config_dict(settings(tmp_path / "b", start=str(folder)))
    theta = pretrain.first_theta(second, denoiser)
    assert theta["embedding"].shape == (4096, 16)


def test_a_run_is_not_resumed_from_another_beginning(tmp_path, small_corpus):
    config = pretrain.from_config_dict(settings(tmp_path / "a"))
    tokenizer = Tokenizer.load(TOKENIZER)
    data = pretraining.load_data(config.data, tokenizer, 1)
    identity = pretrain.identity_of(config, data)
    assert identity["start.sha256"] is None and identity["induction"]["written_channels"] == 4
    plain = dataclasses.replace(config, induction=None)
    assert pretrain.identity_of(plain, data)["induction"] is None
    for seed in (0, 1):
        denoiser = LLaDA(config.model)
        folder = tmp_path / str(seed)
        hugging_face.save(folder, denoiser, denoiser.init(jax.random.key(seed)))
    digests = {
        pretrain.identity_of(dataclasses.replace(config, start=str(tmp_path / s)), data)[
            "start.sha256"
        ]
        for s in "01"
    }
    assert len(digests) == 2 and None not in digests
    other = pretraining.digest(np.arange(9), ["So it is."], tokenizer)
    assert all(data.identity[name] != other[name] for name in ("data.text", "data.sentences"))
    assert data.identity.items() <= identity.items()


def test_both_stages_of_the_shipped_model_are_valid():
    for stage in ("retrieval", "text"):
        assert pretrain.from_config_dict(tiny_pretrain.get_config(stage)).model.tied
    with pytest.raises(ValueError, match="stage 'fast' must be"):
        tiny_pretrain.get_config("fast")


@pytest.mark.parametrize("finished", [True, False])
def test_a_stopped_training_has_another_status_than_a_whole_one(monkeypatch, finished):
    result = Result(TrainState(3, None, None), None, 0.0, finished)
    monkeypatch.setattr(pretrain, "run", lambda config: (Path("model"), result))
    monkeypatch.setattr(finetune, "finetune", lambda config: result)
    for script in (pretrain, finetune):
        if finished:
            script.main(None)
            continue
        with pytest.raises(SystemExit, match="stopped after step 3; run the same command") as ended:
            script.main(None)
        assert ended.value.code not in (0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.steps": 0}, "train.steps=0 must be at least 1"),
        ({"data.needle_share": 1.5}, r"needle_share=1.5 must lie in \[0, 1\]"),
        ({"model.max_length": 64}, "go beyond model.max_length=64"),
        ({"validation_batches": -1}, "validation_batches=-1"),
        ({"schedule.minimum_time": 0.0}, r"minimum_time=0.0 must lie in \(0, 1\]"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain.from_config_dict(settings(tmp_path, **changes))


def test_a_foreign_vocabulary_is_refused(tmp_path):
    config = pretrain.from_config_dict(settings(tmp_path))
    model = dataclasses.replace(config.model, vocab_size=5000)
    with pytest.raises(ValueError, match="vocab_size=5000 must be the tokenizer's 4096"):
        pretrain.run(dataclasses.replace(config, model=model))


def test_prepare_data_prints_what_it_wrote(tmp_path, capsys):
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(80)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = prepare_config.get_config()
    config.directory, config.tokenizer = str(tmp_path / "data"), TOKENIZER
    config.sources = ({"kind": "jsonl", "path": str(tmp_path / "own.jsonl")},)
    prepare_data.main(prepare_data.from_config_dict(config))
    assert "train: " in capsys.readouterr().out
