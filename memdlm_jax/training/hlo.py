"""What a compiled program does on one device, read from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once, however often it runs; here a loop counts
its trips. Nothing is run, and the program may be one for devices that are not there.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from memdlm_jax.training import hlo_products
from memdlm_jax.training.hlo_groups import groups_of
from memdlm_jax.training.hlo_loops import trips_of

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")

FREE = frozenset({
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "domain",
    "add-dependency",
})  # fmt: skip
"""Operations that move nothing, or whose insides are counted."""


@dataclasses.dataclass(frozen=True)
class Array:
    """A result of an operation: dtype, dimensions, and whether it lies in the main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def bytes(self) -> float:
        """Size; a dtype's bits stand in its name."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) or int(digits.group() if digits else 0)
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, key: str = "calls") -> str | None:
        """Name of the computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    @property
    def bytes(self) -> float:
        """Bytes of the results that lie in the main memory."""
        return sum(array.bytes for array in self.results if array.in_main_memory)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each operation by name, in the order of execution."""

    computations: dict[str, dict[str, Operation]]
    entry: str


def parse(text: str) -> Program:
    """Read the text of ``compiled.as_text()``.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Operation]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and (found := _LINE.match(line)):
            operation = _operation(found, line[found.end() :])
            here[operation.name] = operation
    if not entry:
        raise ValueError("the text is no HLO program: it has no ENTRY computation")
    return Program(computations, entry)


def _operation(found: re.Match, rest: str) -> Operation:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    results, call = rest[:end], rest[end:].lstrip()
    opens = call.index("(")
    closes = _closing(call, opens)
    inside = call[opens + 1 : closes]
    operands = tuple(_OPERAND.findall(inside)) or (inside,)
    return Operation(
        found.group(2), call[:opens], tuple(_arrays(results)), operands, call[closes + 1 :],
        bool(found.group(1)),
    )  # fmt: skip


def _closing(text: str, at: int) -> int:
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]!r}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        yield Array(dtype, sizes, re.search(r"S\([1-9]\d*\)", layout) is None)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind among groups of one size.

    Attributes:
        kind: ``all-gather``, ``all-reduce``, ``reduce-scatter``, ``all-to-all``,
            ``collective-permute`` and so on.
        devices: of a group.
        on_host: devices of a group on one host, the fewest anywhere; all if it has one host.
        times: how often one runs in a step.
        sent: bytes that a device sends in a step, by the ring algorithm.
    """

    kind: str
    devices: int
    on_host: int
    times: int
    sent: float

    @property
    def between_hosts(self) -> float:
        """Bytes of ``sent`` that go to another host.

        A group makes as many rings as it has devices on a host, each of which leaves the host from
        another device: that device's neighbour in this ring alone is far away. Where every device
        sends to every other one, the share is that of the far ones.
        """
        if self.on_host == self.devices:
            return 0.0
        if "all-to-all" in self.kind:
            return self.sent * (self.devices - self.on_host) / (self.devices - 1)
        return self.sent / self.on_host


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in one run of a program.

    Attributes:
        flops: of matrix products, two per multiply-add.
        bytes: read from and written to the main memory; an estimate: what every operation takes
            and gives, of a slice the slice.
        collectives: between devices.
        unknown_loops: loops whose trips the program does not tell; they count once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(collective.sent for collective in self.collectives)

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.flops + other.flops, self.bytes + other.bytes,
            _summed(self.collectives + other.collectives),
            self.unknown_loops + other.unknown_loops,
        )  # fmt: skip

    def times(self, count: int) -> "Costs":
        """The same, so often."""
        many = tuple(
            dataclasses.replace(c, times=c.times * count, sent=c.sent * count)
            for c in self.collectives
        )
        return Costs(self.flops * count, self.bytes * count, many, self.unknown_loops)


def _summed(collectives: tuple[Collective, ...]) -> tuple[Collective, ...]:
    total: dict[tuple, Collective] = {}
    for one in collectives:
        key = one.kind, one.devices, one.on_host
        old = total.get(key, Collective(*key, 0, 0.0))
        total[key] = dataclasses.replace(old, times=old.times + one.times, sent=old.sent + one.sent)
    return tuple(sorted(total.values(), key=lambda c: -c.sent))


def costs(
    text: str, num_devices: int, devices_per_host: int = 0, ragged_share: float = 1.0
) -> Costs:
    """Count what one device does.

    Args:
        text: of a compiled program, ``compiled.as_text()``.
        num_devices: that it runs on.
        devices_per_host: where hosts are joined by another network than the devices of one; 0
            where all devices are joined alike.
        ragged_share: share of the rows of a ragged product that belong to a group of this device.
    """
    counter = _Counter(parse(text), num_devices, devices_per_host, ragged_share)
    return counter.of(counter.program.entry)


class _Counter:
    def __init__(self, program: Program, num_devices: int, per_host: int, ragged_share: float):
        self.program, self.num_devices, self.per_host = program, num_devices, per_host
        self.ragged_share = ragged_share
        self._known: dict[tuple[str, bool], Costs] = {}

    def of(self, name: str, fused: bool = False) -> Costs:
        """Costs of a computation; inside a fusion nothing goes through the main memory."""
        if (name, fused) not in self._known:
            body = self.program.computations[name]
            parts = [self._operation(name, body, one, fused) for one in body.values()]
            self._known[name, fused] = functools.reduce(Costs.__add__, parts, Costs())
        return self._known[name, fused]

    def _operation(self, name: str, body: dict[str, Operation], one: Operation, fused: bool):
        if one.opcode == "while":
            trips = trips_of(self.program, one)
            inside = self.of(one.called("body") or "", fused).times(trips or 1)
            return inside + Costs(unknown_loops=int(trips is None))
        if one.opcode == "conditional":
            return max((self.of(b, fused) for b in _branches(one)), key=lambda c: (c.flops, c.sent))
        total = Costs(flops=_flops(one, body, self.ragged_share))
        total += self._collective(name, one)
        if one.opcode == "call":
            return total + self.of(one.called("to_apply") or "", fused)
        if (called := one.called()) is not None:
            total += self.of(called, fused=True)
        if not fused and one.opcode not in FREE and not one.opcode.endswith("-done"):
            total += Costs(bytes=_moved(self.program, body, one))
        return total

    def _collective(self, computation: str, one: Operation) -> Costs:
        kind = one.opcode.removesuffix("-start")
        if kind not in _SENT or _goes_on(one):
            return Costs()
        arrays = one.results
        if one.opcode.endswith("-start") and kind != "all-reduce":  # What goes, then what comes.
            arrays = tuple(a for a in arrays if a.dims)
            arrays = arrays[len(arrays) // 2 :]
        # TPUs write a reduce-scatter as a fused all-reduce and slice.
        scattered = kind == "all-reduce" and "all-reduce-scatter" in computation
        devices, on_host = groups_of(one.attributes, self.num_devices, self.per_host)
        size = sum(array.bytes for array in arrays)
        if scattered:
            kind, size = "reduce-scatter", size / devices
        sent = _SENT[kind](size, devices)
        return Costs(collectives=(Collective(kind, devices, on_host, 1, sent),) if sent else ())


_SENT = {
    "all-gather": lambda result, n: result * (n - 1) / n,
    "all-reduce": lambda result, n: 2 * result * (n - 1) / n,
    "reduce-scatter": lambda result, n: result * (n - 1),
    "all-to-all": lambda result, n: result * (n - 1) / n,
    "ragged-all-to-all": lambda result, n: result * (n - 1) / n,
    "collective-permute": lambda result, n: result,
    "collective-broadcast": lambda result, n: result,
}
"""Bytes that a device sends for a result of so many bytes, in a group of n."""


def _goes_on(one: Operation) -> bool:
    """Whether this stands for the middle or end of a collective that was counted at its start."""
    flag = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', one.attributes)
    return flag is not None and flag.group(1) != "-1"


def _branches(one: Operation) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", one.attributes):
        return re.findall(r"%?([\w.\-]+)", found.group(1))
    return [one.called("true_computation") or "", one.called("false_computation") or ""]


def _flops(one: Operation, body: dict[str, Operation], ragged_share: float) -> float:
    shapes = [body[name].results[0].dims for name in one.operands if name in body]
    return hlo_products.flops(one.opcode, one.results, shapes, one.attributes, ragged_share)


def _moved(program: Program, body: dict[str, Operation], one: Operation) -> float:
    """Bytes that an operation outside of fusions reads and writes."""
    if one.opcode == "custom-call" and not _computes(one):
        return 0.0
    if one.opcode in ("copy-start", "slice-start"):  # What goes and where; of a slice the slice.
        ends = [array for array in one.results if array.dims][:2]
        return min(a.bytes for a in ends) * sum(a.in_main_memory for a in ends) if ends else 0.0
    if one.opcode.endswith("-start"):
        return one.bytes
    called = one.called()
    if called is None:
        return _written(body, one) + sum(_read(body, one, i) for i in range(len(one.operands)))
    inside = program.computations[called]
    total = 0.0
    for number, operand in enumerate(one.operands):
        if operand in body and all(a.in_main_memory for a in body[operand].results):
            total += _read_inside(program, inside, number)
    root = next(other for other in inside.values() if other.is_root)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, array in zip(parts, one.results, strict=False):
        if array.in_main_memory:
            total += min(array.bytes, _written(inside, part))
    return total


def _computes(one: Operation) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    return target is not None and ("tpu_custom" in target.group(1) or "__" in target.group(1))


def _written(body: dict[str, Operation], one: Operation) -> float:
    if one.opcode == "dynamic-update-slice" and one.operands[1] in body:
        return sum(array.bytes for array in body[one.operands[1]].results)
    return one.bytes if one.opcode != "parameter" else 0.0


def _read(body: dict[str, Operation], one: Operation, number: int) -> float:
    """Bytes that an operation reads of one operand."""
    operand = body.get(one.operands[number])
    if operand is None:
        return 0.0
    if number == 0 and one.opcode in ("dynamic-slice", "slice", "gather"):
        return min(operand.bytes, sum(array.bytes for array in one.results))
    if number == 0 and one.opcode in ("dynamic-update-slice", "scatter"):
        return 0.0
    return operand.bytes


def _read_inside(program: Program, inside: dict[str, Operation], number: int) -> float:
    """Bytes that a fusion reads of its operand ``number``: of what is only sliced, the slices."""
    own = [o for o in inside.values() if o.opcode == "parameter" and o.operands[0] == str(number)]
    if not own:
        return 0.0
    parameter, total = own[0], 0.0
    size = sum(array.bytes for array in parameter.results)
    for user in inside.values():
        for position, name in enumerate(user.operands):
            if name != parameter.name:
                continue
            called = user.called()
            if called in program.computations:
                total += _read_inside(program, program.computations[called], position)
            elif position == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(array.bytes for array in user.results)
            elif not (position == 0 and user.opcode == "dynamic-update-slice"):
                total += size
    return min(total, size)
