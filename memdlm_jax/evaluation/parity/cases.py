"""What a recorded case is, and how a folder of them is read."""

import dataclasses
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
"""Largest relative error that counts as equal, by the dtype of the case."""

META_TOLERANCE = 1e-8
"""The same for exact meta-gradients in float64."""

_DEFAULTS = {
    "mem_enabled": True,
    "mem_num_inner_steps": 2,
    "mem_num_inner_epochs": 1,
    "mem_masking_strategy": "pmc",
    "mem_inner_loss_type": "ce",
    "mem_distill_temperature": 1.0,
    "mem_distill_hidden_type": "mse",
    "mem_inner_loss_mask_mode": "student_masked",
    "mem_inner_lr": 0.1,
    "mem_inner_grad_clip": 1.0,
    "mem_inner_rank": 32,
    "mem_inner_alpha": 64.0,
    "mem_inner_dropout": 0.0,
    "mem_inner_layer_fraction": 0.1,
    "mem_inner_target_modules": "gate_proj,up_proj,down_proj",
    "mem_inner_adapter_type": "lora",
    "mem_pad_unmask_mode": "none",
}
# They change no number of a replay: masks and weights are recorded, the rest is about processes.
_WITHOUT_EFFECT = {
    "mem_mask_ratio_epsilon", "mem_prompt_mask_ratio", "mem_sync_inner",
    "mem_progressive_consistent_start_scale", "mem_inner_gradient_checkpointing", "time_epsilon",
}  # fmt: skip
_LOSS_DEFAULTS = {
    "loss_weight_type": "scheduler",
    "loss_norm_type": "token",
    "right_shift_logits": False,
}


KNOWN_SETTINGS = {*_DEFAULTS, *_LOSS_DEFAULTS, *_WITHOUT_EFFECT}
"""Names of the public code's settings that a case may hold."""

_INPUTS = ("input_ids", "labels", "maskable_mask", "anchor_mask", "x_t", "outer_weight", "prompt")


class BadCase(ValueError):
    """A file is not a case that can be replayed; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One recorded call.

    Attributes:
        name: as the case calls itself.
        settings: its ``config_json``.
        arrays: everything else in the file, with the inputs of its source case if it has one.
        weights: base weights under their published names.
    """

    name: str
    settings: dict[str, Any]
    arrays: Arrays
    weights: Arrays

    @property
    def dtype(self) -> str:
        """``float32`` or ``float64``."""
        return self.settings["dtype"]

    @property
    def memory(self) -> dict[str, Any]:
        """Settings under the public code's argument names, its defaults filled in."""
        outside = {key: self.settings[key] for key in _LOSS_DEFAULTS if key in self.settings}
        return _DEFAULTS | _LOSS_DEFAULTS | outside | self.settings["config"]


def load_folder(folder: str | Path) -> tuple[list[Case], dict[str, str]]:
    """Read a folder.

    Returns:
        (cases in the order of their names, {name or file: why it cannot be replayed}).

    Raises:
        FileNotFoundError: there is no such folder, or no case in it.
    """
    folder = Path(folder)
    problems: dict[str, str] = {}
    weights, contents = [], {}
    for file in sorted(folder.glob("*.npz")):
        try:
            arrays = _read(file)
            if file.name.startswith("weights"):
                weights.append((file, arrays))
                continue
            settings = _settings_of(file, arrays)
        except BadCase as error:
            problems[file.name] = str(error)
            continue
        name = str(settings.get("name", file.stem))
        # A second case of the same name is one of its own: the file tells them apart.
        contents[f"{name} ({file.name})" if name in contents else name] = settings, arrays
    if not contents and not problems:
        raise FileNotFoundError(f"no case in {folder.absolute()}: it must hold .npz files")
    cases = []
    for name, (settings, arrays) in sorted(contents.items()):
        try:
            given = _with_source(name, settings, arrays, contents)
            cases.append(Case(name, settings, given, _weights_of(name, settings, weights)))
        except BadCase as error:
            problems[name] = str(error)
    return cases, problems


def _settings_of(file: Path, arrays: Arrays) -> dict[str, Any]:
    if "config_json" not in arrays:
        raise BadCase(f"{file.name}: has no array 'config_json'")
    try:
        settings = json.loads(str(arrays.pop("config_json")))
    except json.JSONDecodeError as error:
        raise BadCase(f"{file.name}: config_json is no JSON ({error})") from error
    for key, kind in (("dtype", str), ("model", dict), ("mask_token_id", int), ("config", dict)):
        if not isinstance(settings, dict) or not isinstance(settings.get(key), kind):
            raise BadCase(f"{file.name}: config_json has no {key!r} that is {kind.__name__}")
    if settings["dtype"] not in TOLERANCE:
        raise BadCase(
            f"{file.name}: dtype={settings['dtype']!r} must be one of {sorted(TOLERANCE)}"
        )
    return settings


def _with_source(
    name: str, settings: dict[str, Any], arrays: Arrays, contents: Mapping[str, Any]
) -> Arrays:
    """The case's arrays, with the inputs of its source case where it has none of its own."""
    source = settings.get("source_case")
    if source is None:
        return arrays
    if source not in contents:
        raise BadCase(f"{name}: its source_case={source!r} is not in the folder")
    given = contents[source][1].items()
    return {key: array for key, array in given if _is_input(key)} | arrays


def _is_input(key: str) -> bool:
    return key in _INPUTS or key.startswith(("step_", "fast/0/"))


def _read(file: Path) -> Arrays:
    try:
        with np.load(file) as content:
            return dict(content)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadCase(f"{file}: cannot be read ({error})") from error


def _weights_of(
    name: str, settings: dict[str, Any], candidates: Iterable[tuple[Path, Arrays]]
) -> Arrays:
    """The only weights in the folder that have the shapes of the case's model."""
    model, output = settings["model"], "lm_head.weight"
    try:
        wanted = _published_shapes(model)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadCase(f"{name}: config_json's model lacks {error}") from error
    tied = model.get("tie_word_embeddings")
    fitting = []
    for file, arrays in candidates:
        # Published files of tied models often hold the shared matrix twice.
        used = {key: a for key, a in arrays.items() if not (tied and key == output)}
        shapes = {key: array.shape for key, array in used.items()}
        if shapes == wanted or (tied is not False and shapes | {output: wanted[output]} == wanted):
            fitting.append((file, used))
    named = settings.get("weights")
    if named is not None:
        fitting = [(file, arrays) for file, arrays in fitting if named in (file.name, file.stem)]
    if len(fitting) != 1:
        found = [file.name for file, _ in fitting]
        raise BadCase(
            f"{name}: needs one weights*.npz with the shapes of its model, {model}; "
            f"fitting are {found}"
        )
    return fitting[0][1]


def _published_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, heads = model["hidden_size"], model["num_attention_heads"]
    inner, vocabulary = model["intermediate_size"], model["vocab_size"]
    narrow = width // heads * model["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(model["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    return shapes | {"lm_head.weight": (vocabulary, width)}
