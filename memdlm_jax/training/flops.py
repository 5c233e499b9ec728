"""Count the matrix products of a traced function.

XLA's own cost analysis counts the body of a scan once, however often it runs, so it cannot compare
programs whose layers are scanned. This count walks the traced program instead and multiplies.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs (two per multiply-add) of all matrix products and convolution-free einsums.

    A scan counts its length times; of a ``cond`` the costliest branch counts; a ``while`` counts
    one pass. Recomputation by remat is included; what XLA would later merge is not taken off.

    Args:
        function: to trace, never run.
        *arguments: arrays or ``jax.ShapeDtypeStruct``.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation: core.JaxprEqn) -> int:
    if equation.primitive.name == "dot_general":
        return _dot_flops(equation)
    if equation.primitive.name == "cond":
        return max(_count(branch.jaxpr) for branch in equation.params["branches"])
    inner = sum(_count(jaxpr) for value in equation.params.values() for jaxpr in _jaxprs(value))
    return inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)


def _dot_flops(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """Programs held by one parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return []
