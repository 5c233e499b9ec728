"""From a published ``config.json`` to a model and back, and where its tensors go.

The facts about each family are in ``models``. A published setting that changes the computation and
that we do not compute is refused by name, never ignored.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import jax

from memdlm_jax import storage
from memdlm_jax.checkpoints.folders import read_json
from memdlm_jax.models import published as _registered  # noqa: F401 (the backbones of the package)
from memdlm_jax.models.config import runs_of
from memdlm_jax.models.family import Published, family_of
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.registry import BACKBONES

logger = logging.getLogger(__name__)

OUR_KEY = "memdlm_backbone"
"""Key of ``config.json`` that names a backbone outside the package: ``MODULE:CLASS``."""

# What no family has, and other models' configs may ask for: never ignored.
_NOWHERE: dict[str, tuple] = {
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "final_logit_softcapping": (None,),
    "logit_softcap": (None,),
    "norm_softmax": (False, None),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "sliding_window_pattern": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}


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


def entries(
    denoiser: Transformer, stacked: Callable[[str], bool] = lambda name: False
) -> Iterator[Entry]:
    """All published tensors of a model.

    Args:
        denoiser: the model.
        stacked: published name of a stack of experts (``...experts.gate_proj``) -> whether they
            lie in one tensor, as the official training code of LLaDA2 merges them.

    Raises:
        ValueError: the model has no published form, or its family does not name a parameter.
    """
    family = family_of(type(denoiser))
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
    runs = {run.name: run for run in runs_of(denoiser.config)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        first, *rest = (entry.key for entry in path)
        full = "/".join((first, *rest))
        transposed = rest[-1:] == ["kernel"] or first == "unembedding"
        if first not in runs:
            yield Entry(full, (), _name(family.top, full, denoiser), transposed)
            continue
        name = _name(family.names, "/".join(rest), denoiser)
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


def _name(names: Mapping[str, str], path: str, denoiser: Transformer) -> str:
    if path not in names:
        raise ValueError(f"the family of {type(denoiser).__name__} names no tensor for {path}")
    return names[path]


def backbone_of(published: Published, where: Path | str) -> type[Transformer]:
    """The class of the backbone that a published config describes.

    ``memdlm_backbone`` decides, then ``architectures``; without both ``model_type`` does, and among
    families of one ``model_type`` the field that marks one of them.

    Args:
        published: content of ``config.json``.
        where: its file, for messages; a module beside it is never imported.

    Raises:
        ValueError: none is known, naming the fields and what is known.
    """
    if OUR_KEY in published:
        field = f"{where}: {OUR_KEY}"
        _refuse_code_of(Path(where).parent, published[OUR_KEY], field)
        return _checked(BACKBONES(published[OUR_KEY], field), f"{field}={published[OUR_KEY]!r}")
    known = [_checked(BACKBONES(name), f"backbone {name!r}") for name in BACKBONES.names()]
    families = {backbone: family_of(backbone) for backbone in known}
    named, kind = published.get("architectures") or [], published.get("model_type")
    for backbone, family in families.items():
        if set(named) & set(family.architectures):
            return backbone
    fitting = [] if named else [b for b, family in families.items() if kind in family.model_types]
    if fitting:
        marked = [b for b in fitting if families[b].marker in published]
        plain = [b for b in fitting if not families[b].marker]
        return (marked or plain or fitting)[0]
    architectures = [name for family in families.values() for name in family.architectures]
    types = sorted({name for family in families.values() for name in family.model_types})
    raise ValueError(
        f"{where}: architectures={named} must be one of {architectures}; where it is missing, "
        f"model_type={kind!r} must be one of {types}; or {OUR_KEY} must name your own MODULE:CLASS"
    )


def _checked(found: Any, what: str) -> type[Transformer]:
    """The backbone, if it is a class that says how it is published."""
    if not (isinstance(found, type) and issubclass(found, Transformer)):
        raise ValueError(f"{what} is {found!r}, must be a subclass of Transformer with a Family")
    family_of(found)
    return found


def _refuse_code_of(folder: Path, name: Any, field: str) -> None:
    """Raise ValueError if a module would be imported from a model folder or from around it."""
    module = str(name).partition(":")[0]
    top = module.partition(".")[0]
    spec = None if not top or module in sys.modules else PathFinder.find_spec(top)
    if spec is None:
        return
    for place in spec.submodule_search_locations or (str(spec.origin),):
        source, model = Path(place).resolve(), folder.resolve()
        if source.is_relative_to(model) or model.is_relative_to(source):
            raise ValueError(
                f"{field}={name!r} is code beside the weights, in {source}, which is never run: "
                "move the module to another folder on Python's path"
            )


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
    backbone = backbone_of(published, where)
    family = family_of(backbone)
    wrong = [
        f"{name}={published[name]!r} is unsupported, only {allowed[0]!r}"
        for name, allowed in {**_NOWHERE, **family.fixed}.items()
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
    return backbone(dataclasses.replace(config, **changes))


def published_config(
    denoiser: Transformer, dtype: str, like: str | Path | None = None
) -> dict[str, Any]:
    """``config.json`` of one of our models.

    Args:
        denoiser: the model.
        dtype: of its parameters.
        like: a model folder whose further fields are kept.
    """
    kept = read_json(storage.path(like) / "config.json") if like else {}
    kept.pop(OUR_KEY, None)
    backbone = type(denoiser)
    family = family_of(backbone)
    fixed = {name: allowed[0] for name, allowed in family.fixed.items()}
    named: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_types[0],
        "torch_dtype": dtype,
    }
    if backbone.__module__.partition(".")[0] != __name__.partition(".")[0]:
        named[OUR_KEY] = f"{backbone.__module__}:{backbone.__qualname__}"
    if denoiser.config.mask_token_id is not None:
        named["mask_token_id"] = denoiser.config.mask_token_id
    # The published Python defaults are 0.1 in places.
    named |= dict.fromkeys(family.dropouts, 0.0)
    return kept | fixed | named | family.write(denoiser.config)
