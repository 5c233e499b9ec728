"""Every tiny published checkpoint against what the published code computed on it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import check_backbone
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.evaluation import backbones

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"
FOLDERS = ("llada_dense", "llada_moe", "llada2_0", "llada2_1", "dream")


@pytest.mark.parametrize("name", FOLDERS)
def test_all_recorded_cases(name):
    found = check_backbone.check(GOLDEN / name, None, backbones.TOLERANCE)
    with np.load(GOLDEN / name / "golden.npz") as golden:
        inputs = ("input_ids", "positions", "attention_mask", "attend")
        outputs = [key for key in golden.files if not key.startswith(inputs)]
    assert [compared.name for compared in found] == outputs
    different = [compared for compared in found if not compared.equal]
    assert not different
    compared = {c.name for c in found if c.tolerance is not None and not c.note}
    least = {"logits", "hidden", "final_norm", "attn_out", "mlp_out"}
    assert least <= compared


@pytest.fixture
def folder(tmp_path):
    """A copy of the dense checkpoint."""
    shutil.copytree(GOLDEN / "llada_dense", tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        check_backbone.main([str(a) for a in arguments])
    return stopped.value.code, capsys.readouterr().out


def change_golden(folder, **changes):
    with np.load(folder / "golden.npz") as golden:
        content = {key: golden[key] for key in golden.files}
    keep = ("input_ids", "positions", "logits")
    np.savez(folder / "golden.npz", **{k: content[k] for k in keep} | changes)


def test_the_script_passes_and_prints_the_worst_error(folder, capsys):
    change_golden(folder)
    code, said = run(capsys, folder)
    assert code == 0 and "logits" in said and "different: none; not checked: none" in said


def test_a_changed_weight_is_found(folder, capsys):
    change_golden(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.blocks.1.up_proj.weight"][0, 0] += 0.1
    save_file(weights, folder / "model.safetensors")
    code, said = run(capsys, folder)
    assert code == 1 and "DIFFERS logits" in said


def test_what_is_not_understood_is_no_success(folder, capsys):
    change_golden(folder, logits_upsidedown=np.zeros(3), loss=np.zeros(()))
    code, said = run(capsys, folder)
    assert code == 1
    assert "DIFFERS logits_upsidedown unknown quantity or case" in said
    assert "DIFFERS loss unknown quantity or case" in said


def test_different_shapes_are_named(folder, capsys):
    """With a cut array, ``nan`` alone would not tell a wrong model from a wrong recording."""
    with np.load(folder / "golden.npz") as golden:
        hidden, logits = golden["hidden"][:-1], golden["logits_bf16_compute"][..., :-1]
    change_golden(folder, hidden=hidden, logits_bf16_compute=logits)
    code, said = run(capsys, folder)
    assert code == 1 and "nan" not in said
    assert "DIFFERS hidden shape (3, 2, 17, 64) in the recording, (4, 2, 17, 64) here" in said
    assert "DIFFERS logits_bf16_compute shape (2, 17, 383) in the recording, (2, 17, 384)" in said


def golden_of(name):
    with np.load(GOLDEN / name / "golden.npz") as golden:
        return {key: golden[key] for key in golden.files}


def compared(name, recording):
    denoiser, theta = hugging_face.load(GOLDEN / name)
    found = backbones.compare(denoiser, theta, recording, backbones.TOLERANCE)
    return {c.name: c for c in found}


def test_a_recording_of_some_layers_is_compared_layer_by_layer():
    golden = golden_of("llada_moe")
    inputs = {key: golden[key] for key in ("input_ids", "attention_mask_rightpad")}
    few = {
        "layers": np.array([0, 2]),
        "hidden": golden["hidden"][[0, 1, 3]],
        "attn_out": golden["attn_out"][[0, 2]],
        "router_logits": golden["router_logits"][[0, 2]],
        "topk_idx": golden["topk_idx"][[0, 2]],
        "topk_weight": golden["topk_weight"][[0, 2]],
        "hidden_rightpad": golden["hidden_rightpad"][[1, 3]],
        "hidden_rightpad_layer1": golden["hidden_rightpad"][2],
        "hidden_layer2": golden["hidden"][3],
        "mlp_out_layer1": golden["mlp_out"][1],
        "topk_idx_layer1": golden["topk_idx"][1],
    }
    found = compared("llada_moe", inputs | few)
    assert set(found) == set(few) - {"layers"}
    assert all(one.equal for one in found.values())
    # The numbers matter: other layers are not equal.
    found = compared("llada_moe", inputs | few | {"layers": np.array([0, 1])})
    same = {"topk_idx_layer1", "mlp_out_layer1", "hidden_layer2", "hidden_rightpad_layer1"}
    assert {name for name, one in found.items() if one.equal} == same


def test_layers_that_the_model_lacks_are_named():
    golden = golden_of("llada2_0")  # Its first layer has no experts.
    inputs = {"input_ids": golden["input_ids"]}
    wrong = {
        "attn_out_layer3": golden["attn_out"][2],
        "topk_idx_layer0": golden["topk_idx_layer1"],
    }
    found = compared("llada2_0", inputs | wrong)
    assert found["attn_out_layer3"].note == "layer 3 of the model has no attn_out"
    assert found["topk_idx_layer0"].note == "layer 0 of the model has no topk_idx"
    assert not any(one.equal for one in found.values())
    with pytest.raises(ValueError, match=r"layers of the recording has \[7\].*layers 0 to 2"):
        compared("llada2_0", inputs | {"layers": np.array([1, 7])})


def test_one_bad_folder_does_not_hide_the_others(folder, tmp_path, capsys):
    change_golden(folder)
    (tmp_path / "empty").mkdir()
    code, said = run(capsys, tmp_path / "empty", folder)
    assert code == 2
    assert "golden.npz is missing" in said and "logits" in said


def test_a_wrong_expert_counts_as_different():
    golden = dict(np.load(GOLDEN / "llada_moe" / "golden.npz"))
    golden = {key: golden[key] for key in ("input_ids", "topk_idx")}
    golden["topk_idx"] = golden["topk_idx"].copy()
    golden["topk_idx"][0, 0, 0, 0] = 7 - golden["topk_idx"][0, 0, 0, 0]
    denoiser, theta = hugging_face.load(GOLDEN / "llada_moe")
    (found,) = backbones.compare(denoiser, theta, golden, backbones.TOLERANCE)
    assert found.error >= 1 and not found.equal


@pytest.mark.parametrize("name", ["llada_moe", "llada2_1"])
def test_the_model_types_that_other_programs_ask_for(name, tmp_path):
    """MemDLM has users edit ``model_type``; the weights stay the same."""
    edited = json.loads((GOLDEN / name / "config.json").read_text())
    kinds = {"llada_moe": ["lladamoe"], "llada2_1": ["llada2_moe_21", "llada21_moe"]}[name]
    for kind in kinds:
        shutil.copytree(GOLDEN / name, tmp_path / kind)
        (tmp_path / kind / "config.json").write_text(json.dumps(edited | {"model_type": kind}))
        denoiser, _ = hugging_face.load(tmp_path / kind)
        assert denoiser == hugging_face.load(GOLDEN / name)[0]
