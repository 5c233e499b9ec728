"""Replay of recorded cases: the public code's inputs through our functions."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion.objective import gather_targets
from memdlm_jax.memory import fast_weights, trajectory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Batch

FOLDER = Path(__file__).parent.parent / "golden"
LAYER_NAMES = {
    "input_layernorm": ("attention_norm", "scale"),
    "post_attention_layernorm": ("mlp_norm", "scale"),
    **{f"self_attn.{n}_proj": ("attention", f"{n}_proj", "kernel") for n in "qkvo"},
    **{f"mlp.{n}_proj": ("mlp", f"{n}_proj", "kernel") for n in ("gate", "up", "down")},
}


@functools.cache
def load(case):
    """Arrays and settings of a recorded case; second-order cases bring their source's inputs."""
    arrays = dict(np.load(FOLDER / f"{case}.npz"))
    settings = json.loads(str(arrays.pop("config_json")))
    if "source_case" in settings:
        arrays = load(settings["source_case"])[0] | arrays
    return arrays, settings


def denoiser(settings):
    """The tiny model of the cases in their dtype."""
    m = settings["model"]
    return LLaDA(
        LLaDAConfig(
            vocab_size=m["vocab_size"],
            width=m["hidden_size"],
            num_layers=m["num_hidden_layers"],
            num_heads=m["num_attention_heads"],
            num_kv_heads=m["num_key_value_heads"],
            hidden_features=m["intermediate_size"],
            mask_token_id=settings["mask_token_id"],
            max_length=512,
            rope_theta=m["rope_theta"],
            norm_epsilon=m["rms_norm_eps"],
            dtype=settings["dtype"],
            param_dtype=settings["dtype"],
        )
    )


def theta_from(named, num_layers):
    """Our tree from arrays under the published names ([out, in] matrices)."""

    def stacked(name):
        return jnp.stack(
            [jnp.asarray(named[f"model.layers.{i}.{name}.weight"]).T for i in range(num_layers)]
        )

    layers = {}
    for name, path in LAYER_NAMES.items():
        node = layers
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = stacked(name)
    return {
        "embedding": jnp.asarray(named["model.embed_tokens.weight"]),
        "layers": layers,
        "final_norm": {"scale": jnp.asarray(named["model.norm.weight"])},
        "unembedding": jnp.asarray(named["lm_head.weight"]).T,
    }


def published_names(theta, num_layers):
    """Inverse of ``theta_from``: {published name: array}."""
    named = {
        "model.embed_tokens.weight": theta["embedding"],
        "model.norm.weight": theta["final_norm"]["scale"],
        "lm_head.weight": theta["unembedding"].T,
    }
    for name, path in LAYER_NAMES.items():
        stacked = functools.reduce(lambda node, part: node[part], path, theta["layers"])
        for i in range(num_layers):
            named[f"model.layers.{i}.{name}.weight"] = stacked[i].T
    return named


def base_theta(settings):
    """The cases' shared base weights in their dtype."""
    weights = dict(np.load(FOLDER / "weights.npz"))
    named = {k: v.astype(settings["dtype"]) for k, v in weights.items()}
    return theta_from(named, settings["model"]["num_hidden_layers"])


def memory_config(settings, **overrides):
    """Our config from the public code's argument names."""
    c = settings["config"]
    return MemoryConfig(
        steps=settings["num_inner_updates"],
        learning_rate=c["mem_inner_lr"],
        clip="local" if c["mem_inner_grad_clip"] else "none",
        clip_norm=c["mem_inner_grad_clip"] or 1.0,
        adapter=c["mem_inner_adapter_type"],
        rank=c["mem_inner_rank"],
        alpha=c["mem_inner_alpha"],
        layer_fraction=c["mem_inner_layer_fraction"],
        scope="global",
        **overrides,
    )


def batch(arrays):
    """Clean rows; the public code attends to everything, padding included."""
    tokens = jnp.asarray(arrays["input_ids"])
    return Batch(tokens, jnp.asarray(arrays["maskable_mask"]), jnp.ones_like(tokens, bool))


def phi_after(arrays, k, settings):
    """Recorded fast weights after k updates as {our path: {leaf: [in, out] array}}."""
    return _fast(arrays, f"fast/{k}/", settings)


def inner_gradient(arrays, k, settings):
    """Recorded raw gradient of update k in the same form."""
    return _fast(arrays, f"inner_grad/{k}/", settings)


def _fast(arrays, prefix, settings):
    layers = settings["model"]["num_hidden_layers"]
    first = fast_weights.first_adapted_layer(layers, settings["config"]["mem_inner_layer_fraction"])
    result = {}
    for module in ("gate_proj", "up_proj", "down_proj"):
        for theirs, ours in (("A", "A"), ("B", "B"), ("delta", "W")):
            names = [
                f"{prefix}model.layers.{i}.mlp.{module}.{theirs}" for i in range(first, layers)
            ]
            if names[0] in arrays:
                stacked = jnp.stack([jnp.asarray(arrays[n]).T for n in names])
                result.setdefault(module, {})[ours] = stacked
    return result


def as_phi(recorded, settings):
    """Fast weights of one group from the recorded form."""
    scale = settings["config"]["mem_inner_alpha"] / settings["config"]["mem_inner_rank"]

    def one(leaves):
        grouped = {name: leaf[None] for name, leaf in leaves.items()}
        if "W" in grouped:
            return fast_weights.Dense(**grouped)
        return fast_weights.LowRank(**grouped, scale=scale)

    return {"mlp": {module: {"delta": one(leaves)} for module, leaves in recorded.items()}}


def states(arrays, settings):
    """(anchor, trajectory) from the recorded masks, times and weights."""
    tokens = jnp.asarray(arrays["input_ids"])

    def state(x, mask, weight):
        return trajectory.State(jnp.asarray(x), gather_targets(tokens, jnp.asarray(mask)), weight)

    anchor = state(arrays["x_t"], arrays["anchor_mask"], jnp.asarray(arrays["outer_weight"]))
    inner = []
    for x, mask, weight in zip(
        arrays["step_input"], arrays["step_loss_mask"], arrays["step_weight"], strict=True
    ):
        scaled = trajectory.normalised(jnp.asarray(weight), jnp.asarray(mask.sum(-1)), groups=1)
        inner.append(state(x, mask, scaled))
    at_anchor = bool((arrays["step_input"][-1] == arrays["x_t"]).all())
    return anchor, trajectory.Trajectory(tuple(inner), ends_at_anchor=at_anchor)


def relative(ours, theirs, *, floor=0.0):
    """|ours - theirs| / |theirs| in the norm of the tensor; absolute where |theirs| <= floor."""
    difference = np.linalg.norm(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    size = np.linalg.norm(np.asarray(theirs, np.float64))
    return difference if size <= floor else difference / size
