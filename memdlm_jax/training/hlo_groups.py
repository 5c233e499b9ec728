"""Which devices take part in a collective, from the ways in which HLO text says it."""

import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:\s*,?\s*device_ids=\S+)?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})?\}")


def groups_of(attributes: str, num_devices: int, devices_per_host: int) -> tuple[int, int]:
    """Devices of a group, and how many of them are on one host.

    Args:
        attributes: of the collective.
        num_devices: of the program.
        devices_per_host: devices are numbered host by host; 0 for one network among all.

    Returns:
        (devices, the fewest of any group on any host that it has devices on). Both are the same
        where no group has devices of several hosts.

    Raises:
        ValueError: the groups are said in a way that is not known here.
    """
    groups = _groups(attributes, num_devices)
    hosts = groups // devices_per_host if devices_per_host else np.zeros_like(groups)
    fewest = min(int(np.unique(group, return_counts=True)[1].min()) for group in hosts)
    return groups.shape[1], fewest


def _groups(attributes: str, num_devices: int) -> np.ndarray:
    """[groups, devices of a group]."""
    if found := _PAIRS.search(attributes):
        return _listed(found.group(1) or "{0,0}")
    if found := _IOTA.search(attributes):
        shape, dims, order = (_numbers(found.group(i) or "") for i in (1, 2, 3))
        ids = np.arange(math.prod(dims)).reshape(dims)
        return ids.transpose(order or range(len(dims))).reshape(shape[0], -1)
    if found := _MESH.search(attributes):
        return _along_axes(found.group(1), found.group(2))
    if found := _LISTED.search(attributes):
        return _listed(found.group(1)) if found.group(1) else np.arange(num_devices)[None]
    raise ValueError(f"the devices of a collective cannot be read from {attributes[:300]!r}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _listed(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)])


def _along_axes(mesh: str, axes: str) -> np.ndarray:
    """Groups along some axes of a mesh, or along a part of an axis, ``'a':(before)size``."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    dims: list[int] = []
    moved: list[int] = []
    for name, size in sizes.items():
        parts = sorted((int(b), int(s)) for n, b, s in wanted if n == name and s)
        if any(n == name and not s for n, _, s in wanted):
            parts = [(1, size)]
        done = 1
        for before, part in parts:
            moved.append(len(dims) + 1)
            dims += [before // done, part]
            done = before * part
        dims.append(size // done)
    ids = np.arange(math.prod(sizes.values())).reshape(dims)
    rest = [axis for axis in range(len(dims)) if axis not in moved]
    return ids.transpose(rest + moved).reshape(-1, math.prod(dims[axis] for axis in moved))
