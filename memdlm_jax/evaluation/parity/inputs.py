"""A case's inputs in our own terms: model, parameters, settings, fast weights, states."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion.objective import Anchor, NoisyState, gather_targets
from memdlm_jax.evaluation.parity.cases import KNOWN_SETTINGS, Arrays, BadCase, Case
from memdlm_jax.memory import fast_weights, trajectory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Batch, Context, Phi, Theta

_LAYER_NAMES = {
    "input_layernorm": ("attention_norm", "scale"),
    "post_attention_layernorm": ("mlp_norm", "scale"),
    **{f"self_attn.{n}_proj": ("attention", f"{n}_proj", "kernel") for n in "qkvo"},
    **{f"mlp.{n}_proj": ("mlp", f"{n}_proj", "kernel") for n in ("gate", "up", "down")},
}


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
    unknown = sorted(set(theirs) - KNOWN_SETTINGS)
    if unknown:
        raise BadCase(
            f"{case.name}: unknown settings {unknown}; known are {sorted(KNOWN_SETTINGS)}"
        )
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
            padding="none" if theirs["mem_pad_unmask_mode"] == "none" else "inner",
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
        state = NoisyState(jnp.asarray(x), targets, weight)
        after = None
        if config.distils:
            if teachers is None or (teachers[k] < 0).any():
                raise BadCase(f"{case.name}: step_teacher_input[{k}] has no teacher's tokens")
            after = jnp.asarray(teachers[k])
        everything = Context(jnp.ones_like(tokens, bool))
        found.append(Trajectory((state,), everything, ends_at_anchor=False, after=after))
    return found


@functools.partial(jax.jit, static_argnames="normalisation")
def _weighted_targets(tokens, mask, weight, normalisation):
    weight = trajectory.normalised(weight, mask.sum(-1), 1, normalisation)
    return weight, gather_targets(tokens, mask)


def anchor_of(case: Case) -> Anchor:
    """The anchor; the weights of its state carry the outer loss's normaliser."""
    batch, arrays = clean_batch(case), case.arrays
    weights = arrays["outer_weight"].astype(case.dtype)
    counts, rows = np.asarray(batch.maskable).sum(-1), batch.tokens.shape[0]
    divisors = {
        "token": max(counts.sum(), 1),
        "sequence": np.maximum(counts, 1) * rows,
        "batch": rows,
    }
    weight = jnp.asarray(weights / divisors[case.memory["loss_norm_type"]])
    mask = jnp.asarray(arrays["anchor_mask"])
    targets = jax.jit(gather_targets)(batch.tokens, mask)
    state = NoisyState(jnp.asarray(arrays["x_t"]), targets, weight)
    context = Context(batch.valid)
    return Anchor(state, context, jnp.asarray(counts), mask, jnp.asarray(arrays["outer_weight"]))


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
    context = updates[0].context
    return Trajectory(states, context, ends_at_anchor=at_anchor, after=after, teachers=teachers)
