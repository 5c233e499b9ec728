"""FLOPs of a matrix product in optimised HLO, whatever the compiler has made of it."""

import math
import re
from collections.abc import Sequence
from typing import Any

Dims = tuple[int, ...]


def flops(
    opcode: str, results: Sequence[Any], operands: Sequence[Dims], attributes: str,
    ragged_share: float = 1.0,
) -> float:  # fmt: skip
    """FLOPs of one operation, two per multiply-add; 0 for what is no product.

    Args:
        opcode: of the operation.
        results: arrays with ``dims``.
        operands: shapes.
        attributes: the rest of its line.
        ragged_share: share of the rows of a ragged product that is computed.
    """
    if opcode == "dot":
        return _dot(results[0].dims, operands[0], _dims(attributes, "lhs_contracting_dims"))
    if opcode == "convolution":
        return _convolution(results[0].dims, operands[0], operands[1], attributes)
    if opcode == "ragged-dot":
        contracted = _dims(attributes, "lhs_contracting_dims")
        return _dot(results[0].dims, operands[0], contracted) * ragged_share
    if opcode != "custom-call":
        return 0.0
    if "__cublas" in attributes:
        inner = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes)
        contracted = [int(n) for n in re.findall(r"\d+", inner.group(1))] if inner else []
        return _dot(results[0].dims, operands[0], contracted)
    if "tpu_custom_call" in attributes:
        return _kernel(results[0].dims, operands) * ragged_share
    return 0.0


def _dims(attributes: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def _dot(out: Dims, left: Dims, contracted: Sequence[int]) -> float:
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _kernel(out: Dims, operands: Sequence[Dims]) -> float:
    """Ragged products of TPUs: rows [t, in] with [e, in, out], or [in, t] with [t, out]."""
    matrices = [dims for dims in operands if len(dims) >= 2]
    if len(matrices) != 2:
        return 0.0
    left, right = matrices
    if len(out) == 2 and len(right) == 3:
        return 2.0 * math.prod(out) * left[1]
    if len(out) == 3 and len(left) == len(right) == 2:
        # One matrix per group, but every row is in one group.
        return 2.0 * out[1] * out[2] * right[0]
    return 0.0


def _convolution(out: Dims, left: Dims, right: Dims, attributes: str) -> float:
    """TPUs write products as convolutions; padding and dilation give no product."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        return 0.0
    lhs, rhs, result = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    rank = sum(label.isdigit() for label in lhs)
    total = 2.0 * right[rhs.index("i")] * right[rhs.index("o")] * left[lhs.index("b")]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    for axis in range(rank):
        total *= _positions(
            left[lhs.index(str(axis))], right[rhs.index(str(axis))], out[result.index(str(axis))],
            _field(fields, "stride", axis), _field(fields, "lhs_dilate", axis),
            _field(fields, "rhs_dilate", axis), _field(fields, "pad", axis, 0),
        )  # fmt: skip
    return total / (int(groups.group(1)) if groups else 1)


def _field(fields: dict[str, str], name: str, axis: int, default: int = 1) -> int:
    if name not in fields:
        return default
    return int(fields[name].split("x")[axis].split("_")[0])


def _positions(
    size: int, kernel: int, out: int, stride: int, dilate: int, kernel_dilate: int, pad: int
) -> int:
    """Pairs of an output and a kernel position that meet an entry of the input, along one axis."""
    count = 0
    for k in range(kernel):
        for o in range(out):
            at = o * stride + k * kernel_dilate - pad
            count += 0 <= at <= (size - 1) * dilate and at % dilate == 0
    return count
