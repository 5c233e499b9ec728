"""What every layer of a transformer computes on the way."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memdlm_jax.models.block import Pass
from memdlm_jax.models.config import Run, runs_of
from memdlm_jax.parameters import merged
from memdlm_jax.typing import Context, Phi, Theta, Tokens


def inspect(
    model: Any,
    theta: Theta,
    tokens: Tokens,
    context: Context,
    phi: Phi,
    *,
    split: int,
    heads: bool,
) -> dict[str, Any]:
    """See ``Transformer.inspect``; ``model`` is without remat."""
    theta, runs = merged(theta), runs_of(model.config)
    found: dict[str, Any] = {}
    hidden = last = theta["embedding"][tokens].astype(model.config.dtype)
    for start, stop, fast in ((0, split, None), (split, model.config.num_layers, phi)):
        part: dict[str, Any] = {}
        last = model.layers(theta, fast, last, context, Pass(start, stop, found=part))
        for run, sown in part.items():  # The split may lie inside a run.
            pieces = [found[run], sown] if run in found else [sown]
            found[run] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)
    parts = [found[run.name] for run in runs]
    joined: dict[str, Any] = {
        name: jnp.concatenate([part[f"sown_{name}"][0] for part in parts])
        for name in ("attention", "feed_forward", "hidden")
    }
    joined["hidden"] = jnp.concatenate([hidden[None], joined["hidden"]])
    joined["router"] = dict(_routers(runs, found, tokens.shape))
    if heads:
        for name in ("query", "key", "value"):
            joined[name] = jnp.concatenate([p["attention"][f"sown_{name}"][0] for p in parts])
        joined["mask"] = model.mask(hidden, context)
    return joined


def _routers(
    runs: list[Run], found: Mapping[str, Any], shape: tuple[int, ...]
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """Pairs of layer number and what its router sowed, with rows and tokens apart."""
    for run in runs:
        if not run.mixture:
            continue
        sown = found[run.name]["mlp"]["router"]
        for i in range(run.length):
            yield (
                run.first + i,
                {
                    name: sown[f"router_{name}"][0][i].reshape(*shape, -1)
                    for name in ("logits", "index", "weights")
                },
            )
