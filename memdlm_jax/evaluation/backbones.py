"""Compare a backbone with what the published modelling code computed on the same weights.

A recording is a ``golden.npz``. Inputs: ``input_ids`` [b, l], and per case ``positions_CASE``,
``attention_mask_CASE`` [b, l] or ``attend_CASE`` [l, l]. Outputs: a quantity, ``QUANTITY_CASE``
under a case: ``logits``, ``logits_shifted``, ``hidden`` (embeddings and every layer),
``final_norm``, ``attn_out``, ``mlp_out``, and of routers ``router_logits``, ``topk_idx``,
``topk_weight``. A case ``bias01_CASE`` adds ``attend_CASE`` as 0 and 1 to the scores.
``logits_bf16_compute`` is informative: bfloat16 moves tokens to other experts.

What every layer has is recorded for all layers, stacked; for one, ``QUANTITY_CASE_layerN`` (N from
0, ``hidden`` being the layer's output); or stacked for those that the input ``layers`` [k] numbers,
``hidden`` with or without the embeddings before them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.models.family import family_of
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.typing import Context, Theta

TOLERANCE = 5e-5
_BFLOAT16 = "logits_bf16_compute"
_INPUT = re.compile(r"input_ids$|layers$|(positions|attention_mask|attend)(_.+)?$")
_UNUSED = ("eos_token_id",)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One recorded array beside ours.

    Attributes:
        name: its key in the recording.
        error: largest absolute difference; for choices of experts, how many tokens differ.
        tolerance: largest error allowed; ``None`` if the comparison only informs.
        note: why there is nothing to compare, such as different shapes, or empty.
    """

    name: str
    error: float
    tolerance: float | None
    note: str = ""

    @property
    def equal(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.tolerance is None or self.error <= self.tolerance


def compare(
    denoiser: Transformer, theta: Theta, golden: Mapping[str, np.ndarray], tolerance: float
) -> list[Compared]:
    """Compare everything that a recording holds; a key that is not understood counts as unequal.

    Run under ``jax.default_matmul_precision("highest")``.

    Args:
        denoiser: float32.
        theta: its parameters, of plain arrays or with adapters.
        golden: the recording.
        tolerance: largest absolute error, of everything but choices of experts, which are exact.

    Raises:
        ValueError: there is no ``input_ids``, or ``layers`` has a number that no layer has.
    """
    if "input_ids" not in golden:
        raise ValueError("the recording has no input_ids")
    replay = _Replay(denoiser, theta, golden)
    return [_compare(replay, key, tolerance) for key in golden if not _INPUT.match(key)]


def _compare(replay: "_Replay", key: str, tolerance: float) -> Compared:
    recorded = np.asarray(replay.golden[key])
    if key in _UNUSED:
        return Compared(key, 0.0, None, "not used by the model")
    if key == "mask_token_id":
        mask = replay.denoiser.config.mask_token_id
        note = "config.json names none" if mask is None else ""
        return Compared(key, float(mask not in (None, int(recorded))), 0.0, note)
    if key == _BFLOAT16:
        ours, exact = np.asarray(replay.bfloat16()), False
    else:
        try:
            ours, exact = replay.quantity(key)
        except KeyError as missing:
            return Compared(key, float("nan"), tolerance, missing.args[0])
    if ours.shape != recorded.shape:
        note = f"shape {recorded.shape} in the recording, {ours.shape} here"
        return Compared(key, float("nan"), tolerance, note)
    if exact:
        wrong = np.any(np.sort(ours, -1) != np.sort(recorded, -1), axis=-1)
        return Compared(key, float(np.sum(wrong)), 0.0)
    error = float(np.max(np.abs(recorded - ours), initial=0))
    if key == _BFLOAT16:
        return Compared(key, error, None, "informative")
    return Compared(key, error, tolerance)


class _Replay:
    """Our side of a recording, each case computed once."""

    def __init__(self, denoiser: Transformer, theta: Theta, golden: Mapping[str, np.ndarray]):
        self.denoiser, self.theta, self.golden = denoiser, theta, golden
        self._tokens = jnp.asarray(golden["input_ids"], jnp.int32)
        self._seen = functools.cache(self._inspect)
        layers: Any = golden.get("layers", range(denoiser.num_layers))
        self._layers = [int(layer) for layer in layers]
        if unknown := set(self._layers) - set(range(denoiser.num_layers)):
            raise ValueError(
                f"layers of the recording has {sorted(unknown)}; the model has the layers 0 to "
                f"{denoiser.num_layers - 1}"
            )

    def quantity(self, key: str) -> tuple[np.ndarray, bool]:
        """Our value of a recorded key, and whether it must be equal exactly.

        Raises:
            KeyError: the key is not understood; says why.
        """
        for name, of in _QUANTITIES.items():
            if key == name or key.startswith(f"{name}_"):
                case = key.removeprefix(name).removeprefix("_")
                if name not in _LAYERED:
                    return np.asarray(of(self, case)), False
                one = re.fullmatch(r"(?:(.+)_)?layer(\d+)", case)
                if not one:
                    return self._stacked(name, case, len(self.golden[key])), name == "topk_idx"
                own = self._by_layer(name, one[1] or "")
                if int(one[2]) not in own:
                    raise KeyError(f"layer {one[2]} of the model has no {name}")
                return np.asarray(own[int(one[2])]), name == "topk_idx"
        raise KeyError(_UNKNOWN)

    def _stacked(self, name: str, case: str, count: int) -> np.ndarray:
        """One array of the recorded layers; ``count`` is the length of the recorded array."""
        own = self._by_layer(name, case)
        chosen = [own[layer] for layer in self._layers if layer in own]
        # Of some layers the embeddings may be left out.
        if name == "hidden" and ("layers" not in self.golden or count != len(self._layers)):
            chosen.insert(0, self.hidden(case)[0])
        if not chosen:
            raise KeyError(f"no layer of the model has {name}")
        return np.stack(chosen)

    def _by_layer(self, name: str, case: str) -> Mapping[int, Any]:
        """A quantity by number of the layer; of routers only layers that have one."""
        if name not in _ROUTERS:
            value = _QUANTITIES[name](self, case)
            return dict(enumerate(value[1:] if name == "hidden" else value))
        part = {"router_logits": "logits", "topk_idx": "index", "topk_weight": "weights"}[name]
        routers = self._seen(case)["router"]
        return {layer: self._ordered(name, router, part) for layer, router in routers.items()}

    def _ordered(self, name: str, router: Mapping[str, jax.Array], part: str) -> np.ndarray:
        if name != "topk_weight":
            return np.asarray(router[part])
        # Recordings keep the weights beside the experts in one of two orders.
        index = np.asarray(router["index"])
        recorded = [np.asarray(v) for k, v in self.golden.items() if k.startswith("topk_idx")]
        by_number = all(np.all(np.diff(idx, axis=-1) > 0) for idx in recorded)
        order = (
            np.argsort(index, -1)
            if by_number
            else np.broadcast_to(np.arange(index.shape[-1]), index.shape)
        )
        return np.take_along_axis(np.asarray(router[part]), order, -1)

    def where(self, case: str) -> tuple[jax.Array | None, jax.Array | None]:
        """Mask and position ids of a case.

        Raises:
            KeyError: the recording has no such case.
        """
        positions = self.golden.get(f"positions_{case}" if case else "positions")
        mask = self._mask(case)
        if case and mask is None and positions is None:
            raise KeyError(_UNKNOWN)
        if positions is None:
            positions = self.golden.get("positions")
        return mask, None if positions is None else jnp.asarray(positions, jnp.int32)

    def _mask(self, case: str) -> jax.Array | None:
        keys = self.golden.get(f"attention_mask_{case}" if case else "attention_mask")
        if keys is not None:
            seen = jnp.asarray(keys) > 0
            sees = family_of(type(self.denoiser)).padding_sees
            return seen if sees else seen[:, :, None] & seen[:, None, :]
        bias = case.startswith("bias01_")
        attend = self.golden.get(f"attend_{case.removeprefix('bias01_')}")
        if attend is None:
            return None
        mask = jnp.asarray(attend)
        mask = jnp.broadcast_to(mask, (self._tokens.shape[0], *mask.shape[-2:]))
        return mask.astype(jnp.float32) if bias else mask

    def _inspect(self, case: str) -> dict[str, Any]:
        context = Context(*self.where(case))
        return jax.jit(self.denoiser.inspect)(self.theta, self._tokens, context)

    def hidden(self, case: str) -> jax.Array:
        """Embeddings and outputs of every layer, [n + 1, b, l, d]."""
        return self._seen(case)["hidden"]

    def part(self, name: str, case: str) -> jax.Array:
        """What every layer adds to the residual stream, [n, b, l, d]."""
        return self._seen(case)[name]

    def final_norm(self, case: str) -> jax.Array:
        """Normed output of the last layer, [b, l, d]."""
        return self.denoiser.normalise(self.theta, self.hidden(case)[-1])

    def logits(self, case: str, shifted: bool) -> jax.Array:
        """Logits by way of trunk, head and readout, [b, l, v]; raw or for the token itself."""
        denoiser = self.denoiser
        if denoiser.config.right_shift:
            denoiser = denoiser.with_config(shift=shifted)
        return self._logits(denoiser, case)

    def bfloat16(self) -> jax.Array:
        """Logits of the first case with activations in bfloat16."""
        narrow = self.denoiser.with_config(dtype="bfloat16")
        if narrow.config.right_shift:
            narrow = narrow.with_config(shift=False)
        return self._logits(narrow, "")

    def _logits(self, denoiser: Transformer, case: str) -> jax.Array:
        split = denoiser.num_layers - 1
        context = Context(*self.where(case))

        @jax.jit
        def run(theta):
            hidden = denoiser.trunk(theta, self._tokens, context, split=split)
            last = denoiser.head(theta, None, hidden, context, split=split)
            return denoiser.readout(theta, last)

        return run(self.theta)


_UNKNOWN = "unknown quantity or case"
_ROUTERS = ("router_logits", "topk_idx", "topk_weight")
_LAYERED = ("hidden", "attn_out", "mlp_out", *_ROUTERS)

# Longer names first: ``logits_shifted`` is no case of ``logits``.
_QUANTITIES: dict[str, Callable[[_Replay, str], Any]] = {
    "logits_shifted": lambda replay, case: replay.logits(case, shifted=True),
    "logits": lambda replay, case: replay.logits(case, shifted=False),
    "hidden": lambda replay, case: replay.hidden(case),
    "final_norm": lambda replay, case: replay.final_norm(case),
    "attn_out": lambda replay, case: replay.part("attention", case),
    "mlp_out": lambda replay, case: replay.part("feed_forward", case),
    **dict.fromkeys(_ROUTERS, lambda replay, case: None),
}


def worst(found: list[Compared]) -> Iterator[tuple[str, Compared]]:
    """Pairs of quantity and its worst comparison over all cases, unequal ones first."""
    by_quantity: dict[str, Compared] = {}
    for compared in found:
        quantity = next((q for q in _QUANTITIES if compared.name.startswith(q)), compared.name)
        quantity = compared.name if compared.tolerance is None else quantity
        kept = by_quantity.get(quantity)
        if kept is None or (not compared.equal, compared.error) > (not kept.equal, kept.error):
            by_quantity[quantity] = compared
    yield from by_quantity.items()
