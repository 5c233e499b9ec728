"""What all scripts share: the ``--config`` flag, and ConfigDicts turned into frozen dataclasses."""

import contextlib
import dataclasses
import difflib
import logging
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_dict, config_flags

from memdlm_jax import processes
from memdlm_jax.checkpoints.training_state import CorruptCheckpoint, NoUsableCheckpoint
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.processes import DistributedConfig
from memdlm_jax.registry import SCHEDULES

T = TypeVar("T")

_LOGGERS = ("memdlm_jax", "experiments", "__main__")

EXPECTED: tuple[type[Exception], ...] = (
    OSError, ImportError, ValueError, FloatingPointError, CorruptCheckpoint, NoUsableCheckpoint,
)  # fmt: skip
"""What goes wrong outside the program: its message alone is what a user needs."""


def run(
    parse: Callable[[config_dict.ConfigDict], T],
    main: Callable[[T], None],
    default: str,
    alone: str = "",
) -> None:
    """Parse ``--config=FILE.py`` with its overrides and call ``main`` with the settings.

    An error of settings or input ends the script with status 1 and the line ``error: ...``;
    ``--verbosity=1`` shows where it was raised. Where the settings have a section ``distributed``,
    the process joins others before anything else, see ``processes.start``.

    Args:
        parse: ConfigDict -> settings; may also raise KeyError and TypeError.
        main: the script; may raise what ``EXPECTED`` lists.
        default: config file that is used without ``--config``.
        alone: why the script cannot be run by several processes; empty if it can.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    with _overriding():  # Without --config, the overrides are read here.
        config = config_flags.DEFINE_config_file("config", default, "Settings: a file in configs/.")
    profile = flags.DEFINE_integer(
        "profile", 0, "Record this many training steps with jax.profiler in OUTPUT/profile.", 0
    )
    for name in ("config", "profile"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def start(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown arguments {arguments[1:]}: options start with --config.")
        if profile.value:
            if "train" not in config.value:
                raise app.UsageError("--profile is for scripts that train")
            config.value.train.profile_steps = profile.value
        with _one_line(KeyError, TypeError):
            found = _distributed(config.value)
            if alone and found != DistributedConfig():
                raise ValueError(f"config.distributed must be as it is by default: {alone}")
            processes.start(found)
        with processes.ending_together():
            _quiet_unless_first()
            with _one_line(KeyError, TypeError):
                settings = parse(config.value)
            with _one_line():
                main(settings)

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    app.run(start, flags_parser=_parse_flags)


def _distributed(config: config_dict.ConfigDict) -> DistributedConfig:
    """The section ``distributed`` of a script's settings; without it there is one process."""
    if "distributed" not in config:
        return DistributedConfig()
    return build(DistributedConfig, config.distributed, "config.distributed")


def drop_distributed(settings: dict[str, Any]) -> None:
    """Check and take away what ``run`` reads: where a process runs is no part of what it computes.

    Raises:
        KeyError, TypeError, ValueError: see ``build``.
    """
    build(DistributedConfig, settings.pop("distributed", {}), "config.distributed")


def _quiet_unless_first() -> None:
    """Let one process speak of what all do."""
    if jax.distributed.is_initialized() and not processes.is_first():
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)


def _parse_flags(arguments: list[str]) -> list[str]:
    with _overriding():
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            said = str(error)
            # What a config file raises comes as the text of a traceback, which ends with it.
            if "parsing config file" in said:
                said = said.strip().splitlines()[-1].split(": ", 1)[-1].strip()
            sys.exit(f"error: {said}")


def _overriding() -> contextlib.AbstractContextManager[None]:
    """Report what config_flags raises for a field that is not there."""
    kinds = AttributeError, KeyError, IndexError, TypeError
    return _one_line(*kinds, prefix="the config file has no such field: ")


@contextlib.contextmanager
def _one_line(*further: type[Exception], prefix: str = "") -> Iterator[None]:
    """End the program with the message of an expected error, or of one of ``further`` kinds."""
    try:
        yield
    except EXPECTED + further as error:
        if absl_logging.get_verbosity() >= absl_logging.DEBUG:
            raise
        said = f"error: {prefix if isinstance(error, further) else ''}{_message(error)}"
        if jax.distributed.is_initialized() and processes.several():
            processes.abort(said)
        sys.exit(said)


def _message(error: Exception) -> str:
    """What an error says; KeyErrors quote it, and config_flags wraps them in further errors."""
    while len(error.args) == 1 and isinstance(error.args[0], Exception):
        error = error.args[0]
    if isinstance(error, KeyError) and error.args:
        return " ".join(str(error.args[0]).split())
    return str(error) or type(error).__name__


def build(kind: type[T], settings: Mapping[str, Any], path: str = "config") -> T:
    """Turn settings into a dataclass, nested ones included.

    Args:
        kind: a dataclass.
        settings: its fields by name, nested mappings for nested dataclasses; a ConfigDict is one.
        path: dotted path of ``settings``, for messages.

    Raises:
        KeyError: for unknown and missing fields, by dotted path.
        TypeError: for a value of another type than its field's, by dotted path.
        ValueError: what the dataclass itself finds wrong, after its dotted path.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for name in settings:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {sorted(fields)}"
            raise KeyError(f"{path}.{name} is no field of {kind.__name__}; {hint}")
    for name, field in fields.items():
        if name not in settings and _required(field):
            raise KeyError(f"{path}.{name} is missing; {kind.__name__} needs it")
    hints = typing.get_type_hints(kind)
    values = {
        name: _convert(hints[name], value, f"{path}.{name}") for name, value in settings.items()
    }
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build_schedule(settings: Mapping[str, Any], path: str) -> Schedule:
    """Build the masking schedule that ``name`` names, ``linear`` if there is none.

    Raises:
        KeyError, TypeError, ValueError: see ``build``; or there is no schedule of this name.
    """
    fields = dict(settings)
    name = fields.pop("name", "linear")
    kind = SCHEDULES(name, f"{path}.name")
    if not (isinstance(kind, type) and issubclass(kind, Schedule)):
        raise ValueError(f"{path}.name={name!r} must name a subclass of Schedule, not {kind!r}")
    return build(kind, fields, path)


def drop_disabled(settings: dict[str, Any], name: str, kind: type) -> None:
    """Replace a section by ``None`` where its ``enabled`` is False or it is missing, in place.

    Raises:
        TypeError, KeyError, ValueError: ``enabled`` is no bool, or what is dropped is ill-formed.
    """
    section = settings.get(name) or {}
    enabled = section.pop("enabled", bool(section))
    if type(enabled) is not bool:
        raise TypeError(f"config.{name}.enabled={enabled!r} must be bool")
    if not enabled:
        build(kind, section, f"config.{name}")  # a typo is an error all the same
        settings[name] = None


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check one value against its type hint; lists become tuples, ints become floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{path}={value!r} must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if hint is Schedule and isinstance(value, Mapping | config_dict.ConfigDict):
        return build_schedule(typing.cast(Mapping, value), path)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping | config_dict.ConfigDict):
        return build(typing.cast(type, hint), typing.cast(Mapping, value), path)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    raise TypeError(f"{path}={value!r} is {type(value).__name__}, must be {_name(hint)}")


def _convert_optional(arguments: tuple, value: Any, path: str) -> Any:
    others = [argument for argument in arguments if argument is not type(None)]
    optional = len(others) < len(arguments)
    # A choice among words is text on the command line, where None is the word.
    word = value == "None" and typing.get_origin(others[0]) is typing.Literal
    if optional and (value is None or word):
        return None
    if len(others) != 1:
        raise TypeError(f"{path}: cannot choose among {[_name(other) for other in others]}")
    return _convert(others[0], value, path)


def _convert_tuple(arguments: tuple, value: Any, path: str) -> tuple:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{path}={value!r} is {type(value).__name__}, must be a tuple")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise TypeError(f"{path}={value!r} has {len(value)} values, must have {len(arguments)}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_convert(hint, item, f"{path}[{i}]") for i, (hint, item) in pairs)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
