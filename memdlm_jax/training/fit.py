"""What a training run holds in a device's memory at the least, before it is launched."""

import dataclasses
import math
from typing import Any

import jax

from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.training.sharding import Layout
from memdlm_jax.typing import Denoiser, Theta

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device; activations come on top.

    Attributes:
        trained: parameters that are trained.
        frozen: parameters that are not.
        optimizer: their gradient and both moments of AdamW.
        fast_weights: phi and its gradient, of all memories that are alive at a time.
    """

    trained: int
    frozen: int
    optimizer: int
    fast_weights: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.trained + self.frozen + self.optimizer + self.fast_weights

    def __str__(self) -> str:
        parts = dataclasses.asdict(self) | {"total": self.total}
        return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())


def needed(
    denoiser: Denoiser, trained: Any, frozen: Theta, memory: MemoryConfig | None, rows: int,
    layout: Layout | None = None,
) -> Need:  # fmt: skip
    """Count what a training step cannot do without.

    Args:
        denoiser: the backbone.
        trained: pytree of arrays or ``jax.ShapeDtypeStruct`` that the optimiser changes.
        frozen: such a pytree, or ``None``.
        memory: settings of the Parametric Memory, ``None`` for none.
        rows: rows of one micro-batch on a device.
        layout: how parameters are divided; ``None`` if they are not.
    """
    on_device = _bytes if layout is None else layout.bytes_per_device
    size = on_device(trained)
    phi = 0 if memory is None else groups_of(memory, rows) * bytes_per_memory(denoiser, memory)
    return Need(size, on_device(frozen), 3 * size, 2 * phi)


def groups_of(memory: MemoryConfig, rows: int) -> int:
    """Memories of so many rows on one device, at the most."""
    return {"example": rows, "global": 1, "device": min(memory.groups, rows)}[memory.scope]


def bytes_per_memory(denoiser: Denoiser, memory: MemoryConfig) -> int:
    """Bytes of the fast weights of one memory."""
    shapes = jax.eval_shape(
        lambda key: fast_weights.init(key, denoiser, memory, groups=1), jax.random.key(0)
    )
    return _bytes(shapes)


def device_bytes() -> int | None:
    """Memory of the first local device, ``None`` where the platform does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def require(need: Need, limit: int | None) -> None:
    """Raise ValueError if ``need`` is more than ``limit`` bytes; ``None`` allows everything."""
    if limit is not None and need.total > limit:
        raise ValueError(
            f"this run needs at least {need.total / GIB:.2f} GiB on a device that has "
            f"{limit / GIB:.2f} GiB ({need}), and activations on top. Lower the rows of a batch, "
            "memory.rank or memory.layer_fraction, train adapters (lora) or hold the base in "
            "fewer bits (base)"
        )


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
