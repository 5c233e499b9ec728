"""Read and write low-rank adapters in PEFT's format, both ways.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; a pickle is never read.
Modules are matched by the names of their tensors and never by ``target_modules``, whose suffixes
can hit more than what was trained: the head of dense LLaDA ends in ``ff_out`` like the
feed-forward maps below it.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from memdlm_jax import storage
from memdlm_jax.checkpoints import families, folders, weights
from memdlm_jax.checkpoints.families import Entry
from memdlm_jax.checkpoints.weights import Stored
from memdlm_jax.models.lora import Adapted, LoraConfig, kernels
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.parameters import merged
from memdlm_jax.typing import Theta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# Where the tensors say which modules are meant, these change nothing.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "use_rslora",
}  # fmt: skip
# These take what the adapter starts with out of the base, which would have to be changed too.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
_WRITTEN = {
    "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "modules_to_save": None, "peft_type": "LORA", "task_type": None, "use_dora": False,
}  # fmt: skip


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(is_right, value.values())))


_CHECKED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an integer above 0"),
    "lora_alpha": (_is_alpha, "a number above 0"),
    "lora_dropout": (lambda p: type(p) in (int, float) and 0 <= p < 1, "a number in [0, 1)"),
    "rank_pattern": (lambda p: _is_pattern(p, _is_rank), "a map to integers above 0"),
    "alpha_pattern": (lambda p: _is_pattern(p, _is_alpha), "a map to numbers above 0"),
    "target_modules": (lambda t: t is None or isinstance(t, str | list), "a list of names"),
}


@dataclasses.dataclass(frozen=True)
class _Pair:
    """What a folder holds for one published module: A [rank, in], B [out, rank]."""

    entry: Entry
    a: Stored
    b: Stored
    rank: int
    scale: float


def load(folder: str | Path, denoiser: Transformer, theta: Theta) -> tuple[Theta, LoraConfig]:
    """Put a saved adapter on its base.

    Layers and experts of a stack that the adapter lacks get zero matrices; ranks that differ
    within a stack are filled up with zeros.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``, the latter in
            float32, bfloat16 or float16.
        denoiser: the model that the adapter is for.
        theta: its base parameters, kernels [..., in, out] arrays or ``Quantized``.

    Returns:
        Theta with an ``Adapted`` (float32) in the place of every kernel that the adapter names,
        and the adapter's settings; their ``target_modules`` are the paths of these kernels.

    Raises:
        FileNotFoundError: a file is missing; a pickle in its place is not read.
        ValueError: settings that we do not compute, unknown keys, misshapen tensors, matrices
            without their partner, scales that differ within a stack (all are listed).
    """
    folder = storage.path(folder)
    settings = folders.read_json(_file(folder, CONFIG))
    found = weights.contents([_file(folder, WEIGHTS)])
    flat = dict(flax.traverse_util.flatten_dict(merged(theta), sep="/"))
    modules = _weight_entries(denoiser)
    problems = [*_unsupported(settings), *_unmatched(denoiser, modules, found)]
    malformed = list(_malformed(settings))
    # Without these numbers, shapes and scales cannot be judged.
    stacks = {} if malformed else _stacks(modules, found, settings)
    _refuse(folder, [*problems, *malformed, *_misfits(stacks, flat)])
    config = _config(settings)
    for path, stack in stacks.items():
        flat[path] = _adapted(flat[path], stack, config.dropout)
    named = tuple(sorted(path.removesuffix("/kernel") for path in stacks))
    adapted = flax.traverse_util.unflatten_dict(flat, sep="/")
    return adapted, dataclasses.replace(config, target_modules=named)


def config_of(folder: str | Path) -> LoraConfig:
    """Settings of a saved adapter, without its weights.

    Returns:
        As from ``load``, but ``target_modules`` are the published names, or ends of these.

    Raises:
        FileNotFoundError: there is no ``adapter_config.json``.
        ValueError: settings that we do not compute, or malformed ones (all are listed).
    """
    settings = folders.read_json(_file(storage.path(folder), CONFIG))
    _refuse(storage.path(folder), [*_unsupported(settings), *_malformed(settings)])
    return _config(settings)


def base_of(folder: str | Path) -> str:
    """Name or path of the model under a saved adapter, as the adapter spells it.

    Raises:
        FileNotFoundError: there is no ``adapter_config.json``.
        ValueError: it names no model.
    """
    name = folders.read_json(_file(storage.path(folder), CONFIG)).get("base_model_name_or_path")
    if not (name and isinstance(name, str)):
        raise ValueError(f"{folder}: base_model_name_or_path={name!r} must name the model below")
    return name


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {pickles} are pickles, which are never read" if pickles else ""
        raise FileNotFoundError(
            f"{folder / name} is missing: an adapter folder holds {CONFIG} and {WEIGHTS}{hint}"
        )
    return folder / name


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder} is not an adapter to load:\n  " + "\n  ".join(problems))


def _unsupported(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings that we do not compute, and those set that we do not know: later ones may matter."""
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        yield f"init_lora_weights={start!r} is unsupported: it changes the base"
    rights = {"peft_type": "LORA", "bias": "none"}
    known = {*_CHECKED, *_IGNORED, "init_lora_weights"}
    for name, value in settings.items():
        if name not in known and value and value != rights.get(name):
            yield f"{name}={value!r} is unsupported, must be {rights.get(name, 'off')}"


def _malformed(settings: Mapping[str, Any]) -> Iterator[str]:
    """Fields that are missing or of the wrong kind."""
    for name, (is_right, right) in _CHECKED.items():
        if not is_right(settings.get(name)):
            yield f"{name}={settings.get(name)!r} must be {right}"


def _config(settings: Mapping[str, Any]) -> LoraConfig:
    hit = settings.get("target_modules") or LoraConfig.target_modules
    return LoraConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings["lora_dropout"]),
        use_rslora=bool(settings.get("use_rslora", False)),
        target_modules=(hit,) if isinstance(hit, str) else tuple(sorted(map(str, hit))),
    )


def _weight_entries(denoiser: Transformer) -> dict[str, Entry]:
    """Published module -> where its weight goes."""
    entries = families.entries(denoiser)
    end = ".weight"
    return {entry.name.removesuffix(end): entry for entry in entries if entry.name.endswith(end)}


def _why_not(denoiser: Transformer, entry: Entry) -> str:
    """Why a module cannot carry an adapter; empty if it can."""
    if not entry.path.endswith("/kernel"):
        return "adapters stand on linear layers, the unembedding excepted"
    if "/router/" in entry.path and not denoiser.config.router_is_linear:
        return "the router of this model is no linear layer"
    return ""


def _unmatched(
    denoiser: Transformer, modules: Mapping[str, Entry], found: Mapping[str, Stored]
) -> Iterator[str]:
    """Tensors that mean nothing to us, and those without their partner."""
    if not found:
        yield f"{WEIGHTS} holds no tensors"
    for key, stored in found.items():
        match = _KEY.fullmatch(key)
        if match is None or match[1] not in modules:
            yield f"unexpected {key}"
            continue
        module, side = match.groups()
        if reason := _why_not(denoiser, modules[module]):
            yield f"{key}: {reason}"
        elif not stored.supported:
            yield f"{key} has dtype {stored.dtype}, expected F32, BF16 or F16"
        partner = _key(module, "B" if side == "A" else "A")
        if partner not in found:
            yield f"{key} has no partner {partner}"


def _key(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


def _stacks(
    modules: Mapping[str, Entry], found: Mapping[str, Stored], settings: Mapping[str, Any]
) -> dict[str, list[_Pair]]:
    """Path of a kernel -> what there is for its layers and experts."""
    config, stacks = _config(settings), {}  # type: LoraConfig, dict[str, list[_Pair]]
    ranks, alphas = (settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for module, entry in modules.items():
        a, b = found.get(_key(module, "A")), found.get(_key(module, "B"))
        if a is None or b is None or not entry.path.endswith("/kernel"):
            continue
        rank = _by_pattern(ranks, module, config.rank)
        alpha = float(_by_pattern(alphas, module, config.alpha))
        scale = dataclasses.replace(config, rank=rank, alpha=alpha).scale
        stacks.setdefault(entry.path, []).append(_Pair(entry, a, b, rank, scale))
    return stacks


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first expression that the end of a module's name fits, as PEFT finds it."""
    try:
        fits = (v for end, v in pattern.items() if re.match(rf"(.*\.)?({end})$", module))
        return next(fits, pattern.get(module, default))
    except re.error as error:
        raise ValueError(f"{sorted(pattern)}: no regular expressions: {error}") from error


def _misfits(stacks: Mapping[str, list[_Pair]], flat: Mapping[str, Any]) -> Iterator[str]:
    """Matrices that do not fit their kernels, and stacks with several scales."""
    for path, stack in stacks.items():
        if isinstance(flat[path], Adapted):
            yield f"theta/{path} carries an adapter already: merge it first"
            continue
        rows, columns = flat[path].shape[-2:]
        for pair in stack:
            where, rank = pair.entry.name.removesuffix(".weight"), pair.rank
            for side, has, right in (("A", pair.a, (rank, rows)), ("B", pair.b, (columns, rank))):
                if has.shape != right:
                    yield f"{_key(where, side)} has shape {has.shape}, expected {right}"
        scales = sorted({pair.scale for pair in stack})
        if not math.isclose(scales[0], scales[-1], rel_tol=1e-9):
            yield f"theta/{path} would need the scales {scales}: one for a stack is supported"


def _adapted(base: Any, stack: list[_Pair], dropout: float) -> Adapted:
    """One kernel with what there is for its layers and experts, zeros for the rest."""
    *leading, rows, columns = base.shape
    widest = max(stack, key=lambda pair: pair.rank)
    a = np.zeros((*leading, rows, widest.rank), np.float32)
    b = np.zeros((*leading, widest.rank, columns), np.float32)
    for pair in stack:
        a[pair.entry.place][:, : pair.rank] = pair.a.read().T
        b[pair.entry.place][: pair.rank] = pair.b.read().T
    return Adapted(base, jnp.asarray(a), jnp.asarray(b), scale=widest.scale, dropout=dropout)


def save(
    folder: str | Path,
    denoiser: Transformer,
    theta: Theta,
    config: LoraConfig,
    base_model: str = "",
) -> None:
    """Write the adapters of theta as PEFT does; it loads the folder without help of ours.

    One pair of float32 matrices per published module: of each layer and each expert. What ``load``
    filled up with zeros in both matrices is left out. Files appear whole or not at all.

    Args:
        folder: made if missing; an adapter in it is replaced.
        denoiser: whose theta it is.
        theta: with ``Adapted`` kernels, whole or ``Partitioned``.
        config: gives dropout and kind of scaling, and rank and alpha as the defaults; where a
            kernel has others, its own are written.
        base_model: name or path of the base, for those who load the adapter.

    Raises:
        ValueError: theta carries no adapters, or one where the published model has no linear layer.
    """
    adapted = {p: k for p, k in kernels(merged(theta)).items() if isinstance(k, Adapted)}
    if not adapted:
        raise ValueError("theta carries no adapters: there is nothing to save")
    modules = {m: e for m, e in _weight_entries(denoiser).items() if e.path in adapted}
    for entry in modules.values():
        if reason := _why_not(denoiser, entry):
            raise ValueError(f"theta/{entry.path} carries an adapter, but {reason}")
    tensors: dict[str, np.ndarray] = {}
    for path, kernel in adapted.items():
        places = {m: e.place for m, e in modules.items() if e.path == path}
        for module, a, b in _published(kernel, places):
            tensors[_key(module, "A")], tensors[_key(module, "B")] = a, b
    ranks = {m: len(tensors[_key(m, "A")]) for m in modules if _key(m, "A") in tensors}
    alphas = {m: _alpha(config, adapted[modules[m].path].scale, ranks[m]) for m in ranks}
    alpha = _alpha(config, config.scale, config.rank)
    settings = _WRITTEN | {
        "alpha_pattern": _pattern(alphas, alpha),
        "base_model_name_or_path": base_model or None,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "r": config.rank,
        "rank_pattern": _pattern(ranks, config.rank),
        "target_modules": _suffixes(ranks, _every_module(denoiser)),
        "use_rslora": config.use_rslora,
    }
    folder, text = storage.path(folder), json.dumps(settings, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with storage.replacing(folder / CONFIG) as file, storage.replacing(folder / WEIGHTS) as data:
        save_file(tensors, data, metadata={"format": "pt"})
        file.write_text(text, encoding="utf-8")


def _published(kernel: Adapted, places: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Triples of a published module, its A [r, in] and its B [out, r], on the host."""
    a, b = np.asarray(kernel.A, np.float32), np.asarray(kernel.B, np.float32)
    ranks = _used_ranks(a, b)
    for module, place in places.items():
        if rank := int(ranks[place]):
            down, up = a[place][:, :rank].T, b[place][:rank].T
            yield module, np.ascontiguousarray(down), np.ascontiguousarray(up)


def _used_ranks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many leading components of each matrix of a stack are not zero in both A and B."""
    total = a.shape[-1]
    # Unless a matrix uses all of them, it was not ``load`` that filled them in.
    used = np.where(a.any(-2) | b.any(-1), np.arange(1, total + 1), 0).max(-1)
    return used if used.max() == total else np.full_like(used, total)


def _alpha(config: LoraConfig, scale: float, rank: int) -> int | float:
    """The alpha that gives a scale; a whole number as an integer, as PEFT has it."""
    alpha = scale * (math.sqrt(rank) if config.use_rslora else rank)
    # An alpha that was divided by r before comes back without the error of rounding.
    same = math.isclose(alpha, config.alpha, rel_tol=1e-12)
    alpha = float(config.alpha if same else f"{alpha:.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Ends of names -> value, for the modules whose value is not the default."""
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        here = [module for module in values if values[module] == value]
        pattern.update(dict.fromkeys(_suffixes(here, values), value))
    return pattern


def _every_module(denoiser: Transformer) -> set[str]:
    """Names of all published modules, those that hold others too."""
    entries = families.entries(denoiser)
    parts = (entry.name.split(".")[:-1] for entry in entries)
    return {name for path in parts for name in itertools.accumulate(path, "{}.{}".format)}


def _suffixes(wanted: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest ends of names that PEFT finds exactly the wanted modules by.

    PEFT takes every module whose name is one of these or ends in a dot and one of them.
    """
    others = {end for name in set(every) - set(wanted) for end in _ends(name)}
    return sorted({next(end for end in _ends(name) if end not in others) for name in wanted})


def _ends(name: str) -> Iterator[str]:
    """``c``, ``b.c``, ``a.b.c``."""
    parts = reversed(name.split("."))
    return itertools.accumulate(parts, lambda end, part: f"{part}.{end}")
