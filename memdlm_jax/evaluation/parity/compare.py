"""Recompute a case from its inputs and compare everything that it records."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion import decode, masking, reading
from memdlm_jax.diffusion.canvas import lay_out
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.parity.cases import META_TOLERANCE, TOLERANCE, BadCase, Case
from memdlm_jax.evaluation.parity.inputs import (
    anchor_of,
    clean_batch,
    denoiser_of,
    fast_weights_of,
    memory_config,
    program_config,
    published_names,
    theta_of,
    updates_of,
    whole_trajectory,
)
from memdlm_jax.evaluation.parity.programs import (
    early_layers,
    given_memory,
    logits_of,
    outer_gradient,
    single_update,
)
from memdlm_jax.memory import fast_weights
from memdlm_jax.typing import Phi, Theta


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
    update = single_update(denoiser_of(case), program_config(config), early_layers(case))
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
    arrays, anchor = case.arrays, anchor_of(case)
    split = denoiser.num_layers if phi is None else fast_weights.split_of(denoiser, config)
    given = given_memory(denoiser, split)
    loss, (gradient, of_phi), logits = given(theta, phi, anchor)
    if phi is not None and early_layers(case) is None:
        # The path that training takes: adapt and differentiate in one go.
        start = fast_weights_of(case, "fast/0")
        loss, gradient = outer_gradient(denoiser, program_config(config))(
            theta, start, anchor, whole_trajectory(case)
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
    theta, anchor = theta_of(case), anchor_of(case)
    loss, gradient = outer_gradient(denoiser, program_config(config))(
        theta, fast_weights_of(case, "fast/0"), anchor, whole_trajectory(case)
    )
    *_, logits = given_memory(denoiser, fast_weights.split_of(denoiser, config))(theta, phi, anchor)
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
        found = jax.jit(functools.partial(logits_of, denoiser, split))(theta, memory, canvas)
        logits.append((found, arrays[f"{system}/logits_canvas"]))
    return {"logits": worst(logits), "wrong tokens": float(wrong)}


def _guided(case: Case, phi: Phi, split: int, scale: float):
    """The model as the sampler sees it: un + (scale + 1)(cond - un), un with a masked prompt."""
    denoiser, theta = denoiser_of(case), theta_of(case)
    prompt = case.arrays["prompt"].shape[-1]

    def predict(canvas, columns):
        conditional = logits_of(denoiser, split, theta, phi, canvas)
        if scale:
            hide = jnp.broadcast_to(jnp.arange(canvas.shape[1]) < prompt, canvas.shape)
            hidden = masking.apply_mask(canvas, hide, denoiser.mask_token_id)
            free = logits_of(denoiser, split, theta, phi, hidden)
            conditional = free + (scale + 1) * (conditional - free)
        return conditional[:, columns]

    return predict


def _history(case: Case, predict, config: DecodeConfig) -> np.ndarray:
    """Canvases [steps + 2, l]: before the first step, after each, and the final sequence."""
    prompt = clean_batch(case).tokens
    mask = case.settings["mask_token_id"]

    @jax.jit
    def run(prompt):
        canvas = lay_out(prompt, jnp.ones(prompt.shape, bool), config, mask)
        reader = reading.from_predict(predict)
        return decode.decode(decode.Loop([reader], jax.random.key(0)[None], canvas, config, mask))

    decoded = run(prompt)
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
