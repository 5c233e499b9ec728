"""Answer prompts on all devices of a process: rows are divided, the model is on every device.

Two cores of a CPU count as two devices with ``JAX_NUM_CPU_DEVICES=2``. Each then works through its
own rows and never waits for the other, which takes less time than sharing every operation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.memory import fast_weights, generation
from memdlm_jax.memory.generation import Generator
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.typing import Key, Mask, Phi, Theta, Tokens

_ROWS = "decoded_rows"
_COUNTS = "whole", "parts"


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Put arrays on every device, once; what is there already is not moved.

    Args:
        tree: parameters, for instance. If they are divided over devices they stay as they are.
        devices: of this process; ``None`` for all of them.
    """
    devices = tuple(devices or jax.local_devices())
    spread = any(_number_of_devices(leaf) > 1 for leaf in jax.tree.leaves(tree))
    if _is_divided(tree) or (len(devices) == 1 and not spread):
        return tree
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()))


def _number_of_devices(leaf: Any) -> int:
    return len(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else 1


def _is_divided(tree: Any) -> bool:
    """Whether a device holds a part of an array alone, as on a mesh."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return not all(leaf.is_fully_replicated for leaf in arrays)


def generate(
    generator: Generator,
    theta: Theta,
    keys: Key,
    prompts: Tokens | np.ndarray,
    valid: Mask | np.ndarray,
    inner: InnerParameters | None = None,
    phi: Phi = None,
    context: tuple[Tokens | np.ndarray, Mask | np.ndarray] | None = None,
    *,
    record: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Decoded:
    """``generation.generate`` with its rows divided over devices; what a row gets is the same.

    If the devices do not divide the rows, the last row is computed more than once. Parameters that
    ``replicate`` has not placed are sent to every device at each call. Where they are divided over
    devices themselves, as on a mesh, the rows are not.

    Args:
        generator: who answers.
        theta: base parameters.
        keys: [b] one PRNG key per row.
        prompts: [b, p] int32.
        valid: [b, p] bool.
        inner: the learned inner loop's parameters.
        phi: memory that was written before, one group for all rows.
        context: what is to be written in the place of the prompts.
        record: keep the window after every step.
        devices: of this process; ``None`` for all of them. More than rows are not used.

    Returns:
        ``Decoded``; its counts of passes are those of the device that took most. With several
        devices it is ready: they are waited for.

    Raises:
        ValueError: ``phi`` has more groups.
    """
    b = len(prompts)
    devices = tuple(devices or jax.local_devices())[:b]
    theta, inner = replicate((theta, inner), devices)
    if len(devices) == 1 or _is_divided(theta):
        return generation.generate(
            generator, theta, keys, prompts, valid, inner, phi, context, record=record
        )
    groups = 1 if phi is None else fast_weights.number_of_groups(phi)
    if groups != 1:
        raise ValueError(f"phi has {groups} groups; it must have 1, for all rows")
    rows = keys, prompts, valid, context
    taken = np.minimum(np.arange(-(-b // len(devices)) * len(devices)), b - 1)
    if len(taken) > b:
        rows = jax.tree.map(lambda leaf: leaf[taken], rows)
    shared = theta, inner, phi
    # A device that is done must not wait for the others within a program: XLA ends the process
    # after 40 s of that on a CPU. So nothing is summed up or cut before all are done.
    decoded = jax.block_until_ready(_generate(generator, _mesh(devices), record, shared, rows))
    most = {name: jnp.max(getattr(decoded, name)) for name in _COUNTS}
    if len(taken) > b:
        decoded = jax.tree.map(lambda leaf: leaf[:b], decoded)
    return decoded.replace(**most)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(generator: Generator, mesh: Mesh, record: bool, shared, rows) -> Decoded:
    """``Decoded`` with counts [devices], one of each device; devices never wait for each other."""

    def own_rows(shared, rows):
        theta, inner, phi = shared
        keys, prompts, valid, context = rows
        decoded = generation.generate(
            generator, theta, keys, prompts, valid, inner, phi, context, record=record
        )
        return decoded.replace(**{name: getattr(decoded, name)[None] for name in _COUNTS})

    whole, divided = PartitionSpec(), PartitionSpec(_ROWS)
    # Loops and their states differ from device to device, which the check does not let through.
    return jax.shard_map(
        own_rows, mesh=mesh, in_specs=(whole, divided), out_specs=divided, check_vma=False
    )(shared, rows)


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.array(devices), (_ROWS,))
