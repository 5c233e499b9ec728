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

Implementation = Literal["ragged", "dense"]


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    index: jax.Array,
    *,
    is_sorted: bool = False,
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
    return _matmul.bind(*operands, is_sorted=is_sorted, precision=_precision())


def grouped_outer(
    x: jax.Array,
    y: jax.Array,
    index: jax.Array,
    *,
    num_groups: int,
    is_sorted: bool = False,
    implementation: Implementation = "ragged",
) -> jax.Array:
    """Sum outer products over the rows of each group: ``sum_t [index[t] = e] x[t] y[t]^T``.

    Args:
        x: [t, in] float; t = 0 is allowed.
        y: [t, out] float.
        index: [t] integer in [0, num_groups), as for ``grouped_matmul``.
        num_groups: e >= 1; the sum of a group without rows is zero.
        is_sorted: as for ``grouped_matmul``.
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
        *operands, num_groups=num_groups, is_sorted=is_sorted, precision=_precision()
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


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _dense_matmul(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
    chosen = jax.nn.one_hot(index, w.shape[0], dtype=x.dtype)
    y = jnp.einsum("te,ti,eio->to", chosen, x, w, preferred_element_type=_wide(x.dtype))
    return y.astype(x.dtype)


def _dense_outer(x: jax.Array, y: jax.Array, index: jax.Array, num_groups: int) -> jax.Array:
    chosen = jax.nn.one_hot(index, num_groups, dtype=x.dtype)
    w = jnp.einsum("te,ti,to->eio", chosen, x, y, preferred_element_type=_wide(x.dtype))
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
    return _merge(index + num_groups * jnp.arange(index.shape[0], dtype=index.dtype)[:, None])


def _matmul_batch(args: Any, axes: Any, *, is_sorted: bool, **parameters: Any):
    if axes[1] is None:
        (x, index), size = _leading(args[::2], axes[::2])
        y = _matmul.bind(_merge(x), args[1], _merge(index), is_sorted=False, **parameters)
    else:
        (x, w, index), size = _leading(args, axes)
        index = _own_groups(index, w.shape[1])
        y = _matmul.bind(_merge(x), _merge(w), index, is_sorted=is_sorted, **parameters)
    return y.reshape(size, x.shape[1], y.shape[1]), 0


def _outer_batch(args: Any, axes: Any, *, num_groups: int, **parameters: Any):
    (x, y, index), size = _leading(args, axes)
    index = _own_groups(index, num_groups)
    w = _outer.bind(_merge(x), _merge(y), index, num_groups=size * num_groups, **parameters)
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


def _lower_matmul(product: Callable, x, w, index, *, is_sorted: bool, precision: str | None):
    """``product(x, w, sizes) -> [t, out]`` of sorted rows, made a product of rows in any order."""
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    sizes = _sizes(index, w.shape[0])
    with jax.default_matmul_precision(precision):
        if is_sorted:
            return product(x, w, sizes)
        order = jnp.argsort(index, stable=True)
        return product(x[order], w, sizes)[jnp.argsort(order)]


def _lower_outer(
    product: Callable, x, y, index, *, num_groups: int, is_sorted: bool, precision: str | None
):
    """``product(x, y, sizes) -> [e, in, out]`` of sorted rows, for rows in any order."""
    if x.shape[0] == 0:
        return jnp.zeros((num_groups, x.shape[1], y.shape[1]), x.dtype)
    if not is_sorted:
        order = jnp.argsort(index, stable=True)
        x, y = x[order], y[order]
    with jax.default_matmul_precision(precision):
        return product(x, y, _sizes(index, num_groups))


def _ragged_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, w, sizes, preferred_element_type=_wide(x.dtype)).astype(x.dtype)


_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _ragged_outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    wide = _wide(x.dtype)
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


# XLA has no ragged product on the CPU: it computes every row with every group, from copies of
# all rows for each. A loop over blocks of rows with one group each takes its place there.

BLOCK = 16  # rows; near the fastest (measured: 8 to 256) from 1 to 512 rows per group


def _blocks(num_rows: int, sizes: jax.Array) -> tuple[jax.Array, Callable]:
    """Divide sorted rows into blocks that start within one group.

    Returns:
        the number of blocks, and block number -> (group, first row, rows left of the group); a
        block overruns its group where less than a block is left.
    """
    groups = sizes.shape[0]
    counts = -(-sizes // BLOCK)
    first, start = jnp.cumsum(counts) - counts, jnp.cumsum(sizes) - sizes
    most = num_rows // BLOCK + min(groups, num_rows)
    group_of = jnp.repeat(jnp.arange(groups), counts, total_repeat_length=most)

    def block(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = group_of[number]
        skip = (number - first[group]) * BLOCK
        return group, start[group] + skip, sizes[group] - skip

    return jnp.sum(counts), block


def _blocked_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Blocks ascend, so the rows that one computes past its group are overwritten by the next."""
    num_blocks, block = _blocks(x.shape[0], sizes)
    padded = jnp.pad(x, ((0, BLOCK), (0, 0)))

    def step(number: jax.Array, y: jax.Array) -> jax.Array:
        group, start, _ = block(number)
        taken = lax.dynamic_slice_in_dim(padded, start, BLOCK)
        part = jnp.matmul(taken, w[group], preferred_element_type=_wide(x.dtype))
        return lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), start, 0)

    y = jnp.zeros((padded.shape[0], w.shape[2]), x.dtype)
    return lax.fori_loop(0, num_blocks, step, y)[: x.shape[0]]


def _blocked_outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows past the group are set to zero on both sides, as they may hold infinities."""
    wide = _wide(x.dtype)
    num_blocks, block = _blocks(x.shape[0], sizes)
    x_padded, y_padded = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (x, y))

    def step(number: jax.Array, w: jax.Array) -> jax.Array:
        group, start, left = block(number)
        keep = (jnp.arange(BLOCK) < left)[:, None]
        x_part, y_part = (
            jnp.where(keep, lax.dynamic_slice_in_dim(a, start, BLOCK), 0)
            for a in (x_padded, y_padded)
        )
        part = jnp.matmul(x_part.T, y_part, preferred_element_type=wide)
        return w.at[group].add(part)

    w = jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), wide)
    return lax.fori_loop(0, num_blocks, step, w).astype(x.dtype)


def _register(primitive: Primitive, lower: Callable, ragged: Callable, blocked: Callable) -> None:
    for product, platform in ((ragged, None), (blocked, "cpu")):
        lowering = mlir.lower_fun(functools.partial(lower, product), multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform=platform)


_register(_matmul, _lower_matmul, _ragged_matmul, _blocked_matmul)
_register(_outer, _lower_outer, _ragged_outer, _blocked_outer)
mlir.register_lowering(
    _outer,
    mlir.lower_fun(functools.partial(_lower_outer, _tiled_outer), multiple_results=False),
    platform="tpu",
)
