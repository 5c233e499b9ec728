"""Every command that the README prints, and those of the docs, has settings that hold together."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.memory.written import write_prompt
from memdlm_jax.models.published import PUBLISHED
from tests.models.small import TOKENS, small, theta_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """(script, arguments) of every ``python -m experiments.SCRIPT`` in a page."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for script, rest in re.findall(r"python -m experiments\.(\w+)([^\n`]*)", text):
        yield script, shlex.split(rest, comments=True)


def settings_of(script, arguments):
    """What the script would make of its arguments."""
    values, argv = flags.FlagValues(), [script, *arguments]
    holder = config_flags.DEFINE_config_file(
        "config", f"experiments/configs/{script}.py", flag_values=values, sys_argv=argv
    )
    if script == "chat":
        flags.DEFINE_boolean("memory", None, "", flag_values=values)
    if script == "compile_for_tpu":
        flags.DEFINE_string("topology", None, "", flag_values=values)
    assert values(argv) == [script], "all arguments are overrides"
    return importlib.import_module(f"experiments.{script}").from_config_dict(holder.value)


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """The parts of one's own that docs/method.md shows, as the module that it names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "method.md").read_text(), re.S)
    (tmp_path / "my_module.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_module", None)


def test_the_documented_parts_of_ones_own_write_memory(my_module):
    parts = dict(loss="my_module:smoothed", optimizer="my_module:adam", masking="my_module:halves")
    model = small("llada")
    loop = InnerLoop(model, MemoryConfig(rank=2, layer_fraction=0.4, learning_rate=0.1, **parts))
    valid = jnp.ones(TOKENS.shape, bool)
    write = jax.jit(write_prompt, static_argnums=1)
    _, record = write(jax.random.key(0), loop, theta_of(model), TOKENS, valid)
    assert record.loss.shape == (2, 2) and (record.loss > 0).all() and not record.skipped.any()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_hold_together(page, monkeypatch, my_module):
    monkeypatch.chdir(ROOT)
    for script, arguments in commands(page):
        if any(argument.startswith("--config") for argument in arguments):
            settings_of(script, arguments)


def test_model_folders_of_the_readme_are_shipped_or_made_by_a_line_above(monkeypatch):
    monkeypatch.chdir(ROOT)
    made, scripts = {"memdlm_jax/assets/tiny", "memdlm_jax/assets/reader"}, set()
    for script, arguments in commands(PAGES[0]):
        scripts.add(script)
        if script in ("parity", "check_backbone"):
            assert list(Path(*arguments).glob("*.npz"))
            continue
        if script in ("describe", "convert"):
            assert arguments[0] in {*PUBLISHED, *made}
            continue
        if script == "ask":
            assert arguments[0].removeprefix("--model=") in made
            continue
        if script == "lm_eval":
            continue  # The harness's own options; ``tests/evaluation/test_harness.py`` runs it.
        settings = settings_of(script, arguments)
        found = [getattr(settings, name, "") for name in ("init", "model", "mdlm", "memdlm")]
        known = made | (set(PUBLISHED) if script == "compile_for_tpu" else set())
        assert {folder for folder in found if folder and isinstance(folder, str)} <= known
        if script == "finetune":
            made.add(f"{settings.train.output}/best")
    files = (ROOT / "experiments").glob("[a-z]*.py")
    assert scripts | {"prepare_data"} == {file.stem for file in files}


@pytest.mark.parametrize(("given", "clip_norm"), [("None", None), ("0.5", 0.5), ("2", 2.0)])
def test_clipping_is_set_and_switched_off_from_the_command_line(monkeypatch, given, clip_norm):
    monkeypatch.chdir(ROOT)
    clip = f"--config.optimizer.clip_norm={given}"
    tuning = "--config=experiments/configs/finetune_needles.py"
    settings = settings_of("finetune", [tuning, "--config.init=x", "--config.train.output=y", clip])
    assert settings.optimizer.clip_norm == clip_norm
    pretraining = settings_of("pretrain", ["--config=experiments/configs/tiny_pretrain.py", clip])
    assert pretraining.optimizer.clip_norm == clip_norm


def test_the_snippet_about_answers_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "decoding.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    assert isinstance(names["said"].texts[0], str)
    assert (names["seen"].tokens == names["decoded"].tokens).all()
