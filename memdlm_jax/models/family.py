"""How a family of backbones is published: fields of its ``config.json``, names of its tensors.

A backbone is one file: its config, and a ``Transformer`` that holds a ``Family`` as ``family`` and
is registered in ``BACKBONES``. The facts are those of the published configs and modelling files.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Published = Mapping[str, Any]
"""A published ``config.json``."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family is published.

    Attributes:
        architectures: class names in ``architectures``.
        model_types: ``model_type`` of the release, and those that other programs ask users for.
        read: published config -> our config.
        write: our config -> published config.
        fixed: settings that change the computation -> the values that we compute, the one we
            write first; a setting that is not there has that value.
        top: our path -> published name, outside the layers.
        layer: published prefix of layer ``{}``.
        names: our path in a layer -> published name in it, ``{}`` for the expert.
        dropouts: its dropout rates, all zero in the releases.
        marker: published field that tells it from a family of the same ``model_type``.
        padding_sees: whether padding attends to tokens in the published code; what it computes
            there is used by nothing, and compared by ``evaluation.backbones``.
        releases: name -> config of the full-size models.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[Published], Any]
    write: Callable[[Any], dict[str, Any]]
    fixed: Mapping[str, tuple]
    top: Mapping[str, str]
    layer: str
    names: Mapping[str, str]
    dropouts: tuple[str, ...] = ()
    marker: str = ""
    padding_sees: bool = True
    releases: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def family_of(backbone: type) -> Family:
    """The family of a backbone's class.

    Raises:
        ValueError: it has none. A subclass needs its own: what it computes is another model.
    """
    found = vars(backbone).get("family")
    if not isinstance(found, Family):
        raise ValueError(
            f"{backbone.__name__} has no published form: give the class a Family called family"
        )
    return found


SWIGLU = ("gate_proj", "up_proj", "down_proj")
ATTENTION = {
    f"attention/{name}/{leaf}": f"self_attn.{name}.{kind}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
}
NORMS = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
}
DENSE = {f"mlp/{name}/kernel": f"mlp.{name}.weight" for name in SWIGLU}
EXPERTS = {
    "mlp/router/gate/kernel": "mlp.gate.weight",
    **{f"mlp/experts/{name}/kernel": f"mlp.experts.{{}}.{name}.weight" for name in SWIGLU},
}
TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding": "lm_head.weight",
}


def read_common(p: Published) -> dict[str, Any]:
    """Fields that LLaDA-MoE, LLaDA2 and Dream share."""
    return {
        "vocab_size": p["vocab_size"],
        "width": p["hidden_size"],
        "num_layers": p["num_hidden_layers"],
        "num_heads": p["num_attention_heads"],
        "num_kv_heads": p.get("num_key_value_heads") or p["num_attention_heads"],
        "max_length": p["max_position_embeddings"],
        "rope_theta": float(p["rope_theta"]),
        "norm_epsilon": p["rms_norm_eps"],
        "tied": bool(p.get("tie_word_embeddings", False)),
    }


def check_whole(p: Published, *names: str) -> None:
    """Raise ValueError if one of these fields is not a whole number."""
    for name in names:
        if not isinstance(p[name], int):
            raise ValueError(f"{name}={p[name]!r} must be a whole number")


def check_head_dim(p: Published) -> None:
    """Refuse heads that do not add up to the width, where the family has no such sizes."""
    check_whole(p, "hidden_size", "num_attention_heads")
    size = p["hidden_size"] // p["num_attention_heads"]
    if p.get("head_dim") not in (None, size):
        raise ValueError(
            f"head_dim={p['head_dim']} is unsupported, only hidden_size / heads={size}"
        )


def write_common(c: Any) -> dict[str, Any]:
    """Inverse of ``read_common``."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied,
    }


def mask_token_id_of(p: Published) -> int | None:
    """The config's, or that of the release: LLaDA-MoE's and LLaDA2's configs do not name it."""
    if p.get("mask_token_id") is not None:
        return p["mask_token_id"]
    return 156_895 if p["vocab_size"] == 157_184 else None
