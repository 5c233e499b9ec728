"""What every layer of a transformer computes on the way."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from memdlm_jax.models.config import Run, TransformerConfig, runs_of
from memdlm_jax.typing import Hidden, Phi, Theta, Tokens, merged


class Layers(Protocol):
    """The parts of a ``Transformer`` that are looked into."""

    @property
    def config(self) -> TransformerConfig:
        """Its sizes."""
        ...

    def layers(
        self, theta: Theta, phi: Phi, hidden: Hidden, attend, position_ids, start: int, stop: int,
        found: dict | None,
    ) -> Hidden:  # fmt: skip
        """Run some layers; what they sow is put in ``found``, by run."""
        ...

    def mask(self, hidden: Hidden, attend, position_ids) -> jax.Array | None:
        """Who sees whom."""
        ...


def inspect(
    model: Layers,
    theta: Theta,
    tokens: Tokens,
    attend: jax.Array | None,
    position_ids: Tokens | None,
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
        last = model.layers(theta, fast, last, attend, position_ids, start, stop, part)
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
        joined["mask"] = model.mask(hidden, attend, position_ids)
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
