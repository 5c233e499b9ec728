"""Cases in the recorded format, computed by a plain program that shares no code with the package.

A LLaMA block, the inner loop and the outer loss as ``tests/golden/README.md`` and the public code's
documentation describe them, in ``jax.numpy`` and Python loops. It answers for settings and sizes
that no recorded case has.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

MODEL = {
    "vocab_size": 30, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-6, "rope_theta": 500.0,
}  # fmt: skip
MASK, PAD = 29, 0
ROWS, LENGTH = 4, 11
WHERE = {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")}


def weights(model=MODEL, tied=False, seed=0):
    rng = np.random.default_rng(seed)
    d, f, h = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    narrow = d // h * model["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (narrow, d)}
    shapes |= {"self_attn.v_proj": (narrow, d), "self_attn.o_proj": (d, d)}
    shapes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    named = {}
    for i in range(model["num_hidden_layers"]):
        for name, shape in shapes.items():
            named[f"model.layers.{i}.{name}.weight"] = rng.normal(size=shape) * 0.3
        for name in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{i}.{name}.weight"] = 1 + 0.2 * rng.normal(size=d)
    named["model.embed_tokens.weight"] = rng.normal(size=(model["vocab_size"], d))
    named["model.norm.weight"] = 1 + 0.2 * rng.normal(size=d)
    if not tied:
        named["lm_head.weight"] = rng.normal(size=(model["vocab_size"], d)) * 0.5
    return {name: array.astype(np.float32) for name, array in named.items()}


def forward(model, w, fast, tokens, layers=None, normed=True):
    """Hidden states after the first ``layers`` layers."""
    d, heads, kv = (model[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size = d // heads
    rows, length = tokens.shape

    def norm(x, name):
        return w[name] * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + model["rms_norm_eps"])

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        if f"{name}.A" in fast:
            y = y + 2.0 * (x @ fast[f"{name}.A"].T @ fast[f"{name}.B"].T)
        if f"{name}.delta" in fast:
            y = y + x @ fast[f"{name}.delta"].T
        return y

    frequencies = model["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))

    def split(x, count):
        return x.reshape(rows, length, count, size).transpose(0, 2, 1, 3)

    def rotate(x):
        half = jnp.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(model["num_hidden_layers"] if layers is None else layers):
        p = f"model.layers.{i}"
        h = norm(x, f"{p}.input_layernorm.weight")
        q = rotate(split(linear(h, f"{p}.self_attn.q_proj"), heads))
        k = rotate(split(linear(h, f"{p}.self_attn.k_proj"), kv))
        v = split(linear(h, f"{p}.self_attn.v_proj"), kv)
        k, v = (jnp.repeat(a, heads // kv, 1) for a in (k, v))
        scores = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(size), -1)
        mixed = (scores @ v).transpose(0, 2, 1, 3).reshape(rows, length, d)
        x = x + linear(mixed, f"{p}.self_attn.o_proj")
        h = norm(x, f"{p}.post_attention_layernorm.weight")
        gated = jax.nn.silu(linear(h, f"{p}.mlp.gate_proj")) * linear(h, f"{p}.mlp.up_proj")
        x = x + linear(gated, f"{p}.mlp.down_proj")
    return norm(x, "model.norm.weight") if normed else x


def logits_of(model, w, fast, tokens):
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return forward(model, w, fast, tokens) @ head.T


def weigh(losses, mask, weight, normalisation):
    """The public code's inner normalisation."""
    losses = losses * weight[:, None] * mask
    if normalisation == "token":
        return losses.sum() / max(mask.sum(), 1)
    if normalisation == "batch":
        return losses.sum() / len(mask)
    return (losses / np.maximum(mask.sum(-1, keepdims=True), 1) * len(mask)).sum()


def inner_loss(model, w, fast, x, clean, teacher, mask, weight, c):
    kind, fraction = c.get("mem_inner_loss_type", "ce"), c["mem_inner_layer_fraction"]
    frozen = jax.lax.stop_gradient(fast)
    if kind == "ce":
        log_p = jax.nn.log_softmax(logits_of(model, w, fast, x))
        losses = -jnp.take_along_axis(log_p, clean[..., None], -1)[..., 0]
    elif kind == "distill_hidden":
        early = fraction < 0
        layers = max(1, int(model["num_hidden_layers"] * -fraction)) if early else None
        student = forward(model, w, fast, x, layers, normed=early)
        target = forward(model, w, frozen, teacher, layers)
        if c.get("mem_distill_hidden_type", "mse") == "mse":
            losses = jnp.mean((student - target) ** 2, -1)
        else:
            norms = [jnp.linalg.norm(a, axis=-1) for a in (student, target)]
            losses = 1 - (student * target).sum(-1) / norms[0] / norms[1]
    else:
        t = c.get("mem_distill_temperature", 1.0)
        p = jax.nn.log_softmax(logits_of(model, w, frozen, teacher) / t)
        q = jax.nn.log_softmax(logits_of(model, w, fast, x) / t)
        p, q = (q, p) if kind == "distill_reverse" else (p, q)
        losses = (jnp.exp(p) * (p - q)).sum(-1)
    return weigh(losses, mask, weight, c.get("loss_norm_type", "token"))


def make(path, *, updates=2, model=MODEL, tied=False, seed=0, name="made", **config):
    """Write ``weights.npz`` and one float64 case with random masks; returns its arrays."""
    rng = np.random.default_rng(seed + 1)
    c = {"mem_inner_rank": 3, "mem_inner_alpha": 6.0, "mem_inner_layer_fraction": 0.5} | config
    w32 = weights(model, tied, seed)
    w = {key: jnp.asarray(a.astype(np.float64)) for key, a in w32.items()}
    tokens = rng.integers(1, MASK, (ROWS, LENGTH)).astype(np.int32)
    tokens[1, -3:] = PAD
    labels = tokens.copy()
    for row, prompt in enumerate((2, 0, 5, 3)):
        labels[row, :prompt] = -100
    maskable = labels != -100
    policy = c.get("mem_pad_unmask_mode", "none")
    outer = maskable & (tokens != PAD) if policy == "both" else maskable
    inner = maskable if policy == "none" else maskable & (tokens != PAD)
    anchor = outer & (rng.random(tokens.shape) < 0.5)
    masks = [inner & (rng.random(tokens.shape) < 0.7) for _ in range(updates - 1)]
    masks.append(anchor & inner)
    followed = c.get("mem_inner_loss_mask_mode") == "newly_revealed"
    loss_masks = [m & ~n if followed else m for m, n in itertools.pairwise(masks)]
    loss_masks.append(masks[-1])
    inputs = [np.where(m, MASK, tokens) for m in masks]
    teachers = [*inputs[1:], tokens]
    step_weight = rng.uniform(1, 5, (updates, ROWS)).astype(np.float32)
    outer_weight = rng.uniform(1, 5, ROWS).astype(np.float32)

    count = model["num_hidden_layers"]
    first = int(count * (1 - abs(c["mem_inner_layer_fraction"])))
    fast = {}
    targets = c.get("mem_inner_target_modules", "gate_proj,up_proj,down_proj").split(",")
    for i in range(first, count):
        for target in targets:
            full = f"model.layers.{i}.{WHERE.get(target, 'mlp')}.{target}"
            out, into = w[f"{full}.weight"].shape
            if c.get("mem_inner_adapter_type") == "full":
                fast[f"{full}.delta"] = jnp.zeros((out, into))
            else:
                fast[f"{full}.A"] = jnp.asarray(rng.uniform(-1, 1, (3, into)) / np.sqrt(into))
                fast[f"{full}.B"] = jnp.zeros((out, 3))

    arrays = {f"fast/0/{key}": a for key, a in fast.items()}
    losses, norms, bound = [], [], c.get("mem_inner_grad_clip", 1.0)
    order = list(range(updates)) * c.get("mem_num_inner_epochs", 1)
    if not c.get("mem_enabled", True):
        order, fast, arrays = [], {}, {}
    for k, state in enumerate(order):

        def loss(fast, k=state):
            given = inputs[k], tokens, teachers[k], loss_masks[k], step_weight[k]
            return inner_loss(model, w, fast, *given, c)

        value, grads = jax.value_and_grad(loss)(fast)
        losses.append(float(value))
        norms.append(float(np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))))
        for key, g in grads.items():
            arrays[f"inner_grad/{k}/{key}"] = g
            size = np.linalg.norm(g)
            if bound and size > bound:
                g = g * (bound / (size + 1e-12))
            fast[key] = fast[key] - 0.1 * g
            arrays[f"fast/{k + 1}/{key}"] = fast[key]

    x_t = np.where(anchor, MASK, tokens)
    counts = outer.sum(-1)
    divisor = {
        "token": np.full(ROWS, counts.sum()),
        "sequence": np.maximum(counts, 1) * ROWS,
        "batch": np.full(ROWS, ROWS),
    }[c.get("loss_norm_type", "token")]

    def outer_loss(w, fast):
        logits = logits_of(model, w, fast, x_t)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        return (nll * anchor * (outer_weight / divisor)[:, None]).sum(), logits

    (value, logits), (of_w, of_fast) = jax.value_and_grad(outer_loss, (0, 1), has_aux=True)(w, fast)
    arrays |= {f"outer_grad/{key}": g for key, g in of_w.items()}
    arrays |= {f"outer_grad_fast/{key}": g for key, g in of_fast.items()}
    settings = {
        "name": name, "dtype": "float64", "model": model | {"tie_word_embeddings": tied},
        "config": c, "mask_token_id": MASK, "pad_token_id": PAD, "num_inner_updates": len(order),
    }  # fmt: skip
    arrays |= {
        "config_json": json.dumps(settings), "input_ids": tokens, "labels": labels,
        "maskable_mask": maskable, "anchor_mask": anchor, "x_t": x_t,
        "outer_weight": outer_weight, "outer_loss": value, "outer_logits": logits,
    }  # fmt: skip
    if order:
        distils = c.get("mem_inner_loss_type", "ce") != "ce"
        steps = {
            "mask": masks, "input": inputs, "loss_mask": loss_masks, "weight": step_weight,
            "teacher_input": teachers if distils else np.full(np.shape(masks), -1),
        }  # fmt: skip
        arrays |= {f"step_{key}": np.stack(values)[order] for key, values in steps.items()}
        arrays |= {"inner_loss": np.array(losses), "inner_grad_norm": np.array(norms)}
    arrays = {key: np.asarray(array) for key, array in arrays.items()}
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / "weights.npz", **w32)
    np.savez(path / "some_file.npz", **arrays)
    return arrays
