import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import (
    _evaluation,
    _measures,
    evaluate,
    finetune,
    generate,
    quickstart,
    written_memory,
)
from experiments._evaluation import Loaded
from experiments.configs import evaluate as evaluate_defaults
from experiments.configs import generate as generate_defaults
from experiments.configs import quickstart as quickstart_defaults
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data import sources
from memdlm_jax.evaluation import report
from memdlm_jax.evaluation import systems as library
from memdlm_jax.inference import generation
from memdlm_jax.models.llada import LLaDA
from memdlm_jax.training.loop import Result
from memdlm_jax.training.state import TrainState
from tests.evaluation.test_report import RUN


@pytest.fixture(scope="module")
def model(tmp_path_factory, denoiser, systems, tokenizer):
    """A model folder."""
    folder = tmp_path_factory.mktemp("model")
    hugging_face.save(folder, denoiser, systems[0].theta)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture
def small_corpus(monkeypatch):
    """A few hundred conversations instead of seven thousand."""
    talks = list(itertools.islice(sources.chitchat_turns(), 300))
    monkeypatch.setattr(sources, "chitchat_turns", lambda: iter(talks))


def generate_config(**settings):
    config = generate_defaults.get_config()
    config.update(settings)
    return generate.from_config_dict(config)


def test_generate_writes_one_json_line_per_prompt(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "the bird \\u00e9"}\n')
    decode = {"length": 4, "block_length": 4, "steps": 2, "temperature": 0.0}
    config = generate_config(model=model, input=str(prompts), decode=decode, history=True)
    generate.main(config)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat", "the bird é"]
    for line in lines:
        assert line["ended"] == (line["tokens"] < 4) and line["memory"] is False
        assert line["history"]["steps"] == 2 and len(line["history"]["tokens"]) == 4
    generate.main(dataclasses.replace(config, output=str(tmp_path / "out.jsonl")))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model='' must name a model folder"),
        ({"prompt": ""}, "exactly one must be given"),
        ({"input": "-"}, "exactly one must be given"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"memory": {"rank": 0}}, "memory.rank=0 must be at least 1"),
        ({"decode": {"length": 0}}, "decode.length=0 must be at least 1"),
    ],
)
def test_generate_names_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        generate_config(**{"model": "m", "prompt": "p"} | settings)


def test_generate_names_bad_prompts(model, tmp_path):
    file = tmp_path / "p.jsonl"
    for content, message in (("", "has no prompt"), ('{"prompt": "a"}\n{"x": 1}\n', "p.jsonl:2")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            generate.main(generate_config(model=model, input=str(file)))
    with pytest.raises(ValueError, match="does not fit max_length=10"):
        generate.main(generate_config(model=model, prompt="cat " * 50, max_length=10))
    with pytest.raises(FileNotFoundError, match="is missing"):
        generate.main(generate_config(model=str(tmp_path), prompt="a"))


def evaluate_config(output, **settings):
    config = evaluate_defaults.get_config()
    with config.unlocked():
        config.update({"output": str(output)} | settings)
    return evaluate.from_config_dict(config)


def test_evaluate_measures_a_folder_on_own_conversations(model, tmp_path, capsys):
    talks = tmp_path / "talks.jsonl"
    lines = [{"prompt": f"how is cat {i}?", "response": "it sat on mats"} for i in range(300)]
    talks.write_text("\n".join(map(json.dumps, lines)))
    config = evaluate_config(
        tmp_path, mdlm=model, needles={"enabled": False}, likelihood={"samples": 2},
        held_out={"path": str(talks), "rows": 4, "max_length": 64, "samples": 2},
        reply={"length": 4, "block_length": 4, "steps": 2},
    )  # fmt: skip
    evaluate.main(config)
    shown = capsys.readouterr().out
    assert "held-out loss  mdlm" in shown
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["likelihood"]["rows"] == 4 and len(stored["samples"]) == 2
    assert set(stored["samples"][0]["replies"]) == {"mdlm"}
    assert stored["run"]["config"]["held_out"]["rows"] == 4
    assert "One denoising history" in (tmp_path / "report.html").read_text()


TASKS = {
    "enabled": True, "names": ("niah_multikey_2", "babilong_qa1"), "lengths": (248,), "samples": 3,
    "variant": {"max_new_tokens": 8, "value_digits": 3, "template": "short"},
}  # fmt: skip


def tasks_config(output, model, **settings):
    return evaluate_config(
        output, mdlm=model, memdlm=model, needles={"enabled": False}, tasks=TASKS,
        likelihood={"enabled": False}, held_out={"samples": 0}, memory=MEMORY, **settings,
    )  # fmt: skip


MEMORY = {
    "steps": 1, "rank": 2, "layer_fraction": 0.5, "target_modules": ("mlp/up_proj",)
}  # fmt: skip


def test_evaluate_asks_tasks_and_takes_up_where_it_stopped(model, tmp_path, small_corpus, capsys):
    generation.generate.clear_cache()
    evaluate.main(tasks_config(tmp_path, model))
    # Both tasks are of one length, and two systems differ in their weights alone.
    assert generation.generate._cache_size() == 2
    shown = capsys.readouterr().out
    assert shown.count("niah_multikey_2") >= 3 and "babilong_qa1: no difference" in shown
    stored = json.loads((tmp_path / "results.json").read_text())
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2 * 3 * 3
    assert {(r["task"], r["length"], r["system"], r["index"]) for r in records} == set(
        itertools.product(TASKS["names"], (248,), library.NAMES, range(3))
    )
    means = {
        (c["task"], c["length"], name): score
        for c in stored["tasks"]["cells"]
        for name, found in c["systems"].items()
        for score in [next(iter(found.values()))["mean"]]
    }
    for (task, length, system), mean in means.items():
        own = [
            next(iter(r["scores"].values()))
            for r in records
            if (r["task"], r["length"], r["system"]) == (task, length, system)
        ]
        assert mean == pytest.approx(np.mean(own))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # Scores, and depths of three systems.
    # Killed while it wrote: the rest is asked again, and all comes out the same.
    (tmp_path / "answers.jsonl").write_text("\n".join(lines[:-4]) + "\n" + lines[-4][:30])
    evaluate.main(tasks_config(tmp_path, model))
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["tasks"] == stored["tasks"]
    assert sorted((tmp_path / "answers.jsonl").read_text().splitlines()) == sorted(lines)
    # Weights that are held in another way are another model.
    held = dataclasses.replace(tasks_config(tmp_path, model), base="int8")
    narrow = _evaluation.load(held)
    assert set(narrow.weights.values()).isdisjoint({r["weights"] for r in records})


def test_evaluate_names_tasks_that_do_not_fit(model, tmp_path, small_corpus):
    config = tasks_config(tmp_path, model)
    longer = dataclasses.replace(config.tasks, lengths=(512,))
    with pytest.raises(ValueError, match=r"tasks\.lengths has 512: it must be at most 256"):
        evaluate.measure(dataclasses.replace(config, tasks=longer))


def test_parts_are_computed_once(model, tmp_path, small_corpus, monkeypatch):
    settings = {
        "mdlm": model, "needles": {"enabled": False}, "likelihood": {"enabled": False},
        "exposure": {"enabled": True, "steps": 2}, "held_out": {"rows": 3, "samples": 0},
    }  # fmt: skip
    first = evaluate.measure(evaluate_config(tmp_path, **settings))
    page = report.render({"title": "T", "run": RUN, "exposure": first["exposure"]})
    assert "Exposure bias" in page and page.count("data:image/png;base64,") == 1
    assert page.count('<td class="n"><b>') == 2, "both steps in the table"
    assert set(first["exposure"]["systems"]) == {"mdlm"}
    monkeypatch.setattr(_measures, "held_out_rows", None)
    assert evaluate.measure(evaluate_config(tmp_path, **settings))["exposure"] == first["exposure"]
    with pytest.raises(TypeError):  # Other settings are other numbers.
        evaluate.measure(evaluate_config(tmp_path, **settings, seed=1))


def test_evaluate_names_bad_settings(model, tmp_path):
    config = evaluate_config(tmp_path)
    with pytest.raises(ValueError, match=r"needles\.task\.split='test' must be split='validation'"):
        dataclasses.replace(config, split="validation")
    with pytest.raises(ValueError, match=r"config\.held_out: rows=1 must be at least 2"):
        evaluate_config(tmp_path, held_out={"rows": 1})
    with pytest.raises(ValueError, match="at least one must name a model folder"):
        evaluate.main(config)


def test_held_out_conversations_are_counted_and_all_can_be_read(tmp_path, tokenizer, capsys):
    talks = tmp_path / "talks.jsonl"
    lines = [{"prompt": f"how is cat {i}?", "response": "it sat on mats"} for i in range(20)]
    talks.write_text("\n".join(map(json.dumps, lines)))
    held = {"path": str(talks), "rows": 50, "max_length": 64, "split": "all"}
    loaded = Loaded([], tokenizer, 64, {})
    rows = _measures.held_out_rows(evaluate_config(tmp_path, held_out=held), loaded)
    assert len(rows) == 20
    assert "20 rows, one a group, of 20 groups (20 of 20 examples of" in capsys.readouterr().err
    chosen = evaluate_config(tmp_path, held_out=held | {"split": ""})
    with pytest.raises(ValueError, match=r"the split 'test' has \d of 20 .*held_out\.split='all'"):
        _measures.held_out_rows(chosen, loaded)
    with pytest.raises(ValueError, match="split='all' must be empty without path"):
        evaluate_config(tmp_path, held_out={"split": "all"})


def test_only_models_that_compare_are_compared(model, tmp_path, denoiser, tokenizer):
    wider = LLaDA(dataclasses.replace(denoiser.config, hidden_features=32, max_length=128))
    other = tmp_path / "other"
    hugging_face.save(other, wider, wider.init(jax.random.key(0)))
    tokenizer.save(other / "tokenizer.json")
    config = evaluate_config(tmp_path, mdlm=model, memdlm=str(other))
    with pytest.raises(ValueError, match="hidden_features=24 and 32, max_length=256 and 128"):
        evaluate.measure(config)
    config = dataclasses.replace(config, mdlm="")
    with pytest.raises(ValueError, match=r"held_out\.max_length=256 must be at most 128"):
        evaluate.measure(config)


def test_provenance_does_without_optional_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PACKAGES", ("numpy", "no-such-package"))
    versions = evaluate.provenance("experiments.evaluate", evaluate_config(tmp_path))["versions"]
    assert versions["numpy"] == np.__version__ and versions["no-such-package"] == "not installed"


def test_evaluate_refuses_answers_that_do_not_fit(model, tmp_path, small_corpus):
    task = {"split": "test", "template": "short", "num_values": 3, "value_digits": 9}
    cells = {"lengths": (240,), "num_keys": (1,), "episodes": 2, "task": task}
    config = evaluate_config(tmp_path, mdlm=model, needles=cells)
    with pytest.raises(ValueError, match=r"decode\.length=4 must be at least"):
        evaluate.measure(config)


@pytest.fixture
def quick(model, tmp_path, monkeypatch):
    """A quickstart whose expensive stages only leave their traces; and the list of them."""
    done = []

    def learn(config):
        done.append(f"write {config.memory.meta_gradient}")
        folder = tmp_path.joinpath(config.train.output)
        folder.mkdir(parents=True)
        line = {"step": 1, "validation/needles_4/on": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return Result(TrainState(config.train.steps, None, None), None, 0.0, finished=True)

    def ask(reader, config):
        done.append("ask the reader")
        right = {"right": 0.5, "low": 0.4, "high": 0.6}
        ways = dict.fromkeys(("on", "off", "other"), right)
        return [{"task": "needles_4", "n": 8, "guessing": 0.25} | ways]

    def train(config):
        done.append("mdlm" if config.memory is None else "memdlm")
        folder = tmp_path.joinpath(config.train.output)
        folder.mkdir(parents=True)
        line = {"step": 1, "loss/memory_on": 1.0, "loss/memory_off": 2.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return Result(TrainState(config.train.steps, None, None), None, 0.0, finished=True)

    def measure(config):
        done.append(f"{config.mdlm} {config.memdlm}")
        return {"seconds": {"needles": 1.5}}

    monkeypatch.setattr(written_memory, "train", learn)
    monkeypatch.setattr(written_memory, "measure", ask)
    monkeypatch.setattr(finetune, "finetune", train)
    monkeypatch.setattr(evaluate, "measure", measure)
    config = quickstart_defaults.get_config()
    config.update({"model": model, "output": str(tmp_path / "quick"), "conversations": 2})
    config.reader = model
    talks = [(f"talk {i}", [("a", "hi"), ("b", "ho"), ("a", "so")]) for i in range(3)]
    monkeypatch.setattr(sources, "chitchat_turns", lambda: iter(talks))
    return config, done


def test_quickstart_does_each_stage_once(quick, tmp_path):
    config, done = quick
    for _ in range(2):
        page = quickstart.run(quickstart.from_config_dict(config))
    first = ["ask the reader", "write exact", "write first_order", "mdlm", "memdlm"]
    assert done[:5] == first and len(done) == 6
    assert "quick/mdlm-" in done[5] and "quick/memdlm-" in done[5]
    stored = json.loads(page.with_name("results.json").read_text())
    talk = json.loads((tmp_path / "quick/data/conversations-2.jsonl").read_text().splitlines()[1])
    assert [m["role"] for m in talk["messages"]] == ["assistant", "user", "assistant"]
    assert talk["group"] == "talk 1"
    assert set(stored["curves"]) == {"mdlm", "memdlm"}
    assert stored["written"]["curves"]["exact"] == [{"step": 1, "on": 0.5}]
    assert "50.0 % right from the memory of the text" in page.read_text()
    assert set(stored["run"]["seconds"]) == {
        "asking the reader", "learning to write, exact", "learning to write, first_order",
        "fine-tuning mdlm", "fine-tuning memdlm", "needles",
    }  # fmt: skip
    config.finetune.train.steps = 7
    quickstart.run(quickstart.from_config_dict(config))
    assert done[6:8] == ["mdlm", "memdlm"] and len(done) == 9, "other settings, other stages"


def test_quickstart_settings(quick):
    config, _ = quick
    built = quickstart.from_config_dict(config)
    assert built.finetune.memory == built.evaluate.memory
    config.finetune.data.directory = "elsewhere"
    assert quickstart.from_config_dict(config).finetune.data.directory == "elsewhere"
    config.model = ""
    assert quickstart.from_config_dict(config).finetune.init.endswith("assets/tiny")
    config.output = ""
    with pytest.raises(ValueError, match=r"config\.output='' must name a folder"):
        quickstart.from_config_dict(config)
