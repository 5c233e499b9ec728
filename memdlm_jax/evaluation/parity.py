"""Replay recorded calls of the public MemDLM code and measure how far our numbers are from theirs.

A case is one ``.npz`` file: inputs, masks, weights and A of one training step (or of one prompt)
with the inner losses, gradients, fast weights, outer loss and logits that the public code computed
from them. ``tests/golden/README.md`` lists the arrays. What a case is follows from its
``config_json`` and its arrays alone. Beside the cases lie the base weights, ``weights*.npz``.
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion import decode, masking
from memdlm_jax.diffusion.decode import DecodeConfig
from memdlm_jax.diffusion.objective import gather_targets
from memdlm_jax.memory import fast_weights, inner_loop, losses, meta_gradient, trajectory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.trajectory import State, Trajectory
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Batch, Hidden, Mask, Phi, Theta, Tokens

Arrays = dict[str, np.ndarray]

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
"""Largest relative error that counts as equal, by the dtype of the case."""

META_TOLERANCE = 1e-8
"""The same for exact meta-gradients in float64."""

_LAYER_NAMES = {
    "input_layernorm": ("attention_norm", "scale"),
    "post_attention_layernorm": ("mlp_norm", "scale"),
    **{f"self_attn.{n}_proj": ("attention", f"{n}_proj", "kernel") for n in "qkvo"},
    **{f"mlp.{n}_proj": ("mlp", f"{n}_proj", "kernel") for n in ("gate", "up", "down")},
}
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


def denoiser_of(case: Case) -> LLaDA:
    """The case's model in its dtype."""
    model = case.settings["model"]
    length = case.arrays["prompt" if "prompt" in case.arrays else "input_ids"].shape[-1]
    return LLaDA(
        LLaDAConfig(
            vocab_size=model["vocab_size"],
            width=model["hidden_size"],
            num_layers=model["num_hidden_layers"],
            num_heads=model["num_attention_heads"],
            num_kv_heads=model["num_key_value_heads"],
            hidden_features=model["intermediate_size"],
            mask_token_id=case.settings["mask_token_id"],
            max_length=max(length, 1),
            rope_theta=model["rope_theta"],
            norm_epsilon=model["rms_norm_eps"],
            tied="lm_head.weight" not in case.weights,
            dtype=case.dtype,
            param_dtype=case.dtype,
        )
    )


def theta_of(case: Case) -> Theta:
    """The case's base weights as our tree, in its dtype."""
    named = {name: array.astype(case.dtype) for name, array in case.weights.items()}

    def stacked(name):
        layers = range(case.settings["model"]["num_hidden_layers"])
        return np.stack([named[f"model.layers.{i}.{name}.weight"].T for i in layers])

    layers: dict[str, Any] = {}
    for name, path in _LAYER_NAMES.items():
        node = layers
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = stacked(name)
    theta = {
        "embedding": named["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": {"scale": named["model.norm.weight"]},
    }
    if "lm_head.weight" in named:
        theta["unembedding"] = named["lm_head.weight"].T
    return jax.tree.map(jnp.asarray, theta)


def published_names(theta: Theta) -> Arrays:
    """{published name: array} of a tree like theta; inverse of ``theta_of``."""
    theta = jax.device_get(theta)
    named = {
        "model.embed_tokens.weight": theta["embedding"],
        "model.norm.weight": theta["final_norm"]["scale"],
    }
    if "unembedding" in theta:
        named["lm_head.weight"] = theta["unembedding"].T
    for name, path in _LAYER_NAMES.items():
        stacked = functools.reduce(lambda node, part: node[part], path, theta["layers"])
        for i, leaf in enumerate(stacked):
            named[f"model.layers.{i}.{name}.weight"] = leaf.T
    return named


def memory_config(
    case: Case, mode: Literal["first_order", "trunk_stopped", "exact"] = "first_order"
) -> MemoryConfig:
    """Our settings for the case's; masks, weights and counts come from the arrays.

    Raises:
        BadCase: a setting is unknown or cannot be replayed, naming it.
    """
    theirs = case.memory
    unknown = sorted(set(theirs) - set(_DEFAULTS) - set(_LOSS_DEFAULTS) - _WITHOUT_EFFECT)
    if unknown:
        raise BadCase(f"{case.name}: unknown settings {unknown}; known are {sorted(_DEFAULTS)}")
    if theirs["mem_inner_dropout"]:
        raise BadCase(f"{case.name}: mem_inner_dropout must be 0: what it dropped is not recorded")
    if theirs["right_shift_logits"]:
        raise BadCase(f"{case.name}: right_shift_logits=True is not of this model family")
    clip = theirs["mem_inner_grad_clip"]
    known = {path.split("/")[-1]: path for path in denoiser_of(case).adaptable()}
    wanted = [name.strip() for name in theirs["mem_inner_target_modules"].split(",")]
    if not set(wanted) <= set(known):
        raise BadCase(
            f"{case.name}: mem_inner_target_modules={wanted} must be among {sorted(known)}"
        )
    strategy = theirs["mem_masking_strategy"]
    try:
        return MemoryConfig(
            masking="pmc" if strategy == "progressive_memory_consistent" else strategy,
            steps=2
            if strategy in ("pre_only", "no_progressive")
            else theirs["mem_num_inner_steps"],
            epochs=max(theirs["mem_num_inner_epochs"], 1),
            loss=theirs["mem_inner_loss_type"],
            hidden_distance=theirs["mem_distill_hidden_type"],
            temperature=theirs["mem_distill_temperature"],
            supervise=theirs["mem_inner_loss_mask_mode"],
            weighting=theirs["loss_weight_type"],
            normalisation=theirs["loss_norm_type"],
            padding=theirs["mem_pad_unmask_mode"],
            learning_rate=theirs["mem_inner_lr"],
            clip="local" if clip > 0 else "none",
            clip_norm=clip if clip > 0 else 1.0,
            adapter=theirs["mem_inner_adapter_type"],
            rank=theirs["mem_inner_rank"],
            alpha=theirs["mem_inner_alpha"],
            # The adapters of a negative fraction sit where those of its absolute value do.
            layer_fraction=abs(theirs["mem_inner_layer_fraction"]),
            target_modules=tuple(known[name] for name in wanted),
            scope="global",
            meta_gradient=mode,
        )
    except (TypeError, ValueError) as error:
        raise BadCase(f"{case.name}: {error}") from error


def program_config(config: MemoryConfig) -> MemoryConfig:
    """The config without what only shapes masks and weights, which come from a case's arrays.

    Cases that differ in nothing else share their compiled programs.
    """
    default = MemoryConfig()
    recorded = ("masking", "steps", "epochs", "supervise", "weighting", "normalisation", "padding")
    return dataclasses.replace(config, **{name: getattr(default, name) for name in recorded})


def fast_weights_of(case: Case, prefix: str) -> Phi:
    """Phi of one group from the arrays ``PREFIX/model.layers.i.MODULE.A`` and so on.

    Raises:
        BadCase: arrays are missing, naming the first.
    """
    config, denoiser = memory_config(case), denoiser_of(case)
    layers = range(fast_weights.split_of(denoiser, config), denoiser.num_layers)
    names = {"/".join(path[:2]): name for name, path in _LAYER_NAMES.items() if len(path) == 3}

    def stacked(path: str, leaf: str) -> jax.Array:
        keys = [f"{prefix}/model.layers.{i}.{names[path]}.{leaf}" for i in layers]
        missing = [key for key in keys if key not in case.arrays]
        if missing:
            raise BadCase(f"{case.name}: has no array {missing[0]!r}")
        return jnp.asarray(np.stack([case.arrays[key].T for key in keys])[None])

    phi: dict[str, Any] = {}
    for path in fast_weights.adapted_paths(denoiser, config):
        if config.adapter == "full":
            delta: Any = fast_weights.Dense(stacked(path, "delta"))
        else:
            scale = config.alpha / config.rank
            delta = fast_weights.LowRank(stacked(path, "A"), stacked(path, "B"), scale)
        module, matrix = path.split("/")
        phi.setdefault(module, {})[matrix] = {"delta": delta}
    return phi


def clean_batch(case: Case) -> Batch:
    """The case's clean rows; the public code attends to everything, padding included."""
    if "prompt" in case.arrays:
        tokens = jnp.asarray(case.arrays["prompt"])[None]
        everything = jnp.ones_like(tokens, bool)
        return Batch(tokens, everything, everything)
    tokens, maskable = (jnp.asarray(case.arrays[key]) for key in ("input_ids", "maskable_mask"))
    if case.memory["mem_pad_unmask_mode"] == "both":
        maskable = maskable & (tokens != case.settings["pad_token_id"])
    return Batch(tokens, maskable, jnp.ones_like(tokens, bool))


def updates_of(case: Case) -> list[Trajectory]:
    """A trajectory of a single state for every recorded inner update."""
    config, tokens = memory_config(case), clean_batch(case).tokens
    teachers = case.arrays.get("step_teacher_input")
    found = []
    for k, x in enumerate(case.arrays["step_input"]):
        weight, targets = _weighted_targets(
            tokens, case.arrays["step_loss_mask"][k], case.arrays["step_weight"][k],
            normalisation=config.normalisation,
        )  # fmt: skip
        state = State(jnp.asarray(x), targets, weight)
        after = None
        if config.distils:
            if teachers is None or (teachers[k] < 0).any():
                raise BadCase(f"{case.name}: step_teacher_input[{k}] has no teacher's tokens")
            after = jnp.asarray(teachers[k])
        found.append(Trajectory((state,), ends_at_anchor=False, after=after))
    return found


@functools.partial(jax.jit, static_argnames="normalisation")
def _weighted_targets(tokens, mask, weight, normalisation):
    weight = trajectory.normalised(weight, mask.sum(-1), 1, normalisation)
    return weight, gather_targets(tokens, mask)


def outer_state(case: Case) -> State:
    """The anchor; its weights carry the outer loss's normaliser."""
    batch, arrays = clean_batch(case), case.arrays
    weights = arrays["outer_weight"].astype(case.dtype)
    counts, rows = np.asarray(batch.maskable).sum(-1), batch.tokens.shape[0]
    divisors = {
        "token": max(counts.sum(), 1),
        "sequence": np.maximum(counts, 1) * rows,
        "batch": rows,
    }
    weight = jnp.asarray(weights / divisors[case.memory["loss_norm_type"]])
    targets = jax.jit(gather_targets)(batch.tokens, arrays["anchor_mask"])
    return State(jnp.asarray(arrays["x_t"]), targets, weight)


def whole_trajectory(case: Case) -> Trajectory:
    """All updates as one trajectory; states and teachers that are the same are run once."""
    updates = updates_of(case)
    inputs = case.arrays["step_input"]
    at_anchor = bool((inputs[-1] == case.arrays["x_t"]).all())
    after, teachers = None, None
    if updates[0].after is not None:
        read = [np.asarray(update.after) for update in updates]
        after, count = updates[-1].after, len(updates)
        following = [inputs[k + 1] if k + 1 < count else None for k in range(count)]
        teachers = tuple(
            k + 1 if x is not None and (tokens == x).all() else count
            for k, (tokens, x) in enumerate(zip(read, following, strict=True))
        )
        for k, (tokens, place) in enumerate(zip(read, teachers, strict=True)):
            if place == count and (tokens != read[-1]).any():
                raise BadCase(f"{case.name}: step_teacher_input[{k}] is neither the next nor last")
    states = tuple(update.states[0] for update in updates)
    return Trajectory(states, ends_at_anchor=at_anchor, after=after, teachers=teachers)


@dataclasses.dataclass(frozen=True)
class EarlyLayers:
    """A denoiser cut off after its first layers, seen as if it were the whole.

    With a negative layer fraction -f the public code's ``distill_hidden`` compares hidden states
    after the first ``int(n f)`` layers, student's and teacher's both after the final norm, while
    the fast weights stay in the last layers.
    """

    whole: LLaDA
    layers: int

    @property
    def num_layers(self) -> int:
        """Layers of the whole denoiser, so that the split is the same."""
        return self.whole.num_layers

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self.whole.mask_token_id

    def trunk(
        self, theta: Theta, tokens: Tokens, valid: Mask | None = None, position_ids=None, *,
        split: int,
    ) -> Hidden:  # fmt: skip
        """Embed the tokens and run the layers below ``split`` that are left."""
        end = min(split, self.layers)
        return self.whole.trunk(theta, tokens, valid, position_ids, split=end)

    def head(
        self, theta: Theta, phi: Phi, hidden: Hidden, valid: Mask | None = None,
        position_ids=None, *, split: int,
    ) -> Hidden:  # fmt: skip
        """Run the layers from ``split`` on that are left, and the final norm."""
        if self.layers <= split:
            return self.whole.normalise(theta, hidden)
        left = theta | {"layers": jax.tree.map(lambda leaf: leaf[: self.layers], theta["layers"])}
        phi = jax.tree.map(lambda leaf: leaf[: self.layers - split], phi)
        last = self.whole.head(left, phi, hidden, valid, position_ids, split=split)
        return self.whole.normalise(theta, last)

    def normalise(self, theta: Theta, last_hidden: Hidden) -> Hidden:
        """Nothing: ``head`` has done it."""
        del theta
        return last_hidden

    def readout(self, theta: Theta, last_hidden: Hidden) -> jax.Array:
        """Logits of what ``head`` returns."""
        return jnp.matmul(last_hidden, self.whole.unembedding(theta))

    def adaptable(self) -> Mapping[str, tuple[int, int, int]]:
        """As the whole denoiser."""
        return self.whole.adaptable()


def _early_layers(case: Case) -> EarlyLayers | None:
    """The shortened denoiser of a negative layer fraction, if the case's loss uses it."""
    fraction, denoiser = case.memory["mem_inner_layer_fraction"], denoiser_of(case)
    if fraction >= 0 or case.memory["mem_inner_loss_type"] != "distill_hidden":
        return None
    return EarlyLayers(denoiser, max(1, int(denoiser.num_layers * -fraction)))


@functools.cache
def _update(denoiser, config: MemoryConfig, early: EarlyLayers | None):
    """(theta, phi, trajectory of one state) -> (phi, record, raw gradient), compiled once."""
    model = denoiser if early is None else early
    loss = losses.build(model, config)

    @jax.jit
    def update(theta, phi, one):
        valid = jnp.ones_like(one.states[0].tokens, bool)
        steps = meta_gradient.head_states(model, config, theta, one, valid, None, 1)
        rule, raw = inner_loop.constant_gradient(loss), []

        def recording(*given):
            value, gradient = rule(*given)
            raw.append(gradient)
            return value, gradient

        optimizer = inner_loop.inner_optimizer(config)
        phi, record = inner_loop.adapt(recording, theta, phi, steps, optimizer)
        return phi, record, raw[0]

    return update


@functools.cache
def _outer(denoiser: LLaDA, config: MemoryConfig):
    """(theta, phi_0, batch, anchor, trajectory) -> (loss, gradient in theta)."""

    @jax.jit
    def outer(theta, phi, batch, anchor, states):
        def loss(theta):
            return meta_gradient.outer_loss(
                denoiser, config, theta, phi, batch, anchor, states, with_memory_off=False
            )[0]

        return jax.value_and_grad(loss)(theta)

    return outer


@functools.cache
def _given_memory(denoiser: LLaDA, split: int):
    """(theta, phi, anchor) -> (loss, gradients in theta and phi, logits) with phi as it is."""

    @jax.jit
    def given(theta, phi, anchor):
        def loss(theta, phi):
            hidden = denoiser.trunk(theta, anchor.tokens, None, split=split)
            return meta_gradient.anchor_loss(
                denoiser, theta, phi, hidden, None, anchor, split=split
            )

        value, gradients = jax.value_and_grad(loss, (0, 1))(theta, phi)
        return value, gradients, _logits(denoiser, split, theta, phi, anchor.tokens)

    return given


def _logits(denoiser: LLaDA, split: int, theta: Theta, phi: Phi, tokens: Tokens) -> jax.Array:
    hidden = denoiser.trunk(theta, tokens, split=split)
    last = fast_weights.head_with_memory(denoiser, theta, phi, hidden, split=split)
    return denoiser.readout(theta, last)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One kind of number of a case.

    Attributes:
        name: what it is.
        error: the worst relative error of its tensors.
        tolerance: largest error that counts as equal.
    """

    name: str
    error: float
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether the error, which must be a number, is within the tolerance."""
        return self.error <= self.tolerance


def replay(case: Case) -> list[Quantity]:
    """Recompute a case from its inputs and compare everything that it records.

    Raises:
        BadCase: arrays are missing, or settings cannot be replayed.
    """
    with (
        jax.enable_x64(case.dtype == "float64"),
        jax.default_matmul_precision("highest"),
    ):
        try:
            _check_shapes(case)
            found, phi = _replay_updates(case) if case.memory["mem_enabled"] else ({}, None)
            if "prompt" in case.arrays:
                found |= _replay_prompt(case, phi)
            elif "meta_grad/model.norm.weight" in case.arrays:
                found |= _replay_exact(case, phi)
            else:
                found |= _replay_outer(case, phi)
        except KeyError as error:
            raise BadCase(f"{case.name}: has no array or setting {error}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, BadCase):
                raise
            raise BadCase(f"{case.name}: {type(error).__name__}: {error}") from error
    usual = TOLERANCE[case.dtype]
    return [
        Quantity(name, float(error), META_TOLERANCE if name == "exact gradient" else usual)
        for name, error in found.items()
    ]


def _check_shapes(case: Case) -> None:
    """Inputs that JAX would broadcast or cut to fit are refused.

    Raises:
        BadCase: naming the array.
    """
    rows = clean_batch(case).tokens.shape
    steps = len(case.arrays["step_input"]) if case.memory["mem_enabled"] else 0
    wanted: dict[str, tuple[int, ...]] = {}
    if "prompt" not in case.arrays:
        wanted |= dict.fromkeys(("labels", "maskable_mask", "anchor_mask", "x_t"), rows)
        wanted["outer_weight"] = rows[:1]
    if steps:
        wanted |= dict.fromkeys(("step_input", "step_loss_mask"), (steps, *rows))
        wanted |= {"step_weight": (steps, *rows[:1]), "inner_loss": (steps,)}
    for name, shape in wanted.items():
        if case.arrays[name].shape != shape:
            raise BadCase(
                f"{case.name}: {name} has shape {case.arrays[name].shape}, must be {shape}"
            )
    if steps != case.settings.get("num_inner_updates", steps):
        raise BadCase(
            f"{case.name}: num_inner_updates={case.settings['num_inner_updates']}, but there are "
            f"{steps} states"
        )


def _replay_updates(case: Case) -> tuple[dict[str, float], Phi]:
    """Walk the inner updates one by one; errors, and phi after the last."""
    config, theta, arrays = memory_config(case), theta_of(case), case.arrays
    update = _update(denoiser_of(case), program_config(config), _early_layers(case))
    phi = fast_weights_of(case, "fast/0")
    records, phis, gradients = [], [], []
    for one in updates_of(case):
        phi, record, gradient = update(theta, phi, one)
        records.append(record)
        phis.append(phi)
        gradients.append(gradient)
    inner_loss = np.array([record.loss[0, 0] for record in records])
    norms = np.array([record.gradient_norm[0, 0] for record in records])
    result = {"inner loss": worst([(inner_loss, arrays["inner_loss"])])}
    if "meta_grad/model.norm.weight" not in arrays:
        result["inner gradient norm"] = worst([(norms, arrays["inner_grad_norm"])])
    if any(key.startswith("inner_grad/") for key in arrays):
        result["inner gradient"] = _worst_of_phi(case, "inner_grad/{}", gradients)
    result["fast weights"] = _worst_of_phi(case, "fast/{}", [None, *phis])
    return result, phi


def _worst_of_phi(case: Case, prefix: str, ours: list[Phi]) -> float:
    pairs: list[tuple[Any, Any]] = []
    for k, phi in enumerate(jax.device_get(ours)):
        if phi is not None:
            theirs = fast_weights_of(case, prefix.format(k))
            pairs += zip(jax.tree.leaves(phi), jax.tree.leaves(theirs), strict=True)
    return worst([matrix for a, b in pairs for matrix in zip(a[0], b[0], strict=True)])


def _replay_outer(case: Case, phi: Phi) -> dict[str, float]:
    """Outer loss, first-order gradients and logits."""
    denoiser, config, theta = denoiser_of(case), memory_config(case), theta_of(case)
    arrays, anchor = case.arrays, outer_state(case)
    split = denoiser.num_layers if phi is None else fast_weights.split_of(denoiser, config)
    given = _given_memory(denoiser, split)
    loss, (gradient, of_phi), logits = given(theta, phi, anchor)
    if phi is not None and _early_layers(case) is None:
        # The path that training takes: adapt and differentiate in one go.
        start = fast_weights_of(case, "fast/0")
        states, batch = whole_trajectory(case), clean_batch(case)
        loss, gradient = _outer(denoiser, program_config(config))(
            theta, start, batch, anchor, states
        )
    result = {"outer loss": worst([(loss, arrays["outer_loss"])])}
    result["outer gradient"] = _gradient_error(case, gradient)
    if any(key.startswith("outer_grad_fast/") for key in arrays):
        result["outer gradient of phi"] = _worst_of_phi(case, "outer_grad_fast", [of_phi])
    return result | {"logits": worst([(logits, arrays["outer_logits"])])}


def _gradient_error(case: Case, gradient: Theta) -> float:
    """Against the recorded tensors, or where only these were kept, their norms and sums."""
    pairs, short = [], []
    for name, ours in published_names(gradient).items():
        if f"outer_grad/{name}" in case.arrays:
            pairs.append((ours, case.arrays[f"outer_grad/{name}"]))
            continue
        norm, total = (float(case.arrays[f"outer_grad_{key}/{name}"]) for key in ("norm", "sum"))
        # A sum may cancel to nothing: it is compared on the scale of the norm.
        gaps = float(np.linalg.norm(ours)) - norm, float(ours.sum()) - total
        short += [abs(gap) / (norm or 1.0) for gap in gaps]
    return float(np.nan_to_num(np.max([worst(pairs), *short]), nan=np.inf, posinf=np.inf))


def _replay_exact(case: Case, phi: Phi) -> dict[str, float]:
    """Exact meta-gradient through all inner updates."""
    config, denoiser, arrays = memory_config(case, "exact"), denoiser_of(case), case.arrays
    theta, anchor = theta_of(case), outer_state(case)
    loss, gradient = _outer(denoiser, program_config(config))(
        theta, fast_weights_of(case, "fast/0"), clean_batch(case), anchor, whole_trajectory(case)
    )
    *_, logits = _given_memory(denoiser, fast_weights.split_of(denoiser, config))(
        theta, phi, anchor
    )
    named = published_names(gradient)
    pairs = [(g, arrays[f"meta_grad/{name}"]) for name, g in named.items()]
    size = np.sqrt(sum(float(np.sum(g**2)) for g in named.values()))
    return {
        "outer loss": worst([(loss, arrays["outer_loss"])]),
        "exact gradient": max(worst(pairs), worst([(size, arrays["meta_norm"])])),
        "logits": worst([(logits, arrays["outer_logits"])]),
    }


def _replay_prompt(case: Case, phi: Phi) -> dict[str, float]:
    """Logits behind a prompt, and what the sampler commits, without and with its memory."""
    denoiser, theta, arrays = denoiser_of(case), theta_of(case), case.arrays
    split = fast_weights.split_of(denoiser, memory_config(case))
    logits, wrong = [], 0
    for system, memory in (("nomem", None), ("mem", phi)):
        for variant, sampler in case.settings["variants"].items():
            history = arrays[f"{system}/{variant}/history"]
            predict = _guided(case, memory, split, sampler["cfg_scale"])
            config = DecodeConfig(
                sampler["max_new_tokens"], sampler["block_size"], sampler["steps"]
            )
            ours = _history(case, predict, config)
            theirs = np.concatenate([history[:, 0], arrays[f"{system}/{variant}/sequence"]])
            wrong += int((ours != theirs).sum())
        canvas = jnp.asarray(history[0])
        found = jax.jit(functools.partial(_logits, denoiser, split))(theta, memory, canvas)
        logits.append((found, arrays[f"{system}/logits_canvas"]))
    return {"logits": worst(logits), "wrong tokens": float(wrong)}


def _guided(case: Case, phi: Phi, split: int, scale: float):
    """The model as the sampler sees it: un + (scale + 1)(cond - un), un with a masked prompt."""
    denoiser, theta = denoiser_of(case), theta_of(case)
    prompt = case.arrays["prompt"].shape[-1]

    def predict(canvas, columns):
        conditional = _logits(denoiser, split, theta, phi, canvas)
        if scale:
            hide = jnp.broadcast_to(jnp.arange(canvas.shape[1]) < prompt, canvas.shape)
            hidden = masking.apply_mask(canvas, hide, denoiser.mask_token_id)
            free = _logits(denoiser, split, theta, phi, hidden)
            conditional = free + (scale + 1) * (conditional - free)
        return conditional[:, columns]

    return predict


def _history(case: Case, predict, config: DecodeConfig) -> np.ndarray:
    """Canvases [steps + 2, l]: before the first step, after each, and the final sequence."""
    prompt = clean_batch(case).tokens
    decoded = jax.jit(
        lambda x: decode.decode(
            predict, jax.random.key(0)[None], x, config, case.settings["mask_token_id"]
        )
    )(prompt)
    tokens, step = np.asarray(decoded.tokens[0]), np.asarray(decoded.commit_step[0])
    windows = [
        np.where(step < done, tokens, case.settings["mask_token_id"])
        for done in range(config.steps + 1)
    ]
    return np.stack([np.r_[np.asarray(prompt[0]), w] for w in [*windows, tokens]])


def worst(pairs: Iterable[tuple[Any, Any]]) -> float:
    """Largest relative error of (ours, theirs), each in the norm of its tensor.

    A tensor that is zero in exact arithmetic has no relative error: one whose norm is below 1e-12
    of the largest is compared with that one's norm, or with 1 if all are zero. NaN counts as
    infinite, as does a wrong shape.
    """
    errors, sizes = [], []
    for ours, theirs in pairs:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        same = ours.shape == theirs.shape
        error = float(np.linalg.norm(ours - theirs)) if same else np.inf
        errors.append(np.inf if np.isnan(error) else error)
        sizes.append(float(np.linalg.norm(theirs)))
    if np.inf in errors:
        return np.inf
    largest = max(sizes, default=0.0) or 1.0
    relative = (
        error / (size if size > 1e-12 * largest else largest)
        for error, size in zip(errors, sizes, strict=True)
    )
    return max(relative, default=0.0)
