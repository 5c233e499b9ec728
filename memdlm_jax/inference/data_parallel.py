"""Answer prompts on all devices of a process: rows are divided, the model is on every device.

With ``JAX_NUM_CPU_DEVICES=2`` two cores of a CPU count as two devices. Each then works through its
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
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.inner_loop import InnerParameters
from memdlm_jax.typing import Phi, Theta

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
    prompts: Prompts,
    learned: InnerParameters | None = None,
    phi: Phi = None,
    *,
    record: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Decoded:
    """``generation.generate`` with its rows divided over devices; the results are the same.

    If the devices do not divide the rows, the last row is computed more than once. Parameters that
    ``replicate`` has not placed are sent to every device at each call. If the parameters themselves
    are divided over devices, as on a mesh, the rows are not.

    Args:
        generator: model, memory and sampler.
        theta: base parameters.
        prompts: what to answer; arrays of numpy or jax.
        learned: learned parts of the inner loop.
        phi: memory that was written before, one group for all rows.
        record: keep the window after every step.
        devices: of this process; ``None`` for all of them. More than rows are not used.

    Returns:
        ``Decoded``; its counts of passes are those of the device with the most. With several
        devices this function waits for all of them.

    Raises:
        ValueError: ``phi`` has more groups.
    """
    b = len(prompts.tokens)
    devices = tuple(devices or jax.local_devices())[:b]
    theta, learned = replicate((theta, learned), devices)
    if len(devices) == 1 or _is_divided(theta):
        return generation.generate(generator, theta, prompts, learned, phi, record=record)
    groups = 1 if phi is None else fast_weights.number_of_groups(phi)
    if groups != 1:
        raise ValueError(f"phi has {groups} groups; it must have 1, for all rows")
    taken = np.minimum(np.arange(-(-b // len(devices)) * len(devices)), b - 1)
    if len(taken) > b:
        prompts = jax.tree.map(lambda leaf: leaf[taken], prompts)
    shared = theta, learned, phi
    # On CPU, XLA aborts if one device waits more than 40 s in a collective. So results are reduced
    # and trimmed only after every device has finished.
    decoded = jax.block_until_ready(_generate(generator, _mesh(devices), record, shared, prompts))
    most = {name: jnp.max(getattr(decoded, name)) for name in _COUNTS}
    if len(taken) > b:
        decoded = jax.tree.map(lambda leaf: leaf[:b], decoded)
    return decoded.replace(**most)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(generator: Generator, mesh: Mesh, record: bool, shared, prompts) -> Decoded:
    """``Decoded`` with counts [devices], one of each device; devices never wait for each other."""

    def own_rows(shared, prompts):
        theta, learned, phi = shared
        decoded = generation.generate(generator, theta, prompts, learned, phi, record=record)
        return decoded.replace(**{name: getattr(decoded, name)[None] for name in _COUNTS})

    whole, divided = PartitionSpec(), PartitionSpec(_ROWS)
    # Loops differ from device to device, which ``check_vma`` would refuse.
    return jax.shard_map(
        own_rows, mesh=mesh, in_specs=(whole, divided), out_specs=divided, check_vma=False
    )(shared, prompts)


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.array(devices), (_ROWS,))
