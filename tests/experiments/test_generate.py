"""The generate script: samplers by name, one context for many prompts, memories kept in files."""

import json
import shutil

import pytest

from experiments import _decode, describe, generate
from experiments.configs import generate as defaults
from memdlm_jax.diffusion.samplers import SAMPLERS

MODEL = "memdlm_jax/assets/tiny"
DECODE = {"length": 4, "block_length": 2, "steps": 2}
MEMORY = {"enabled": True, "steps": 1, "rank": 2, "layer_fraction": 0.2}


def run(capsys, sampler="", **settings):
    """Answers, and what was said on standard error."""
    config = defaults.get_config(sampler)
    config.update({"model": MODEL, "decode": DECODE} | settings)
    generate.main(generate.from_config_dict(config))
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()], said.err


def test_published_samplers_by_name():
    for name, sampler in SAMPLERS.items():
        config = defaults.get_config(name)
        config.update({"model": "m", "prompt": "p"})
        assert generate.from_config_dict(config).decode == sampler
        config.decode.threshold = config.decode.editing_threshold = None
        assert generate.from_config_dict(config).decode.threshold is None
        config.decode.threshold = 0.4
        assert generate.from_config_dict(config).decode.threshold == 0.4
    with pytest.raises(ValueError, match="sampler 'best' must be one of 'llada', 'dllm'"):
        _decode.settings("best")


def test_a_saved_memory_answers_as_when_it_was_written(tmp_path, capsys):
    context, kept = tmp_path / "context.txt", str(tmp_path / "kept.safetensors")
    context.write_text("Tom likes trains. Anna is from Rome. " * 3)
    asked = {"input": str(tmp_path / "prompts.txt"), "context": str(context), "history": True}
    (tmp_path / "prompts.txt").write_text("who is from Rome?\nwhat does Tom like?\n")
    written, said = run(capsys, memory=MEMORY, save_memory=kept, **asked)
    assert "tokens into memory, inner losses" in said and len(written) == 2
    read, said = run(capsys, load_memory=kept, **asked)
    assert read == written and "into memory" not in said
    plain, _ = run(capsys, **asked)
    assert plain[0]["history"] != written[0]["history"] and not plain[0]["memory"]
    blind, _ = run(capsys, load_memory=kept, show_context=False, **asked)
    assert blind[0]["history"] != read[0]["history"]
    describe.main([kept])
    lines = capsys.readouterr().out.splitlines()
    assert "fast weights, written with MemoryConfig(" in lines[0]
    assert [line.split(",")[0] for line in lines[1:]] == [
        "mlp/down_proj", "mlp/gate_proj", "mlp/up_proj",
    ]  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"kept\.safetensors was written with other weights"):
        run(capsys, load_memory=kept, **(asked | {"model": str(other)}))


def test_a_context_longer_than_the_model_is_written_in_pieces(tmp_path, capsys):
    context = tmp_path / "context.txt"
    context.write_text("Tom likes trains. Anna is from Rome. " * 20)
    asked = {"prompt": "who?", "context": str(context), "show_context": False, "max_length": 64}
    with pytest.raises(ValueError, match=r"context=.* has \d+ tokens, more than max_length=64"):
        run(capsys, memory=MEMORY, **asked)
    _, said = run(capsys, memory=MEMORY | {"prompt_chunk": 64}, **asked)
    assert said.count(",") >= 3, "one loss a piece"
    longer = asked | {"show_context": True}
    (answer,), _ = run(capsys, memory=MEMORY | {"prompt_chunk": 64}, **longer)
    assert answer["memory"], "the canvas shows the end of what is too long"
    with pytest.raises(ValueError, match=r"memory\.prompt_chunk=65 must be at most max_length=64"):
        run(capsys, memory=MEMORY | {"prompt_chunk": 65}, **asked)
    with pytest.raises(ValueError, match=r"decode\.length=8 leaves no room .* in max_length=8"):
        run(capsys, prompt="hi", max_length=8, decode={"length": 8, "block_length": 8})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_memory": "m"}, "save_memory='m' needs a context, memory.enabled=True"),
        ({"show_context": False}, "show_context=False needs a context and memory.enabled=True"),
        ({"load_memory": "nothing.safetensors"}, "nothing.safetensors.json is not there"),
        ({"decode": {"length": 0}}, "decode.length=0 must be at least 1"),
        ({"decode": {"stop": (9999,)}}, "decode.stop has 9999, which must be below 4096"),
        ({"decode": {"suppress": tuple(range(4096))}}, "decode.suppress has every token"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(capsys, prompt="p", **settings)


def test_a_loaded_memory_brings_its_own_settings(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"brings its own settings, not \{'rank': 3\}"):
        run(capsys, prompt="p", load_memory="m", memory={"enabled": True, "rank": 3})
    with pytest.raises(ValueError, match=r"load_memory='m' with memory\.enabled=False"):
        run(capsys, prompt="p", load_memory="m", memory={"enabled": False})


def test_what_cannot_be_answered_leaves_the_old_answers(tmp_path, capsys):
    old = tmp_path / "answers.jsonl"
    old.write_text("old\n")
    with pytest.raises(ValueError, match="does not fit"):
        run(capsys, prompt="cat " * 600, output=str(old))
    assert old.read_text() == "old\n"
