"""Our numbers against those of the public code, and a replay tool that notices a difference."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import parity as script
from memdlm_jax.evaluation import parity
from tests.evaluation import parity_oracle

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case.name: case for case in parity.load_folder(GOLDEN)[0]}


def errors(case):
    return {found.name: found.error for found in parity.replay(case)}


UPDATES = {"inner loss", "inner gradient norm", "inner gradient", "fast weights"}
EXACT = {"outer loss", "exact gradient", "logits"}
OUTER = {"outer loss", "outer gradient", "outer gradient of phi", "logits"}


@pytest.mark.parametrize("name", CASES)
def test_recorded_case(name):
    """Float64 within 1e-9 (exact meta-gradients 1e-8), float32 within 2e-5, tensor by tensor."""
    found = {quantity.name: quantity for quantity in parity.replay(CASES[name])}
    if name.startswith("second_order"):
        assert set(found) == {"inner loss", "fast weights"} | EXACT
    elif name.startswith("inference"):
        assert set(found) == UPDATES | {"logits", "wrong tokens"}
    else:
        assert set(found) == UPDATES | OUTER
    assert {q.tolerance for q in found.values()} <= {1e-9, 1e-8, 2e-5}
    assert not [q for q in found.values() if not q.equal]


def test_every_variant_of_the_public_code_is_among_the_cases():
    seen = {(key, str(value)) for case in CASES.values() for key, value in case.memory.items()}
    for key, values in {
        "mem_masking_strategy": ("pmc", "pre_only", "no_progressive", "progressive_memory"),
        "mem_inner_loss_type": ("ce", "distill", "distill_reverse", "distill_hidden"),
        "mem_distill_hidden_type": ("mse", "cosine"),
        "mem_inner_loss_mask_mode": ("student_masked", "newly_revealed"),
        "mem_inner_adapter_type": ("lora", "full"),
        "mem_num_inner_steps": ("1", "2", "3"),
        "mem_inner_grad_clip": ("1.0", "0.0"),
    }.items():
        assert {(key, value) for value in values} <= seen


def test_memory_off_is_the_plain_model():
    case = CASES["default_f64"]
    with jax.enable_x64(True):
        model, theta = parity.denoiser_of(case), parity.theta_of(case)
        for tokens, logits in (("x_t", "xt"), ("input_ids", "x0")):
            hidden = model.trunk(theta, case.arrays[tokens], split=2)
            ours = model.readout(theta, model.head(theta, None, hidden, split=2))
            assert parity.worst([(ours, case.arrays[f"base_logits_{logits}"])]) <= 1e-12


OTHERS = {
    "sequence_attention": {
        "loss_norm_type": "sequence", "mem_inner_target_modules": "q_proj,k_proj,v_proj,o_proj",
    },
    "both_full": {
        "mem_inner_target_modules": "gate_proj,up_proj,down_proj,q_proj,v_proj",
        "mem_inner_adapter_type": "full",
    },
    "pads_both": {"mem_pad_unmask_mode": "both"},
    "pads_inner_sequence_distill": {
        "mem_pad_unmask_mode": "inner", "mem_inner_loss_type": "distill",
        "loss_norm_type": "sequence",
    },
    "four_steps_reverse": {"updates": 4, "mem_inner_loss_type": "distill_reverse"},
    "tied": {"tied": True, "mem_inner_layer_fraction": 1.0},
    "early_below_the_split": {
        "mem_inner_loss_type": "distill_hidden", "mem_inner_layer_fraction": -0.34,
    },
    "early_among_the_adapted": {
        "mem_inner_loss_type": "distill_hidden", "mem_inner_layer_fraction": -0.7,
        "mem_distill_hidden_type": "cosine",
    },
    "negative_with_ce": {"mem_inner_layer_fraction": -0.5},
    "epochs_distill": {
        "mem_num_inner_epochs": 2, "mem_inner_loss_type": "distill",
    },
    "without_memory": {"mem_enabled": False, "loss_norm_type": "sequence"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_and_settings_against_a_plain_program(name, tmp_path):
    with jax.enable_x64(True):
        parity_oracle.make(tmp_path, **OTHERS[name])
    (case,), _ = parity.load_folder(tmp_path)
    found = parity.replay(case)
    plain = {"outer loss", "outer gradient", "logits"}
    expected = plain if name == "without_memory" else UPDATES | OUTER
    assert {quantity.name for quantity in found} == expected
    assert not [quantity for quantity in found if not quantity.equal]
    if name == "early_among_the_adapted":
        assert case.arrays["inner_grad_norm"].min() > 0


@pytest.mark.parametrize(
    ("key", "quantity"),
    [
        ("inner_loss", "inner loss"),
        ("inner_grad_norm", "inner gradient norm"),
        ("inner_grad/1/model.layers.3.mlp.up_proj.A", "inner gradient"),
        ("fast/2/model.layers.3.mlp.down_proj.B", "fast weights"),
        ("outer_loss", "outer loss"),
        ("outer_grad/model.layers.0.self_attn.k_proj.weight", "outer gradient"),
        ("outer_grad_fast/model.layers.3.mlp.gate_proj.A", "outer gradient of phi"),
        ("outer_logits", "logits"),
    ],
)
def test_one_changed_entry_is_noticed(key, quantity, recorded_default):
    case, clean = recorded_default
    changed = case.arrays[key].copy()
    changed.flat[0] += 1e-7 * max(np.linalg.norm(changed), 1e-3)
    arrays = case.arrays | {key: changed}
    found = {
        q.name: q.equal
        for q in parity.replay(parity.Case("changed", case.settings, arrays, case.weights))
    }
    assert not found.pop(quantity)
    assert all(found.values()) and all(error < 1e-9 for error in clean.values())


@pytest.fixture(scope="module")
def recorded_default():
    return CASES["default_f64"], errors(CASES["default_f64"])


class TestWorst:
    def test_is_relative_to_each_tensor(self):
        big, small = np.full(4, 1e3), np.full(4, 1.0)
        assert parity.worst([(big, big), (small * 1.5, small)]) == pytest.approx(0.5)

    def test_a_zero_tensor_is_compared_with_the_largest(self):
        theirs = [np.zeros(3), np.full(4, 2.0)]
        ours = [np.full(3, 1e-3), theirs[1]]
        found = parity.worst(zip(ours, theirs, strict=True))
        assert found == pytest.approx(np.sqrt(3) * 1e-3 / 4)

    def test_nan_and_wrong_shapes_are_never_equal(self):
        assert parity.worst([(np.array([np.nan]), np.ones(1))]) == np.inf
        assert parity.worst([(np.ones(2), np.ones(3))]) == np.inf
        assert parity.worst([(np.ones(1), np.array([np.nan]))]) == np.inf


class TestFolder:
    def make(self, path, **settings):
        with jax.enable_x64(True):
            return parity_oracle.make(path, **settings)

    def test_names_of_files_do_not_matter(self, tmp_path):
        for number, name in enumerate(("weights", "second_order_b1_clip1_f64", "b1_row0_f64")):
            target = "weights_of_all.npz" if name == "weights" else f"{number}.npz"
            shutil.copy(GOLDEN / f"{name}.npz", tmp_path / target)
        cases, _ = parity.load_folder(tmp_path)
        assert [case.name for case in cases] == ["b1_row0_f64", "second_order_b1_clip1_f64"]
        assert not [q for q in parity.replay(cases[1]) if not q.equal]

    def test_weights_are_chosen_by_the_shapes_of_the_model(self, tmp_path):
        self.make(tmp_path)
        shutil.copy(GOLDEN / "weights.npz", tmp_path / "weights_of_another.npz")
        (case,), _ = parity.load_folder(tmp_path)
        assert case.weights["model.norm.weight"].shape == (24,)

    def test_missing_weights_are_said(self, tmp_path):
        self.make(tmp_path)
        (tmp_path / "weights.npz").unlink()
        cases, problems = parity.load_folder(tmp_path)
        assert not cases
        assert re.match(r"made: needs one weights.*fitting are \[\]", problems["made"])

    def test_a_missing_source_is_said(self, tmp_path):
        for name in ("weights", "second_order_b1_clip1_f64", "K1_f64"):
            shutil.copy(GOLDEN / f"{name}.npz", tmp_path)
        cases, problems = parity.load_folder(tmp_path)
        assert [case.name for case in cases] == ["K1_f64"], "the others are replayed all the same"
        (problem,) = problems.values()
        assert "source_case='b1_row0_f64' is not in" in problem

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mem_inner_dropout": 0.1}, "mem_inner_dropout must be 0"),
            ({"mem_inner_new": 1}, r"unknown settings \['mem_inner_new'\]"),
            ({"right_shift_logits": True}, "right_shift_logits=True"),
        ],
    )
    def test_what_cannot_be_replayed_is_said(self, tmp_path, settings, message):
        self.make(tmp_path, **settings)
        (case,), _ = parity.load_folder(tmp_path)
        with pytest.raises(parity.BadCase, match=f"made: .*{message}"):
            parity.replay(case)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"config_json": "{"}, "config_json is no JSON"),
            ({"config_json": "[]"}, "config_json has no 'dtype' that is str"),
            ({"dtype": "bfloat16"}, r"dtype='bfloat16' must be one of \['float32', 'float64'\]"),
            ({"model": {"hidden_size": 24}}, "model lacks 'num_attention_heads'"),
            ({"num_inner_updates": 3}, "num_inner_updates=3, but there are 2 states"),
            ({"config": {"mem_inner_target_modules": "gate_proj,w1"}}, "must be among"),
            ({"config": {"mem_inner_target_modules": ["gate_proj"]}}, "AttributeError"),
            ({"config": {"mem_inner_layer_fraction": 1e-20}}, "adapts none of 3 layers"),
            ({"config": {"mem_inner_grad_clip": None}}, "not supported between"),
            ({"step_loss_mask": lambda x: x[..., :-1]}, "step_loss_mask has shape"),
            ({"step_weight": lambda x: x[:1]}, "step_weight has shape"),
            ({"fast/0/model.layers.2.mlp.up_proj.A": lambda x: x[:2]}, "ValueError"),
        ],
    )
    def test_malformed_cases_are_refused_in_words(self, tmp_path, changed, message):
        arrays = self.make(tmp_path)
        settings = json.loads(str(arrays["config_json"]))
        for key, value in changed.items():
            if callable(value):
                arrays[key] = value(arrays[key])
            elif key == "config":
                settings["config"] |= value
            elif key != "config_json":
                settings[key] = value
        arrays["config_json"] = changed.get("config_json", json.dumps(settings))
        np.savez(tmp_path / "some_file.npz", **arrays)
        cases, problems = parity.load_folder(tmp_path)
        for case in cases:
            with pytest.raises(parity.BadCase) as error:
                parity.replay(case)
            problems[case.name] = str(error.value)
        (problem,) = problems.values()
        assert re.search(message, problem)

    def test_cases_of_one_name_are_told_apart(self, tmp_path):
        self.make(tmp_path)
        shutil.copy(tmp_path / "some_file.npz", tmp_path / "another.npz")
        cases, problems = parity.load_folder(tmp_path)
        assert [case.name for case in cases] == ["made", "made (some_file.npz)"] and not problems

    def test_a_tied_matrix_may_be_stored_twice(self, tmp_path):
        self.make(tmp_path, **OTHERS["tied"])
        stored = dict(np.load(tmp_path / "weights.npz"))
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
        np.savez(tmp_path / "weights.npz", **stored)
        (case,), _ = parity.load_folder(tmp_path)
        assert not [q for q in parity.replay(case) if not q.equal]

    def test_nan_in_norms_and_sums_is_never_equal(self):
        case = CASES["K1_f64"]
        key = "outer_grad_norm/model.layers.0.self_attn.k_proj.weight"
        arrays = case.arrays | {key: np.array(np.nan)}
        changed = parity.Case("changed", case.settings, arrays, case.weights)
        assert errors(changed)["outer gradient"] == np.inf

    def test_a_missing_array_is_named(self, tmp_path):
        arrays = self.make(tmp_path)
        del arrays["outer_logits"]
        np.savez(tmp_path / "some_file.npz", **arrays)
        (case,), _ = parity.load_folder(tmp_path)
        with pytest.raises(parity.BadCase, match="made: has no array or setting 'outer_logits'"):
            parity.replay(case)


class TestScript:
    def test_equal_cases_exit_with_zero(self, tmp_path, capsys):
        with jax.enable_x64(True):
            parity_oracle.make(tmp_path)
        assert script.check(tmp_path) == 0
        printed = capsys.readouterr().out
        assert "made\n" in printed and "DIFFERS" not in printed
        assert "1 cases, 8 quantities compared; different: none; not replayed: none" in printed

    def test_a_difference_exits_with_one(self, tmp_path, capsys):
        with jax.enable_x64(True):
            arrays = parity_oracle.make(tmp_path)
        arrays["outer_loss"] = arrays["outer_loss"] * (1 + 1e-8)
        np.savez(tmp_path / "some_file.npz", **arrays)
        assert script.check(tmp_path) == 1
        printed = capsys.readouterr().out
        assert printed.count("DIFFERS") == 1 and "different: made;" in printed

    def test_what_cannot_be_replayed_exits_with_two(self, tmp_path, capsys):
        with jax.enable_x64(True):
            parity_oracle.make(tmp_path, mem_inner_dropout=0.5)
        assert script.check(tmp_path) == 2
        assert "not replayed: made" in capsys.readouterr().out

    @pytest.mark.parametrize("content", [None, b"no archive"])
    def test_an_empty_or_broken_folder_exits_with_two(self, tmp_path, capsys, content):
        if content is not None:
            (tmp_path / "a.npz").write_bytes(content)
        assert script.check(tmp_path) == 2
        printed = capsys.readouterr()
        assert "error: " in printed.out + printed.err

    def test_one_bad_case_does_not_hide_the_others(self, tmp_path, capsys):
        with jax.enable_x64(True):
            parity_oracle.make(tmp_path)
        (tmp_path / "a.npz").write_bytes(b"no archive")
        np.savez(tmp_path / "b.npz", config_json="[1]")
        assert script.check(tmp_path) == 2
        printed = capsys.readouterr().out
        assert (
            "1 cases, 8 quantities compared; different: none; not replayed: a.npz, b.npz" in printed
        )
