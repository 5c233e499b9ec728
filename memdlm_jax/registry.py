"""Tables of named parts: a config names a part, and a user can add one without editing the package.

Each table holds one kind of part (inner losses, masking strategies, ...). A new part is one class
or function with one decorator:

    from memdlm_jax.registry import INNER_LOSSES

    @INNER_LOSSES.register("huber")
    def huber(...): ...

A config then says ``memory.loss="huber"``. It can also name a part that is not registered, as
``"my_module:my_loss"``: the module is imported from Python's path when the config is read, so that
every later reader of that config (a resumed run, decoding, evaluation) finds the same part.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Registry:
    """Parts of one kind by name.

    Attributes:
        kind: what the parts are, for error messages ("inner loss").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._parts: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds a part under ``name``.

        Raises:
            ValueError: the name is taken by another part, or contains a colon.
        """
        if ":" in name:
            raise ValueError(f"{self.kind} {name!r} must not contain ':', which means MODULE:NAME")

        def add(part: T) -> T:
            if self._parts.get(name, part) is not part:
                raise ValueError(f"there is already a {self.kind} called {name!r}")
            self._parts[name] = part
            return part

        return add

    def __call__(self, name: str, field: str = "") -> Any:
        """Look up a registered part, or import ``MODULE:NAME``.

        Args:
            name: of the part.
            field: dotted config field that holds the name, for the message of an error.

        Raises:
            ValueError: there is no such part; says which are known and how to name one's own.
        """
        if name in self._parts:
            return self._parts[name]
        where = f"{field}={name!r}" if field else f"{self.kind} {name!r}"
        if not isinstance(name, str) or ":" not in name:
            raise ValueError(
                f"{where} must be one of {', '.join(map(repr, self.names()))}, or MODULE:NAME of "
                f"your own {self.kind}"
            )
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{where} cannot be imported: {error}") from error

    def names(self) -> list[str]:
        """Names of the registered parts, in the order of registration."""
        return list(self._parts)


SCHEDULES = Registry("masking schedule")
MASKING_STRATEGIES = Registry("masking strategy")
INNER_LOSSES = Registry("inner loss")
INNER_OPTIMIZERS = Registry("inner optimiser")
META_GRADIENTS = Registry("meta-gradient rule")
CORPORA = Registry("corpus")
BACKBONES = Registry("backbone")
