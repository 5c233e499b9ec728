"""Count the matrix products of a traced function.

XLA's own cost analysis counts the body of a scan once, however often it runs, so it cannot compare
programs whose layers are scanned. This count walks the traced program instead and multiplies.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs (two per multiply-add) of all matrix products.

    A scan counts its length times; of a ``cond`` the costliest branch counts; a ``while`` counts
    one pass. What no result depends on is left out, as the compiler does. Recomputation by remat is
    included; what XLA would later merge is not taken off.

    Args:
        function: to trace, never run.
        *arguments: arrays or ``jax.ShapeDtypeStruct``.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation: core.JaxprEqn) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation, parameters["dimension_numbers"])
    if name == "ragged_dot_general":
        return _ragged_dot_flops(equation, parameters["ragged_dot_dimension_numbers"])
    if name in ("grouped_matmul", "grouped_outer"):
        return _grouped_flops(equation)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in parameters["branches"])
    inner = sum(_count(jaxpr) for value in parameters.values() for jaxpr in _jaxprs(value))
    return inner * (parameters["length"] if name == "scan" else 1)


def _dot_flops(equation: core.JaxprEqn, dimension_numbers: Any) -> int:
    (contracted, _), _ = dimension_numbers
    left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _ragged_dot_flops(equation: core.JaxprEqn, dimension_numbers: Any) -> int:
    """Every row meets the matrix of its own group only, also where rows are summed over."""
    flops = _dot_flops(equation, dimension_numbers.dot_dimension_numbers)
    contracted = dimension_numbers.dot_dimension_numbers[0][0]
    if dimension_numbers.lhs_ragged_dimensions[0] in contracted:
        return flops // _shape(equation.invars[2])[-1]
    return flops


def _grouped_flops(equation: core.JaxprEqn) -> int:
    """One [in, out] matrix per row: ``models.grouped`` has rows [t, in] first, then [..., out]."""
    rows, other = _shape(equation.invars[0]), _shape(equation.invars[1])
    return 2 * math.prod(rows) * other[-1]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """Programs held by one parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return []
