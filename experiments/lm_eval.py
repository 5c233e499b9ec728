"""lm-evaluation-harness with our models: all options are the harness's own.

    python -m experiments.lm_eval run --model memdlm_jax --model_args pretrained=MODEL \
        --tasks ruler --batch_size 8 --metadata '{"max_seq_lengths": [4096]}'
    python -m experiments.lm_eval run --model memdlm_jax \
        --model_args pretrained=MODEL,memory=True,memory_steps=4 --tasks gsm8k

The harness has no plug-ins: this command registers the model ``memdlm_jax`` and hands over to it.
From Python, ``import experiments.lm_eval`` does the same for ``lm_eval.simple_evaluate``.
``docs/harness.md`` lists ``--model_args``. Beside the harness's own options this command takes
``--config.distributed.coordinator=HOST:PORT`` and the like, as all scripts do: several processes
share the requests out, and the first writes.
"""

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from experiments import _cli, _memory, _model
from memdlm_jax import processes, storage
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import SAMPLERS
from memdlm_jax.evaluation.continuations import PUBLIC
from memdlm_jax.evaluation.harness.requests import DECODE_FIELDS
from memdlm_jax.evaluation.systems import System
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.processes import DistributedConfig

try:
    from memdlm_jax.evaluation.harness.model import HarnessModel  # isort: skip
except ImportError as error:  # It names the extra.
    if __name__ == "__main__":
        sys.exit(f"error: {error}")
    raise

from lm_eval.__main__ import cli_evaluate  # isort: skip
from lm_eval.api.registry import register_model  # isort: skip
from lm_eval.utils import simple_parse_args_string  # isort: skip

_MEMORY = {f"memory_{f.name}" for f in dataclasses.fields(MemoryConfig)}


@dataclasses.dataclass(frozen=True)
class HarnessConfig:
    """All of ``--model_args`` but the fields of the sampler and ``memory_...``.

    Attributes:
        pretrained: model folder, ours or a public one, or hub id ``ORG/NAME@REVISION``.
        memory: write every prompt and context into memory, with the model's settings.
        system: name in the records; empty is ``memdlm`` with memory, and else
            ``memdlm_train_only`` or ``mdlm``, by whether the model was trained with memory.
        sampler: published sampler to start from (``samplers.SAMPLERS``); empty decodes in one
            block of the task's length, one token a step, as LLaDA's public harness does.
        max_length: longest canvas in tokens; 0 is what the model is meant for.
        batch_size: rows at a time.
        mc_samples: masked copies of a continuation for its log-likelihood.
        seed: of masks, memory and sampling noise.
        dtype: of the activations, and of the parameters unless ``base`` says otherwise.
        base: how parameters are held; ``int8`` and ``nf4`` hold the layers' matrices as codes.
        under: model folder under one that holds an adapter; empty is the one that it names.
    """

    pretrained: str
    memory: bool = False
    system: Literal["", "mdlm", "memdlm_train_only", "memdlm"] = ""
    sampler: str = ""
    max_length: int = 0
    batch_size: int = 8
    mc_samples: int = PUBLIC.samples
    seed: int = 0
    dtype: _model.Dtype = "float32"
    base: _model.Base | None = None
    under: str = ""

    def __post_init__(self):
        if not self.pretrained:
            raise ValueError("pretrained='' must name a model folder or hub id")
        if self.system and self.memory != (self.system == "memdlm"):
            raise ValueError(
                f"system={self.system!r} with memory={self.memory}: 'memdlm' writes prompts into "
                "memory, the others do not"
            )
        if self.sampler and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} must be one of {', '.join(SAMPLERS)}")
        for name, least in (("max_length", 0), ("batch_size", 1), ("mc_samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def parse(
    arguments: Mapping[str, Any],
) -> tuple[HarnessConfig, dict[str, Any], dict[str, Any]]:
    """Divide ``--model_args``.

    Returns:
        (settings, fields of the sampler, changes to the model's memory settings by field).

    Raises:
        ValueError: a name is unknown or a value wrong; one line that names it.
    """
    own = {field.name for field in dataclasses.fields(HarnessConfig)}
    known = own | DECODE_FIELDS | _MEMORY
    for name in arguments:
        if name not in known:
            raise ValueError(f"model_args: {name}={arguments[name]!r} {_unknown(name, known, own)}")
    try:
        config = _cli.build(
            HarnessConfig, {k: v for k, v in arguments.items() if k in own}, "model_args"
        )
    except (KeyError, TypeError) as error:
        raise ValueError(error.args[0]) from error
    start = {"block_length": 0}
    if config.sampler:
        start = dataclasses.asdict(SAMPLERS[config.sampler]) | {"steps": 0}
        del start["length"]
    decode = start | {k: v for k, v in arguments.items() if k in DECODE_FIELDS}
    memory = {k.removeprefix("memory_"): v for k, v in arguments.items() if k in _MEMORY}
    if memory and not config.memory:
        raise ValueError(f"model_args: memory_{next(iter(memory))} needs memory=True")
    return config, decode, memory


def _unknown(name: str, known: set[str], own: set[str]) -> str:
    """What to say about a name that is none of ours."""
    if name == "length":
        return "is unknown: it is the task's max_gen_toks, or --gen_kwargs max_gen_toks=N"
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"is unknown: did you mean {close[0]!r}?"
    return (
        f"is unknown: known are {', '.join(sorted(own))}, the fields of DecodeConfig, and those of "
        "MemoryConfig behind memory_"
    )


def system_of(config: HarnessConfig, changed: Mapping[str, Any]) -> tuple[System, Tokenizer, int]:
    """Load the model: (system, tokenizer, longest canvas).

    Raises:
        FileNotFoundError, ImportError, ValueError: see ``_model.load`` and ``_memory.settings``.
    """
    places: dict[str, Any] = {"pretrained": config.pretrained, "under": config.under}
    _model.resolve(places, "pretrained", "under")
    folder, under = places["pretrained"], places["under"]
    denoiser, theta, tokenizer = _model.load(folder, config.dtype, config.base, under)
    memory = learned = None
    if config.memory:
        try:
            memory = _memory.settings(folder, changed)
        except (KeyError, TypeError, ValueError) as error:
            said = str(error.args[0]).replace("config.memory: memory.", "memory_")
            raise ValueError(f"model_args: {said.replace('config.memory.', 'memory_')}") from error
        learned = _memory.inner_parameters(folder, denoiser, memory)
    trained = (storage.path(folder) / _memory.SETTINGS).exists()
    plain = "memdlm_train_only" if trained else "mdlm"
    name = config.system or ("memdlm" if config.memory else plain)
    max_length = config.max_length or denoiser.config.max_length
    inner_loop = inner_loop_for(denoiser, memory)
    return System(name, denoiser, theta, inner_loop, learned), tokenizer, max_length


@register_model("memdlm_jax")
class MemDLM(HarnessModel):
    """A model folder under the harness."""

    def __init__(self, **arguments: Any):
        """Load the model.

        Args:
            **arguments: ``--model_args``.

        Raises:
            FileNotFoundError, ImportError, ValueError: see ``parse`` and ``system_of``.
        """
        config, decode, changed = parse(arguments)
        system, tokenizer, max_length = system_of(config, changed)
        super().__init__(
            system,
            tokenizer,
            max_length=max_length,
            decode=decode,
            batch_size=config.batch_size,
            mc_samples=config.mc_samples,
            seed=config.seed,
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "MemDLM":
        """Build from ``name=value,name=value`` and the harness's own options."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "MemDLM":
        """Build from ``--model_args`` and the harness's own options."""
        return cls(**with_options(arg_dict, additional_config or {}))


def with_options(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``--model_args`` with the harness's ``--batch_size``, ``--device`` and ``--max_batch_size``.

    Where they are not given the harness says batch size 1 and device ``cuda:0``: neither is read.
    One row at a time is ``batch_size=1`` of the arguments.

    Raises:
        ValueError: an option has no meaning here, or says something else than the arguments.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    device, size = asked.get("device"), asked.get("batch_size")
    platform = str(device).split(":")[0].replace("cuda", "gpu")
    if device not in (None, "cuda:0") and platform != jax.default_backend():
        raise ValueError(
            f"--device {device}: JAX runs on {jax.default_backend()!r}; set JAX_PLATFORMS instead"
        )
    if "max_batch_size" in asked:
        raise ValueError("--max_batch_size is for --batch_size auto, which is not supported")
    if size is None:
        return dict(arguments)
    if not str(size).isdecimal():
        raise ValueError(f"--batch_size {size} must be a whole number")
    if int(size) == 1:
        return dict(arguments)
    given = arguments.get("batch_size", int(size))
    if int(size) != given:
        raise ValueError(f"--batch_size {size} and batch_size={given} of model_args differ")
    return {**arguments, "batch_size": given}


def distributed(arguments: Sequence[str]) -> tuple[DistributedConfig, list[str]]:
    """Take ``--config.distributed.NAME=VALUE`` out of the command line; the rest is the harness's.

    Raises:
        ValueError: a name or value is wrong.
    """
    prefix = "--config.distributed."
    ours = [argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)]
    rest = [argument for argument in arguments if not argument.startswith(prefix)]
    given: dict[str, Any] = {}
    for name, _, value in (argument.partition("=") for argument in ours):
        word = value in ("True", "False")
        given[name] = value == "True" if word else int(value) if value.isdecimal() else value
    try:
        return _cli.build(DistributedConfig, given, "config.distributed"), rest
    except (KeyError, TypeError) as error:
        raise ValueError(error.args[0]) from error


def main() -> None:
    """Hand over to the harness; an expected error is one line."""
    # Its bootstrap would fork processes beside JAX's threads, which may hang them.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    # The harness sets up its own loggers only; ours say how far the requests are.
    logging.basicConfig()
    logging.getLogger("memdlm_jax").setLevel(logging.INFO)
    try:
        config, sys.argv[1:] = distributed(sys.argv[1:])
        processes.start(config)
        with processes.ending_together():
            _run()
    except _cli.EXPECTED as error:
        if _is_debugged():
            raise
        sys.exit(_said(error))


def _is_debugged() -> bool:
    """LMEVAL_LOG_LEVEL=DEBUG, the harness's own switch, shows where an error was raised."""
    return logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG)


def _said(error: Exception) -> str:
    return f"error: {error or type(error).__name__}"


def _run() -> None:
    """The harness, in this process or in each of several."""
    if processes.several():
        processes.end_at_sigterm()
        # For the harness a process whose model has rank 0, but which is not itself the first of
        # its host, computes along and writes nothing.
        os.environ["LOCAL_RANK"] = str(jax.process_index())
    try:
        cli_evaluate()
    except _cli.EXPECTED as error:
        if processes.several() and not _is_debugged():
            processes.abort(_said(error))
        raise


if __name__ == "__main__":
    main()
