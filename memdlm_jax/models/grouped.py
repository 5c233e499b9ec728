"""Products of tokens with the matrix of their own group, closed under differentiation and vmap.

A mixture of experts needs ``y[t] = x[t] @ w[index[t]]`` without the product with every expert.
``jax.lax.ragged_dot`` computes it, but its second derivative in the matrices is missing and it
cannot be vmapped over tokens with shared matrices; fast weights per example and exact
meta-gradients need both. The two primitives below are linear in each of their float operands, and
every derivative of one is one of the two again, as in this table (``ct`` is a cotangent)::

    product                       in its first operand             in its second operand
    grouped_matmul(x, w, index)   grouped_matmul(ct, w^T, index)   grouped_outer(x, ct, index)
    grouped_outer(x, y, index)    grouped_matmul(y, ct^T, index)   grouped_matmul(x, ct, index)

A batch axis becomes more rows (shared matrices) or more groups (a matrix for every example), so
any nesting of ``grad``, ``jvp`` and ``vmap`` ends at one sorted product.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from memdlm_jax.models.grouped_blocks import blocked_matmul, blocked_outer, wide_dtype

Implementation = Literal["ragged", "dense"]


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    index: jax.Array,
    *,
    is_sorted: bool = False,
    strays: bool = False,
    implementation: Implementation = "ragged",
) -> jax.Array:
    """Multiply every row by the matrix of its group: ``y[t] = x[t] @ w[index[t]]``.

    Sums run in float32 or wider at ``jax.default_matmul_precision``. Inside ``jax.shard_map`` the
    ragged implementation needs ``check_vma=False``.

    Args:
        x: [t, in] float; t = 0 is allowed.
        w: [e, in, out] float, one matrix per group; a group may have no row.
        index: [t] integer in [0, e), the group of every row. The result is undefined, and no error
            is raised, where it is out of range.
        is_sorted: ``index`` is already ascending (undefined result where it is not), so that no
            row need be moved.
        strays: an index of e or more is in range too: such a row belongs to no group, costs no
            product and comes out as zeros.
        implementation: ``ragged`` computes each row's own product; ``dense`` those with all
            groups, in plain ``jnp``, for checks and as a fallback.

    Returns:
        [t, out] in the promoted dtype of ``x`` and ``w``.

    Raises:
        ValueError: a rank, size, dtype or the implementation does not fit.
    """
    x, w, index = jnp.asarray(x), jnp.asarray(w), jnp.asarray(index)
    _check("x", x, rank=2)
    _check("w", w, rank=3)
    _check_index(index, x)
    if w.shape[0] < 1 or w.shape[1] != x.shape[1]:
        raise ValueError(f"w has shape {w.shape}; x {x.shape} needs [e >= 1, {x.shape[1]}, out]")
    dtype = jnp.promote_types(x.dtype, w.dtype)
    operands = x.astype(dtype), w.astype(dtype), index.astype(jnp.int32)
    if _is_dense(implementation):
        return _dense_matmul(*operands)
    return _matmul.bind(*operands, is_sorted=is_sorted, strays=strays, precision=_precision())


def grouped_outer(
    x: jax.Array,
    y: jax.Array,
    index: jax.Array,
    *,
    num_groups: int,
    is_sorted: bool = False,
    strays: bool = False,
    implementation: Implementation = "ragged",
) -> jax.Array:
    """Sum outer products over the rows of each group: ``sum_t [index[t] = e] x[t] y[t]^T``.

    Args:
        x: [t, in] float; t = 0 is allowed.
        y: [t, out] float.
        index: [t] integer in [0, num_groups), as for ``grouped_matmul``.
        num_groups: e >= 1; the sum of a group without rows is zero.
        is_sorted: as for ``grouped_matmul``.
        strays: as for ``grouped_matmul``; such a row adds to no sum.
        implementation: as for ``grouped_matmul``.

    Returns:
        [e, in, out] in the promoted dtype of ``x`` and ``y``, summed in float32 or wider.

    Raises:
        ValueError: a rank, size, dtype, ``num_groups`` or the implementation does not fit.
    """
    x, y, index = jnp.asarray(x), jnp.asarray(y), jnp.asarray(index)
    _check("x", x, rank=2)
    _check("y", y, rank=2)
    _check_index(index, x)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y has shape {y.shape}; x {x.shape} needs [{x.shape[0]}, out]")
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1")
    dtype = jnp.promote_types(x.dtype, y.dtype)
    operands = x.astype(dtype), y.astype(dtype), index.astype(jnp.int32)
    if _is_dense(implementation):
        return _dense_outer(*operands, num_groups)
    return _outer.bind(
        *operands, num_groups=num_groups, is_sorted=is_sorted, strays=strays, precision=_precision()
    )


def _check(name: str, value: jax.Array, rank: int) -> None:
    if value.ndim != rank or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {value.dtype} of shape {value.shape}; it must be float of rank {rank}"
        )


def _check_index(index: jax.Array, x: jax.Array) -> None:
    if index.shape != x.shape[:1] or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index is {index.dtype} of shape {index.shape}; x {x.shape} needs one integer per "
            f"row, [{x.shape[0]}]"
        )


def _is_dense(implementation: str) -> bool:
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation={implementation!r} must be one of {get_args(Implementation)}"
        )
    return implementation == "dense"


def _precision() -> str | None:
    """The precision set where the product is written; it may be lowered outside that context."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def _dense_matmul(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
    chosen = jax.nn.one_hot(index, w.shape[0], dtype=x.dtype)
    y = jnp.einsum("te,ti,eio->to", chosen, x, w, preferred_element_type=wide_dtype(x.dtype))
    return y.astype(x.dtype)


def _dense_outer(x: jax.Array, y: jax.Array, index: jax.Array, num_groups: int) -> jax.Array:
    chosen = jax.nn.one_hot(index, num_groups, dtype=x.dtype)
    w = jnp.einsum("te,ti,to->eio", chosen, x, y, preferred_element_type=wide_dtype(x.dtype))
    return w.astype(x.dtype)


# The primitives and their rules.

_matmul = Primitive("grouped_matmul")
_outer = Primitive("grouped_outer")


@functools.cache
def _compiled(primitive: Primitive, **parameters: Any) -> Callable:
    return jax.jit(functools.partial(primitive.bind, **parameters))


def _define(primitive: Primitive, abstract: Callable, jvps: Any, transpose: Any, batch: Any):
    primitive.def_impl(lambda *args, **parameters: _compiled(primitive, **parameters)(*args))
    primitive.def_abstract_eval(abstract)
    ad.defjvp(primitive, *jvps, None)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch


def _matmul_abstract(x: Any, w: Any, index: Any, **_: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray((x.shape[0], w.shape[2]), x.dtype)


def _outer_abstract(x: Any, y: Any, index: Any, *, num_groups: int, **_: Any):
    return jax.core.ShapedArray((num_groups, x.shape[1], y.shape[1]), x.dtype)


def _matmul_transpose(ct: Any, x: Any, w: Any, index: jax.Array, **parameters: Any):
    if type(ct) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(x):
        return _matmul.bind(ct, jnp.swapaxes(w, 1, 2), index, **parameters), None, None
    groups = w.aval.shape[0]
    return None, _outer.bind(x, ct, index, num_groups=groups, **parameters), None


def _outer_transpose(
    ct: Any, x: Any, y: Any, index: jax.Array, *, num_groups: int, **parameters: Any
):
    if type(ct) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(x):
        return _matmul.bind(y, jnp.swapaxes(ct, 1, 2), index, **parameters), None, None
    return None, _matmul.bind(x, ct, index, **parameters), None


def _leading(args: Any, axes: Any) -> tuple[list[jax.Array], int]:
    """The operands with the batch axis in front, those without one repeated; and its size."""
    size = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    ]
    return moved, size


def _merge(a: jax.Array) -> jax.Array:
    """[B, n, ...] -> [B * n, ...]."""
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def _own_groups(index: jax.Array, num_groups: int) -> jax.Array:
    """[B, t] -> [B * t]: each example has groups of its own, in ascending order."""
    size = index.shape[0]
    own = index + num_groups * jnp.arange(size, dtype=index.dtype)[:, None]
    return _merge(jnp.where(index < num_groups, own, size * num_groups))


def _matmul_batch(args: Any, axes: Any, *, is_sorted: bool, strays: bool, precision: str | None):
    parameters = {"strays": strays, "precision": precision}
    if axes[1] is None:
        (x, index), size = _leading(args[::2], axes[::2])
        y = _matmul.bind(_merge(x), args[1], _merge(index), is_sorted=False, **parameters)
    else:
        (x, w, index), size = _leading(args, axes)
        index = _own_groups(index, w.shape[1])
        # The strays of one example stand before the groups of the next.
        stays = is_sorted and not strays
        y = _matmul.bind(_merge(x), _merge(w), index, is_sorted=stays, **parameters)
    return y.reshape(size, x.shape[1], y.shape[1]), 0


def _outer_batch(
    args: Any, axes: Any, *, num_groups: int, is_sorted: bool, strays: bool, precision: str | None
):
    (x, y, index), size = _leading(args, axes)
    index = _own_groups(index, num_groups)
    w = _outer.bind(
        _merge(x), _merge(y), index, num_groups=size * num_groups,
        is_sorted=is_sorted and not strays, strays=strays, precision=precision,
    )  # fmt: skip
    return w.reshape(size, num_groups, *w.shape[1:]), 0


_define(
    _matmul,
    _matmul_abstract,
    (
        lambda dx, x, w, index, **parameters: _matmul.bind(dx, w, index, **parameters),
        lambda dw, x, w, index, **parameters: _matmul.bind(x, dw, index, **parameters),
    ),
    _matmul_transpose,
    _matmul_batch,
)
_define(
    _outer,
    _outer_abstract,
    (
        lambda dx, x, y, index, **parameters: _outer.bind(dx, y, index, **parameters),
        lambda dy, x, y, index, **parameters: _outer.bind(x, dy, index, **parameters),
    ),
    _outer_transpose,
    _outer_batch,
)


# What the primitives are lowered to: a product of sorted rows, chosen by platform.


def _sizes(index: jax.Array, num_groups: int) -> jax.Array:
    return jnp.bincount(index, length=num_groups).astype(jnp.int32)


def _lower_matmul(
    product: Callable, x, w, index, *, is_sorted: bool, precision: str | None, strays: bool = False
):
    """``product(x, w, sizes) -> [t, out]`` of sorted rows, made a product of rows in any order."""
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    sizes = _sizes(index, w.shape[0])
    order = None if is_sorted else jnp.argsort(index, stable=True)
    with jax.default_matmul_precision(precision):
        y = product(x if order is None else x[order], w, sizes)
    if strays:  # They stand last; what a product leaves there differs between platforms.
        y = jnp.where((jnp.arange(y.shape[0]) < jnp.sum(sizes))[:, None], y, 0)
    return y if order is None else y[jnp.argsort(order)]


def _lower_outer(
    product: Callable, x, y, index, *, num_groups: int, is_sorted: bool, precision: str | None,
    strays: bool = False,
):  # fmt: skip
    """``product(x, y, sizes) -> [e, in, out]`` of sorted rows, for rows in any order."""
    del strays  # Behind all groups, where no product looks.
    if x.shape[0] == 0:
        return jnp.zeros((num_groups, x.shape[1], y.shape[1]), x.dtype)
    if not is_sorted:
        order = jnp.argsort(index, stable=True)
        x, y = x[order], y[order]
    with jax.default_matmul_precision(precision):
        return product(x, y, _sizes(index, num_groups))


def _ragged_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, w, sizes, preferred_element_type=wide_dtype(x.dtype)).astype(x.dtype)


_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _ragged_outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    wide = wide_dtype(x.dtype)
    w = lax.ragged_dot_general(x, y, sizes, _OUTER, preferred_element_type=wide)
    return w.astype(x.dtype)


def _tiled_outer(x: jax.Array, y: jax.Array, sizes: jax.Array, interpret: bool = False):
    """The same by JAX's Mosaic kernel: XLA's TPU compiler makes this ragged product dense.

    It sums in float32, tiles rows in 128s, and leaves those alone that belong to no group.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    short = -x.shape[0] % 128
    x, y = (jnp.pad(a, ((0, short), (0, 0))) for a in (x, y))
    tiles = (128, min(512, x.shape[1]), min(512, y.shape[1]))
    return tgmm(x.T, y, sizes, x.dtype, tiles, interpret=interpret)


def _register(primitive: Primitive, lower: Callable, ragged: Callable, blocked: Callable) -> None:
    for product, platform in ((ragged, None), (blocked, "cpu")):
        lowering = mlir.lower_fun(functools.partial(lower, product), multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform=platform)


_register(_matmul, _lower_matmul, _ragged_matmul, blocked_matmul)
_register(_outer, _lower_outer, _ragged_outer, blocked_outer)
mlir.register_lowering(
    _outer,
    mlir.lower_fun(functools.partial(_lower_outer, _tiled_outer), multiple_results=False),
    platform="tpu",
)
