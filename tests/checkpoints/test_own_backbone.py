"""A backbone of a user's own module: loaded, run, saved, and named by a model folder."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from memdlm_jax import partitioning
from memdlm_jax.checkpoints import families, hugging_face, orbax_model
from memdlm_jax.evaluation import backbones
from memdlm_jax.models.family import family_of
from memdlm_jax.models.llada import LLaDA
from memdlm_jax.registry import BACKBONES

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones" / "llada_dense"
MODULE = '''
import dataclasses

from memdlm_jax.models.family import family_of
from memdlm_jax.models.llada import LLaDA

NAMES = {path: f"mine.{name}" for path, name in family_of(LLaDA).names.items()}


class Mine(LLaDA):
    """LLaDA whose tensors have other names."""

    family = dataclasses.replace(
        family_of(LLaDA), architectures=("MineLM",), model_types=("mine",), layer="blocks.{}.",
        names=NAMES,
    )  # fmt: skip


class Child(Mine):
    """Has no family of its own."""


number = 7
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own on Python's path."""
    name = f"own_backbone_of_{tmp_path.name}"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return name


@pytest.fixture
def own(module):
    """The user's class."""
    return BACKBONES(f"{module}:Mine")


@pytest.fixture
def registered(monkeypatch):
    """Register for one test."""
    monkeypatch.setattr(BACKBONES, "_parts", dict(BACKBONES._parts))
    return BACKBONES.register


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes):
    config = {k: v for k, v in (config_of(folder) | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def save_own(folder, own):
    """The recorded LLaDA as a folder of the user's backbone."""
    denoiser, theta = hugging_face.load(GOLDEN)
    hugging_face.save(folder, own(denoiser.config), theta, like=GOLDEN)
    return theta


def test_a_folder_names_its_backbone_and_round_trips(tmp_path, module, own):
    theta = save_own(tmp_path / "model", own)
    config = config_of(tmp_path / "model")
    assert config["memdlm_backbone"] == f"{module}:Mine"
    assert (config["architectures"], config["model_type"]) == (["MineLM"], "mine")
    assert "blocks.0.mine.q_proj.weight" in load_file(tmp_path / "model" / "model.safetensors")
    denoiser, loaded = hugging_face.load(tmp_path / "model")
    assert type(denoiser) is own
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)
    hugging_face.save(tmp_path / "again", denoiser, loaded, like=tmp_path / "model")
    for file in ("config.json", "model.safetensors"):
        before, after = (tmp_path / name / file for name in ("model", "again"))
        assert before.read_bytes() == after.read_bytes()


def test_it_computes_what_was_recorded(tmp_path, own):
    save_own(tmp_path / "model", own)
    denoiser, theta = hugging_face.load(tmp_path / "model")
    with np.load(GOLDEN / "golden.npz") as golden:
        recording = {key: golden[key] for key in ("input_ids", "positions", "logits")}
    with jax.default_matmul_precision("highest"):
        found = backbones.compare(denoiser, theta, recording, backbones.TOLERANCE)
    assert len(found) == 1 and all(compared.equal for compared in found)


def test_a_registered_model_type_needs_no_name_in_the_folder(tmp_path, own, registered):
    registered("mine")(own)
    save_own(tmp_path / "model", own)
    edit(tmp_path / "model", memdlm_backbone=None)
    assert type(hugging_face.load(tmp_path / "model")[0]) is own
    edit(tmp_path / "model", architectures=None)
    assert type(hugging_face.load(tmp_path / "model")[0]) is own
    edit(tmp_path / "model", architectures=["LLaDAModelLM"], memdlm_backbone="mine")
    assert type(hugging_face.load(tmp_path / "model")[0]) is own


def test_orbax_keeps_it(tmp_path, own):
    denoiser, theta = hugging_face.load(GOLDEN)
    orbax_model.save(tmp_path / "orbax", own(denoiser.config), theta)
    assert type(orbax_model.load(tmp_path / "orbax")[0]) is own


def test_another_backbone_does_not_keep_the_name(tmp_path, own):
    theta = save_own(tmp_path / "model", own)
    plain = LLaDA(hugging_face.load(tmp_path / "model")[0].config)
    hugging_face.save(tmp_path / "plain", plain, theta, like=tmp_path / "model")
    assert "memdlm_backbone" not in config_of(tmp_path / "plain")
    assert type(hugging_face.load(tmp_path / "plain")[0]) is LLaDA


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("web", r"config.json: memdlm_backbone='web' must be one of .*'llada'.* or MODULE:NAME"),
        ("MODULE:nothing", "memdlm_backbone='own.*:nothing' cannot be imported"),
        ("MODULE:number", "memdlm_backbone='own.*:number' is 7, must be a subclass of Transformer"),
        ("MODULE:Child", "Child has no published form: give the class a Family"),
        (7, "memdlm_backbone=7 must be one of"),
    ],
)
def test_what_is_no_backbone_is_refused(tmp_path, module, own, name, message):
    save_own(tmp_path / "model", own)
    edit(
        tmp_path / "model", memdlm_backbone=str(name).replace("MODULE", module) if name != 7 else 7
    )
    with pytest.raises(ValueError, match=message):
        hugging_face.load(tmp_path / "model")


@pytest.mark.parametrize("at", ["model", "model/package", "."])
def test_code_of_a_model_folder_is_not_run(tmp_path, monkeypatch, at):
    """A folder that somebody else wrote may bring a module and lie on Python's path."""
    folder = tmp_path / "downloads" / "model"
    shutil.copytree(GOLDEN, folder)
    code = tmp_path / "downloads" / at
    code.mkdir(exist_ok=True)
    (folder / "harm_of_a_folder.py").write_text("raise SystemExit('this code was run')")
    (code / "harm_of_a_folder.py").write_text("raise SystemExit('this code was run')")
    monkeypatch.syspath_prepend(tmp_path if at == "." else code)
    module = "downloads.model.harm_of_a_folder" if at == "." else "harm_of_a_folder"
    edit(folder, memdlm_backbone=f"{module}:Mine")
    with pytest.raises(ValueError, match=r"is code beside the weights, in .*, which is never run"):
        hugging_face.load(folder)


def test_what_is_registered_must_be_a_backbone(registered):
    registered("seven")(7)
    with pytest.raises(ValueError, match="backbone 'seven' is 7, must be a subclass of Transf"):
        families.backbone_of({"model_type": "llada"}, "config.json")


def test_a_parameter_without_a_published_name_is_named(tmp_path, own, monkeypatch):
    denoiser, theta = hugging_face.load(GOLDEN)
    names = {path: name for path, name in family_of(own).names.items() if "q_proj" not in path}
    object.__setattr__(family_of(own), "names", names)
    with pytest.raises(ValueError, match="Mine names no tensor for attention/q_proj/kernel"):
        hugging_face.save(tmp_path, own(denoiser.config), theta)


def test_a_backbone_names_the_dimensions_of_its_own_parameters(monkeypatch):
    monkeypatch.setattr(partitioning, "_RULES", list(partitioning._RULES))
    with pytest.raises(ValueError, match=r"name its dimensions by partitioning\.name_dimensions"):
        partitioning.parameter_dimensions("layers/mixer/gate/kernel", 3)
    partitioning.name_dimensions("mixer/gate/kernel", "embed", None)
    assert partitioning.parameter_dimensions("layers/mixer/gate/kernel", 3) == (None, "embed", None)
    with pytest.raises(ValueError, match=r"names=.*'wide'.* must be of \['embed', "):
        partitioning.name_dimensions("mixer/gate/kernel", "wide")
