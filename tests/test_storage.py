"""Paths in buckets: what is read, written, replaced and refused, on a stand-in for a bucket."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from experiments import finetune, generate
from experiments.configs import finetune_needles
from experiments.configs import generate as generation
from memdlm_jax import storage
from memdlm_jax.checkpoints import hugging_face, orbax_model, trees, weights
from memdlm_jax.data import corpora, prepare, sources
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from memdlm_jax.evaluation import figures, report
from memdlm_jax.evaluation.asking import Answers
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.training import loop
from memdlm_jax.training.metrics import MetricsWriter
from tests.training import tiny

TINY = "memdlm_jax/assets/tiny"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://b/x", r"memory://b/x: must be a path of a disk, gs://BUCKET/\.\.\. or s3://"),
        ("https://host/x", "must be a path of a disk"),
        ("gs://", "must be a path of a disk"),
    ],
)
def test_other_urls_are_refused(url, message):
    with pytest.raises(ValueError, match=message):
        storage.path(url)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(storage, "_installed", lambda package: False)
    with pytest.raises(ImportError, match=r"gs://b/x needs the package gcsfs: .*\[storage\]"):
        storage.path("gs://b/x")
    with pytest.raises(ImportError, match="gs://b/x needs the package gcsfs"):
        loop.TrainConfig("gs://b/x", steps=1)


def test_paths_of_a_disk_stay_what_they_are(tmp_path):
    assert storage.path("a/b") == type(tmp_path)("a/b")
    assert storage.fetched(tmp_path) is tmp_path
    with storage.on_disk(tmp_path / "x") as local:
        assert local == tmp_path / "x"
    assert str(storage.absolute("x")).startswith("/")


def test_files_appear_whole_or_not_at_all(buckets):
    file = storage.path("gs://b/deep/er/note.txt")
    with pytest.raises(RuntimeError), storage.replacing(file) as local:
        local.write_text("half")
        raise RuntimeError
    assert not file.exists()
    for text in ("old", "new"):
        with storage.replacing(file) as local:
            local.write_text(text)
    assert (buckets / "b/deep/er/note.txt").read_text() == file.read_text() == "new"
    assert [str(f) for f in storage.files_below(file.parent.parent)] == [str(file)]
    assert storage.size(file) == 3
    with storage.on_disk("gs://b/deep/er/note.txt") as local:
        assert local.read_text() == "new" and local.name == "note.txt"
    assert not local.exists()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_folders_are_moved_whole(buckets, scheme):
    source, target = (storage.path(f"{scheme}://b/run/{name}") for name in ("5", "5.corrupt"))
    for name in ("mark.txt", "state/d/x"):
        (source / name).write_text(name)
    storage.move_folder(source, target)
    assert not (buckets / "b/run/5").exists()
    moved = [str(file)[len(str(target)) + 1 :] for file in storage.files_below(target)]
    assert moved == ["mark.txt", "state/d/x"] == [(target / name).read_text() for name in moved]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_model_folders(buckets, scheme):
    folder = f"{scheme}://b/models/tiny"
    denoiser, theta = hugging_face.load(TINY)
    hugging_face.save(folder, denoiser, theta, shard_bytes=1 << 20)
    Tokenizer.load(f"{TINY}/tokenizer.json").save(f"{folder}/tokenizer.json")
    assert len(list((buckets / "b/models/tiny").glob("*.safetensors"))) > 1
    again, found = hugging_face.load(folder)
    assert again.config == denoiser.config
    jax.tree.map(np.testing.assert_array_equal, found, theta)
    whole = Tokenizer.load(storage.path(folder))
    assert whole.digest() == Tokenizer.load(f"{TINY}/tokenizer.json").digest()
    assert hugging_face.weights_digest(folder) == hugging_face.weights_digest(
        buckets / "b/models/tiny"
    )
    trees.save(f"{folder}/phi.safetensors", {"a": theta["embedding"]})
    kept = trees.load(f"{folder}/phi.safetensors", {"a": theta["embedding"]})
    np.testing.assert_array_equal(kept["a"], theta["embedding"])
    shard = next((buckets / "b/models/tiny").glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00002.* is not a whole safetensors file"):
        weights.contents(weights.files(storage.path(folder)))


def test_models_of_orbax(buckets):
    denoiser, theta = tiny.DENOISER, tiny.fresh_state().theta
    orbax_model.save("gs://b/orbax", denoiser, theta)
    jax.tree.map(np.testing.assert_array_equal, orbax_model.load("gs://b/orbax")[1], theta)
    assert (buckets / "b/orbax/orbax/0").is_dir()


def test_text_and_rows(buckets, tmp_path):
    lines = [{"prompt": f"after {i}", "response": f"comes {i + 1}"} for i in range(60)]
    text = "".join(json.dumps(line) + "\r\n" for line in lines)
    storage.path("gs://b/in/rows.jsonl").write_text(text)
    storage.path("gs://b/in/more/notes.md").write_bytes(b"One \xff here. Two there.")
    assert [e.response for e in sources.jsonl_examples("gs://b/in/rows.jsonl", None)][:2] == [
        "comes 1", "comes 2",
    ]  # fmt: skip
    ((group, sentences),) = sources.text_sections("gs://b/in")
    assert group == "more/notes.md#0" and len(sentences) == 2
    source = corpora.SourceConfig("jsonl", path="gs://b/in/rows.jsonl")
    config = prepare.DataConfig("gs://b/data", (source,), vocab_size=1260)
    found, again = prepare.prepare(config), prepare.prepare(config)
    assert found.directory.name == again.directory.name and "://" not in str(found.directory)
    assert (buckets / "b/data" / found.directory.name / "summary.json").exists()
    (tmp_path / "rows.jsonl").write_text(text)
    source = corpora.SourceConfig("jsonl", path=str(tmp_path / "rows.jsonl"))
    local = prepare.prepare(prepare.DataConfig(str(tmp_path / "d"), (source,), vocab_size=1260))
    assert local.directory.name == found.directory.name
    one, other = local.rows("train")[0], again.rows("train")[0]
    np.testing.assert_array_equal(one.tokens, other.tokens)


def test_metrics_and_answers(buckets):
    writer = MetricsWriter("gs://b/run")
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
        if step == 2:
            writer.publish()
            assert len((buckets / "b/run/metrics.jsonl").read_text().splitlines()) == 2
    writer.close()
    writer = MetricsWriter("gs://b/run", step=2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    curve = figures.read_curve("gs://b/run/metrics.jsonl")
    assert [line["step"] for line in curve] == [1, 2, 3]
    assert any((buckets / "b/run/tensorboard").iterdir())
    for number in range(3):
        answers = Answers("gs://b/run/answers.jsonl")
        assert [str(i) in answers for i in range(4)] == [i < number for i in range(4)]
        answers.add([{"key": str(number), "reply": "so"}])
    page = report.write("gs://b/run", {"title": "t", "run": RUN})
    assert str(page) == "gs://b/run/report.html" and (buckets / "b/run/results.json").exists()


RUN = {"command": "c", "config": {}, "versions": {}, "seconds": {}, "notes": []}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_stops_and_goes_on(buckets, tmp_path, scheme):
    """Some steps, then the rest: as a run on a disk, but for where it lies."""
    run = f"{scheme}://b/run"
    changes = {"log_every": 1, "validate_every": 2, "save_every": 2}
    expected = tiny.run(tmp_path / "run", steps=4, **changes)
    first = tiny.run(run, data=Once(), steps=4, **changes)
    assert not first.finished and 0 < int(first.state.step) < 4
    found = tiny.run(run, steps=4, **changes)
    assert found.finished
    jax.tree.map(np.testing.assert_array_equal, found.state, expected.state)
    curves = [figures.read_curve(f"{place}/metrics.jsonl") for place in (run, tmp_path / "run")]
    assert curves[0] == curves[1]


class Once(tiny.Data):
    """Asks to stop when the third batch is asked for, which is before its step."""

    def batch_at(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch_at(step)


def test_from_a_bucket_to_a_bucket(buckets):
    """The scripts of fine-tuning and generation, all of whose paths are URLs."""
    rows = [{"prompt": f"after {i} and {i}", "response": f"comes {i}"} for i in range(80)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    storage.path("gs://b/rows.jsonl").write_text(text)
    tokenizer = train_tokenizer((row["prompt"] for row in rows), 290, whole_numbers=False)
    model = LLaDAConfig(tokenizer.vocab_size, 16, 2, 2, 1, 32, tokenizer.mask_id, max_length=32)
    hugging_face.save("gs://b/model", LLaDA(model), LLaDA(model).init(jax.random.key(0)))
    tokenizer.save("gs://b/model/tokenizer.json")
    config = finetune_needles.get_config()
    config.update({
        "init": "gs://b/model", "validation_batches": 1,
        "pipeline": {"buckets": (32,), "rows_per_batch": 4},
        "train": {"output": "gs://b/run", "steps": 2, "log_every": 1, "validate_every": 1},
        "memory": {"steps": 1, "layer_fraction": 0.5, "rank": 2, "learned": ("rates",)},
    })  # fmt: skip
    config.data.update({
        "directory": "gs://b/data", "encode": {"max_length": 32},
        "sources": ({"kind": "jsonl", "path": "gs://b/rows.jsonl"},),
    })  # fmt: skip
    result = finetune.finetune(finetune.from_config_dict(config))
    assert result.finished
    for file in ("model.safetensors", "memory.json", "inner_parameters.safetensors"):
        assert (buckets / "b/run/best" / file).exists()
    storage.path("gs://b/prompts.txt").write_text("after 1 and 1\nafter 2 and 2\n")
    asked = generation.get_config()
    asked.update({
        "model": "gs://b/run/best", "input": "gs://b/prompts.txt", "output": "gs://b/out/said.jsonl",
        "decode": {"length": 2, "block_length": 1, "steps": 2}, "memory": {"enabled": True},
    })  # fmt: skip
    generate.main(generate.from_config_dict(asked))
    said = (buckets / "b/out/said.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in said] == ["after 1 and 1", "after 2 and 2"]
