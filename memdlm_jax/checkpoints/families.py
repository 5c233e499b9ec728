"""The published families: their config fields, their tensor names, and what we make of both.

Facts from the published configs and modelling files. A published setting that changes the
computation and that we do not compute is refused by name, never ignored.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from memdlm_jax.checkpoints import published_configs
from memdlm_jax.checkpoints.published_configs import Published
from memdlm_jax.models.config import runs_of
from memdlm_jax.models.dream import Dream
from memdlm_jax.models.llada import LLaDA
from memdlm_jax.models.llada2 import LLaDA2
from memdlm_jax.models.llada_moe import LLaDAMoE
from memdlm_jax.models.transformer import Transformer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one published tensor goes.

    Attributes:
        path: slash-separated path of the leaf of theta.
        place: index into the leaf's leading axes (layer, expert); empty for a whole leaf.
        name: published name.
        transposed: PyTorch keeps matrices as [out, in], we as [in, out].
    """

    path: str
    place: tuple[int, ...]
    name: str
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family is published.

    Attributes:
        architectures: class names in ``architectures``.
        model_types: ``model_type`` of the release, and those that other programs ask users for.
        denoiser: our class.
        read: published config -> fields of our config.
        write: our config -> published config.
        fixed: settings that change the computation -> the values that we compute, the one we
            write first; a setting that is not there has that value.
        dropouts: its dropout rates, all zero in the releases.
        top: our path -> published name, outside the layers.
        layer: published prefix of layer ``{}``.
        names: our path in a layer -> published name in it, ``{}`` for the expert.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    denoiser: Callable[[Any], Transformer]
    read: Callable[[Published], Any]
    write: Callable[[Any], dict[str, Any]]
    fixed: Mapping[str, tuple]
    dropouts: tuple[str, ...]
    top: Mapping[str, str]
    layer: str
    names: Mapping[str, str]


def entries(
    family: Family, denoiser: Transformer, stacked: Callable[[str], bool] = lambda name: False
) -> Iterator[Entry]:
    """All published tensors of a model.

    Args:
        family: how it is published.
        denoiser: the model.
        stacked: published name of a stack of experts (``...experts.gate_proj``) -> whether they
            lie in one tensor, as the official training code of LLaDA2 merges them.
    """
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
    runs = {run.name: run for run in runs_of(denoiser.config)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        first, *rest = (entry.key for entry in path)
        full = "/".join((first, *rest))
        transposed = rest[-1:] == ["kernel"] or first == "unembedding"
        if first not in runs:
            yield Entry(full, (), family.top[full], transposed)
            continue
        name = family.names["/".join(rest)]
        for i in range(runs[first].length):
            prefix = family.layer.format(runs[first].first + i)
            if "{}" not in name:
                yield Entry(full, (i,), prefix + name, transposed)
                continue
            whole = prefix + name.replace("{}.", "").removesuffix(".weight")
            if stacked(whole):
                yield Entry(full, (i,), whole, transposed)
                continue
            for expert in range(leaf.shape[1]):
                yield Entry(full, (i, expert), prefix + name.format(expert), transposed)


def family_of(published: Published, where: Path | str) -> Family:
    """The family that a published config belongs to.

    ``architectures`` decides; without it ``model_type`` does. LLaDA-MoE shares its ``model_type``
    with dense LLaDA and is told by ``num_experts``.

    Raises:
        ValueError: none is known, naming the fields and what is known.
    """
    named = published.get("architectures") or []
    kind = published.get("model_type")
    for family in FAMILIES:
        if set(named) & set(family.architectures):
            return family
    if not named:
        for family in FAMILIES:
            shared = kind == "llada" and ("num_experts" in published) != (family is LLADA_MOE)
            if kind in family.model_types and not shared:
                return family
    known = [name for family in FAMILIES for name in family.architectures]
    types = sorted({name for family in FAMILIES for name in family.model_types})
    raise ValueError(
        f"{where}: architectures={named} must be one of {known}; where it is missing, "
        f"model_type={kind!r} must be one of {types}"
    )


def family_for(denoiser: Transformer) -> Family:
    """The family of one of our models.

    Raises:
        ValueError: it has no published form.
    """
    for family in FAMILIES:
        if family.denoiser is type(denoiser):
            return family
    raise ValueError(f"{type(denoiser).__name__} has no published form")


def denoiser_of(published: Published, where: Path | str, **changes: Any) -> Transformer:
    """Our model for a published config.

    Args:
        published: content of ``config.json``.
        where: its file, for messages.
        **changes: fields of our config that the published one does not decide (``dtype``).

    Raises:
        ValueError: an unknown architecture, an unsupported setting (all are listed), a missing
            field, or sizes that do not fit together.
    """
    family = family_of(published, where)
    wrong = [
        f"{name}={published[name]!r} is unsupported, only {allowed[0]!r}"
        for name, allowed in {**published_configs.NOWHERE, **family.fixed}.items()
        if name in published and published[name] not in allowed
    ]
    if wrong:
        raise ValueError(f"{where}: " + "; ".join(wrong))
    for name, value in published.items():
        if name.endswith("dropout") and value:
            logger.warning("%s: %s=%s is not applied", where, name, value)
    try:
        config = family.read(published)
    except KeyError as error:
        raise ValueError(f"{where}: the field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return family.denoiser(dataclasses.replace(config, **changes))


def published_config(denoiser: Transformer, dtype: str) -> dict[str, Any]:
    """``config.json`` of one of our models, with parameters of ``dtype``."""
    family = family_for(denoiser)
    fixed = {name: allowed[0] for name, allowed in family.fixed.items()}
    named: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_types[0],
        "torch_dtype": dtype,
    }
    if denoiser.config.mask_token_id is not None:
        named["mask_token_id"] = denoiser.config.mask_token_id
    # The published Python defaults are 0.1 in places.
    named |= dict.fromkeys(family.dropouts, 0.0)
    return fixed | named | family.write(denoiser.config)


_SWIGLU = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = {
    f"attention/{name}/{leaf}": f"self_attn.{name}.{kind}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
}
_NORMS = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
}
_DENSE = {f"mlp/{name}/kernel": f"mlp.{name}.weight" for name in _SWIGLU}
_EXPERTS = {
    "mlp/router/gate/kernel": "mlp.gate.weight",
    **{f"mlp/experts/{name}/kernel": f"mlp.experts.{{}}.{name}.weight" for name in _SWIGLU},
}
_TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding": "lm_head.weight",
}

LLADA = Family(
    architectures=("LLaDAModelLM",),
    model_types=("llada",),
    denoiser=LLaDA,
    read=published_configs.read_llada,
    write=published_configs.write_llada,
    fixed=published_configs.LLADA_FIXED,
    dropouts=("attention_dropout", "embedding_dropout", "residual_dropout"),
    top={
        "embedding": "model.transformer.wte.weight",
        "final_norm/scale": "model.transformer.ln_f.weight",
        "unembedding": "model.transformer.ff_out.weight",
    },
    layer="model.transformer.blocks.{}.",
    names={
        "attention_norm/scale": "attn_norm.weight",
        "attention/q_proj/kernel": "q_proj.weight",
        "attention/k_proj/kernel": "k_proj.weight",
        "attention/v_proj/kernel": "v_proj.weight",
        "attention/o_proj/kernel": "attn_out.weight",
        "mlp_norm/scale": "ff_norm.weight",
        "mlp/gate_proj/kernel": "ff_proj.weight",
        "mlp/up_proj/kernel": "up_proj.weight",
        "mlp/down_proj/kernel": "ff_out.weight",
    },
)

LLADA_MOE = Family(
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    model_types=("llada", "lladamoe"),
    denoiser=LLaDAMoE,
    read=published_configs.read_llada_moe,
    write=published_configs.write_llada_moe,
    fixed=published_configs.LLADA_MOE_FIXED,
    dropouts=("attention_dropout",),
    top=_TOP,
    layer="model.layers.{}.",
    names=_NORMS
    | _ATTENTION
    | _DENSE
    | _EXPERTS
    | {
        "attention/q_norm/scale": "self_attn.q_norm.weight",
        "attention/k_norm/scale": "self_attn.k_norm.weight",
    },
)

LLADA2 = Family(
    architectures=("LLaDA2MoeModelLM",),
    model_types=("llada2_moe", "llada2_moe_21", "llada21_moe", "llada2_moe_veomni"),
    denoiser=LLaDA2,
    read=published_configs.read_llada2,
    write=published_configs.write_llada2,
    fixed=published_configs.LLADA2_FIXED,
    dropouts=("attention_dropout", "embedding_dropout", "output_dropout"),
    top=_TOP | {"embedding": "model.word_embeddings.weight"},
    layer="model.layers.{}.",
    names=_NORMS
    | _DENSE
    | _EXPERTS
    | {
        "attention/query_key_value/kernel": "attention.query_key_value.weight",
        "attention/query_key_value/bias": "attention.query_key_value.bias",
        "attention/q_norm/scale": "attention.query_layernorm.weight",
        "attention/k_norm/scale": "attention.key_layernorm.weight",
        "attention/o_proj/kernel": "attention.dense.weight",
        "mlp/router/selection_bias": "mlp.gate.expert_bias",
        **{
            f"mlp/shared_experts/{name}/kernel": f"mlp.shared_experts.{name}.weight"
            for name in _SWIGLU
        },
    },
)

DREAM = Family(
    architectures=("DreamModel",),
    model_types=("Dream",),
    denoiser=Dream,
    read=published_configs.read_dream,
    write=published_configs.write_dream,
    fixed=published_configs.DREAM_FIXED,
    dropouts=("attention_dropout",),
    top=_TOP,
    layer="model.layers.{}.",
    names=_NORMS | _ATTENTION | _DENSE,
)

FAMILIES = (LLADA, LLADA_MOE, LLADA2, DREAM)
