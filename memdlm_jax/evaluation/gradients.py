"""How far approximate meta-gradients are from the exact one: angles, sizes, single directions."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.memory import meta_gradient
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.typing import Batch, Key, Theta

MODES = ("first_order", "trunk_stopped", "exact")

Named = dict[str, np.ndarray]
"""Name of a parameter, or of one layer of a stacked one -> array."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def memory_on_loss(
    inner_loop: InnerLoop, schedule: Schedule, theta: Theta, batch: Batch, key: Key
) -> jax.Array:
    """Memory-on loss in nats per maskable token, everything drawn from ``key``."""
    phi_key, anchor_key, mask_key = jax.random.split(key, 3)
    mask_token_id = inner_loop.denoiser.mask_token_id
    anchor = objective.draw_anchor(anchor_key, batch, mask_token_id, schedule)
    phi, trajectory = inner_loop.draw((phi_key, mask_key, None), batch, anchor, schedule)
    # The memory is float32 over any base; here it follows theta, for differences in float64.
    phi = jax.tree.map(lambda leaf: leaf.astype(jax.tree.leaves(theta)[0].dtype), phi)
    total, _ = meta_gradient.outer_loss(
        inner_loop, theta, None, phi, trajectory, anchor, with_memory_off=False
    )
    return total / jnp.maximum(anchor.maskable.sum(), 1)


gradient = jax.jit(jax.grad(memory_on_loss, argnums=2), static_argnums=(0, 1))
"""Gradient of ``memory_on_loss`` in theta, under the memory's meta-gradient."""


def slope(loss: Any, theta: Theta, direction: Theta, step: float) -> float:
    """Derivative of ``loss(theta)`` along a direction, by central differences of fourth order."""

    def at(scale: float) -> float:
        return float(loss(jax.tree.map(lambda x, d: x + scale * d, theta, direction)))

    near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)


def unit_direction(seed: int, theta: Theta) -> Theta:
    """A direction of norm 1, uniform over the sphere, of theta's dtype."""
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), theta)
    size = np.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(drawn)))
    return jax.tree.map(lambda d, leaf: (d / size).astype(leaf.dtype), drawn, theta)


def along(tree: Theta, direction: Theta) -> float:
    """Inner product of two trees, in float64."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(direction), strict=True)
    return sum(float(np.vdot(np.asarray(a, float), np.asarray(b, float))) for a, b in pairs)


def by_layer(tree: Theta) -> Named:
    """Arrays by name; a leaf under ``layers`` gives one entry per layer."""
    found: Named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("layers/"):
            found |= {f"{i:02d}/{name[7:]}": matrix for i, matrix in enumerate(leaf)}
        else:
            found[name] = leaf
    return found


def part_of(name: str, split: int) -> str:
    """The part of the model that a name of ``by_layer`` belongs to."""
    first, *rest = name.split("/")
    if not rest or not first.isdigit():
        return first
    return f"{'trunk' if int(first) < split else 'head'} {rest[0].removesuffix('_norm')}"


def compare(approximate: Theta, exact: Theta) -> dict[str, float]:
    """Angle and size of an approximation, and its worst single direction.

    Returns:
        ``angle``: between the two, in degrees. ``error``: |a - e| / |e|. ``size``: |a| / |e|.
        ``worst_tensor``: the largest over all tensors of |1 - <a, e> / <e, e>|, the error of the
        derivative along that tensor's exact gradient, as a share of it. ``wrong_sign``: share of
        all entries with the other sign.

    Raises:
        ValueError: the exact gradient is zero (nothing was masked) or not finite.
    """
    a, e = by_layer(approximate), by_layer(exact)
    aa, ee, ae = (
        {name: float(np.vdot(x[name], y[name])) for name in e} for x, y in ((a, a), (e, e), (a, e))
    )
    total_aa, total_ee, total_ae = (sum(part.values()) for part in (aa, ee, ae))
    if not total_ee > 0:
        raise ValueError(f"the exact gradient has square norm {total_ee}; it must be positive")
    cosine = total_ae / np.sqrt(total_aa * total_ee)
    signs = [(np.sign(a[name]) * np.sign(e[name]) < 0).sum() for name in e]
    return {
        "angle": float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        "error": float(np.sqrt(max(total_aa - 2 * total_ae + total_ee, 0) / total_ee)),
        "size": float(np.sqrt(total_aa / total_ee)),
        "worst_tensor": max(abs(1 - ae[name] / ee[name]) for name in e if ee[name] > 0),
        "wrong_sign": float(sum(signs) / sum(leaf.size for leaf in e.values())),
    }


def compare_parts(approximate: Theta, exact: Theta, split: int) -> dict[str, dict[str, float]]:
    """``compare`` of every part of the model by itself, see ``part_of``."""
    a, e = by_layer(approximate), by_layer(exact)
    parts: dict[str, list[str]] = {}
    for name in e:
        parts.setdefault(part_of(name, split), []).append(name)
    return {
        part: compare({n: a[n] for n in names}, {n: e[n] for n in names})
        for part, names in parts.items()
        if any(e[n].any() for n in names)
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 of a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """``spread`` of every number of like records."""
    return {name: spread([row[name] for row in rows]) for name in rows[0]}
