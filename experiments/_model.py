"""Model folders as scripts load them: weights or adapters, a narrow base, and the tokenizer."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, Literal, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_dict

from memdlm_jax import storage
from memdlm_jax.checkpoints import families, hub, hugging_face
from memdlm_jax.checkpoints.folders import read_json
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.models import lora
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.models.quantize import quantize, quantized_tree
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.parameters import partition
from memdlm_jax.progress import Progress
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.typing import Theta

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Base = Literal["float32", "bfloat16", "int8", "nf4"]
"""How parameters are held: in full, or the layers' matrices as codes and the rest in bfloat16."""

_NARROW = ("int8", "nf4")


def load(
    folder: str, dtype: str, base: Base | None = None, under: str = "", block: int = 64,
    layout: Layout | None = None,
) -> tuple[Transformer, Theta, Tokenizer]:  # fmt: skip
    """Load a model folder with its tokenizer.

    Args:
        folder: with a model, or with a PEFT adapter.
        dtype: of the activations.
        base: how parameters are held, ``None`` as the activations. Routers are never narrow: which
            expert a token goes to hangs on small differences.
        under: model folder under an adapter; empty is the one that the adapter names.
        block: weights that share a scale in a narrow base.
        layout: where parameters are put as they are read, ``None`` for the default device.

    Raises:
        FileNotFoundError, ValueError: see ``hugging_face.load`` and ``Tokenizer.load``; or model
            and tokenizer disagree on the vocabulary or the mask token.
    """
    transform = None
    if base in _NARROW:
        transform = functools.partial(_narrow, kind=base, block=block)
    param_dtype = "bfloat16" if base in _NARROW else base
    sharding: hugging_face.Sharding | None = None
    if layout is not None:
        sharding = layout.where(param_dtype or dtype)
    if sharding is not None and transform is not None:
        sharding = _inputs_whole(sharding)
    with Progress(f"loading {folder}", unit=""):
        denoiser, theta = hugging_face.load(
            folder, dtype, param_dtype, base=under or None, sharding=sharding, transform=transform
        )
    tokenizer = Tokenizer.load(tokenizer_folder(folder, under))
    if denoiser.config.mask_token_id is None:
        denoiser = denoiser.with_config(mask_token_id=tokenizer.mask_id)
    check_tokenizer(denoiser, tokenizer, folder)
    return denoiser, theta, tokenizer


def _narrow(path: str, matrices, *, kind, block: int):
    return matrices if "/router/" in path else quantize(matrices, kind, block)


def _inputs_whole(sharding: hugging_face.Sharding) -> hugging_face.Sharding:
    """The same without the axis of a matrix's inputs, which have fewer scales than weights."""

    def where(path: str, shape: tuple[int, ...]):
        place = cast(NamedSharding, sharding(path, shape))
        if not path.endswith("/kernel") or "/router/" in path:
            return place
        *leading, _, outputs = place.spec
        return NamedSharding(place.mesh, PartitionSpec(*leading, None, outputs))

    return where


def narrow(theta: Theta, kind: Literal["int8", "nf4"], block: int = 64) -> Theta:
    """Theta with the layers' matrices as codes, as ``load`` holds a narrow base."""
    return quantized_tree(
        theta, kind, lambda p: p.endswith("/kernel") and "/router/" not in p, block
    )


def described(name: str) -> Transformer:
    """A published model by name, or that of a folder's ``config.json``; no weights are read.

    An adapter's folder stands for the model that it names.

    Raises:
        FileNotFoundError, ImportError, ValueError: there is neither, or its config is unsupported.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    folder = storage.path(hub.local(name))
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is no folder and none of {sorted(PUBLISHED)}")
    file = hugging_face.base_of(folder) / "config.json"
    return families.denoiser_of(read_json(file), file, param_dtype="bfloat16")


def shapes(denoiser: Transformer, base: str, adapters: LoraConfig | None) -> Theta:
    """Theta as ``jax.ShapeDtypeStruct``, as a run with this base and these adapters holds it."""
    narrow_base = base in _NARROW
    denoiser = denoiser.with_config(param_dtype="bfloat16" if narrow_base else base)

    def build(key):
        theta = denoiser.init(key)
        if narrow_base:
            theta = narrow(theta, cast(Any, base))
        return theta if adapters is None else lora.add(key, denoiser, theta, adapters)

    theta = jax.eval_shape(build, jax.random.key(0))
    return theta if adapters is None else partition(theta, lora.is_adapter)


def resolve(settings: dict[str, Any], *names: str) -> None:
    """Replace hub ids (``ORG/NAME@REVISION``) in these settings by the folders they come to.

    Raises:
        ImportError, FileNotFoundError: see ``hub.local``.
    """
    for name in names:
        if isinstance(settings.get(name), str):
            settings[name] = hub.local(settings[name])


def distributed_defaults() -> config_dict.ConfigDict:
    """The section ``distributed`` of a config file: alone, see ``processes.DistributedConfig``."""
    return config_dict.ConfigDict(
        {
            "coordinator": config_dict.placeholder(str),
            "num_processes": config_dict.placeholder(int),
            "process_id": config_dict.placeholder(int),
            "auto": False,
            "heartbeat_seconds": 100,
        }
    )


def lora_defaults() -> config_dict.ConfigDict:
    """The ``lora`` section of scripts that train: all settings, as the public script has them."""
    return config_dict.ConfigDict(dataclasses.asdict(LoraConfig()))


def mesh_defaults() -> config_dict.ConfigDict:
    """The ``mesh`` section of scripts that train: all rows divided, nothing else."""
    return config_dict.ConfigDict(dataclasses.asdict(MeshConfig()))


def tokenizer_folder(folder: str, under: str = "") -> Path:
    """The folder itself, or that of the model under an adapter that brings no tokenizer."""
    own = storage.path(folder)
    brings = any((own / name).exists() for name in ("tokenizer.json", "vocab.json"))
    if brings or not hugging_face.is_adapter(own):
        return own
    return hugging_face.base_of(own, under or None)


def check_tokenizer(denoiser: Transformer, tokenizer: Tokenizer, folder: str) -> None:
    """Raise ValueError if model and tokenizer disagree on vocabulary or mask token."""
    model = denoiser.config
    if tokenizer.mask_id != model.mask_token_id or tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has mask id {tokenizer.mask_id} and "
            f"{tokenizer.vocab_size} ids, the model has mask id {model.mask_token_id} and "
            f"{model.vocab_size} ids"
        )
