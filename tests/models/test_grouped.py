"""Grouped products against plain loops, against all groups computed, and against differences."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.models import grouped
from memdlm_jax.models.grouped import grouped_matmul, grouped_outer
from memdlm_jax.models.grouped_blocks import BLOCK

ROWS, GROUPS, IN, OUT, BATCH = 40, 5, 6, 4, 3
EMPTY = 1
"""The group that never has a row; group 0 has more than one block of them."""
CHANCES = (0.6, 0.0, 0.1, 0.2, 0.1)
X64 = pytest.mark.usefixtures("float64")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def draw_index(seed, *shape):
    return np.random.default_rng(seed).choice(GROUPS, size=shape, p=CHANCES).astype(np.int32)


X, W, Y = normal(0, ROWS, IN), normal(1, GROUPS, IN, OUT), normal(2, ROWS, OUT)
INDEX = draw_index(3, ROWS)
assert (INDEX == 0).sum() > BLOCK and not (INDEX == EMPTY).any()
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def matmul_loop(x, w, index):
    y = np.zeros((len(x), w.shape[2]))
    for t, group in enumerate(index):
        y[t] = x[t] @ w[group]
    return y


def outer_loop(x, y, index, num_groups=GROUPS):
    w = np.zeros((num_groups, x.shape[1], y.shape[1]))
    for t, group in enumerate(index):
        w[group] += np.outer(x[t], y[t])
    return w


def outer(x, y, index, **options):
    return grouped_outer(x, y, index, num_groups=GROUPS, **options)


PRODUCTS = {
    "matmul": (grouped_matmul, matmul_loop, (X, W)),
    "outer": (outer, outer_loop, (X, Y)),
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


def ragged_lowering(name):
    """The product that other platforms than the CPU are given."""
    if name == "matmul":
        return functools.partial(grouped._lower_matmul, grouped._ragged_matmul, precision=None)
    return functools.partial(
        grouped._lower_outer, grouped._ragged_outer, num_groups=GROUPS, precision=None
    )


@X64
@each_product
@pytest.mark.parametrize("is_sorted", [False, True])
def test_equals_a_plain_loop(name, is_sorted):
    product, loop, operands = PRODUCTS[name]
    index = np.sort(INDEX) if is_sorted else INDEX
    expected = loop(*operands, index)
    run = functools.partial(product, is_sorted=is_sorted)
    for found in (run(*operands, index), jax.jit(run)(*operands, index)):
        assert found.dtype == jnp.float64
        close(found, expected)
    close(run(*operands, index, implementation="dense"), expected)
    lowered = jax.jit(functools.partial(ragged_lowering(name), is_sorted=is_sorted))
    close(lowered(*map(jnp.asarray, operands), index), expected)


@X64
@pytest.mark.parametrize("num_rows", [0, 1, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("group", [0, GROUPS - 1])
def test_any_number_of_rows_in_one_group(num_rows, group):
    x, y, index = X[:num_rows], Y[:num_rows], np.full(num_rows, group)
    close(grouped_matmul(x, W, index), matmul_loop(x, W, index))
    close(outer(x, y, index), outer_loop(x, y, index))
    rows = jax.vmap(grouped_matmul, (0, None, 0))(x[None], W, index[None])
    close(rows[0], matmul_loop(x, W, index))


@X64
@each_product
@pytest.mark.parametrize("is_sorted", [False, True])
def test_strays_cost_nothing_and_count_nowhere(name, is_sorted):
    """Rows of no group, also where each example has groups of its own, and in derivatives."""
    product, loop, operands = PRODUCTS[name]
    index = np.stack([np.where(group == INDEX, GROUPS + group, INDEX) for group in (0, 2, 4)])
    index = np.sort(index, axis=-1) if is_sorted else index
    here = index < GROUPS

    def expected(i):
        if name == "outer":
            return loop(*(x[here[i]] for x in operands), index[i][here[i]])
        y = np.zeros((ROWS, OUT))
        y[here[i]] = loop(X[here[i]], W, index[i][here[i]])
        return y

    run = functools.partial(product, is_sorted=is_sorted, strays=True)
    lowered = functools.partial(ragged_lowering(name), is_sorted=is_sorted, strays=True)
    several = [np.stack([x] * 3) for x in operands]
    for i in range(3):
        close(run(*operands, index[i]), expected(i))
        close(jax.jit(lowered)(*map(jnp.asarray, operands), index[i]), expected(i))
        close(run(*operands, index[i], implementation="dense"), expected(i))
    close(jax.vmap(run)(*several, index), np.stack([expected(i) for i in range(3)]))
    shared = jax.vmap(run, (0, None, 0))(several[0], operands[1], index)
    close(shared, np.stack([expected(i) for i in range(3)]))

    def loss(implementation, *operands):
        one = functools.partial(run, implementation=implementation)
        return jnp.sum(jnp.sin(jax.vmap(one)(*operands, index)))

    ours, dense = (
        jax.grad(functools.partial(loss, i), (0, 1))(*several) for i in ("ragged", "dense")
    )
    jax.tree.map(close, ours, dense)


@X64
def test_more_groups_than_rows():
    w, index = normal(4, 99, IN, OUT), np.arange(98, -1, -3)[:7]
    close(grouped_matmul(X[:7], w, index), matmul_loop(X[:7], w, index))
    found = grouped_outer(X[:7], Y[:7], index, num_groups=99)
    close(found, outer_loop(X[:7], Y[:7], index, 99))


@X64
def test_an_infinite_row_stays_in_its_group():
    x = X.copy()
    x[np.flatnonzero(INDEX == 2)[0]] = np.inf
    others = [group for group in range(GROUPS) if group != 2]
    close(grouped_matmul(x, W, INDEX)[INDEX != 2], matmul_loop(X, W, INDEX)[INDEX != 2])
    close(outer(x, Y, INDEX)[others,], outer_loop(X, Y, INDEX)[others,])


@each_product
def test_float32_is_accurate_at_highest_precision(name):
    product, loop, operands = PRODUCTS[name]
    narrow = [np.float32(operand) for operand in operands]
    found, expected = product(*narrow, INDEX), loop(*narrow, INDEX)
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@each_product
def test_bfloat16_is_rounded_once(name):
    product, loop, operands = PRODUCTS[name]
    narrow = [jnp.asarray(operand, jnp.bfloat16) for operand in operands]
    found = product(*narrow, INDEX)
    assert found.dtype == jnp.bfloat16
    expected = loop(*(np.float64(operand) for operand in narrow), INDEX)
    np.testing.assert_allclose(np.float64(found), expected, rtol=2**-8, atol=1e-6)


def test_mixed_dtypes_are_promoted_and_gradients_keep_theirs():
    x, w = jnp.asarray(X, jnp.bfloat16), jnp.float32(W)
    assert grouped_matmul(x, w, INDEX).dtype == jnp.float32
    dx, dw = jax.grad(lambda x, w: grouped_matmul(x, w, INDEX).sum(), (0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


@each_product
def test_the_precision_set_where_it_is_written_is_kept(name):
    product, _, operands = PRODUCTS[name]

    def gradient(x, other):
        with jax.default_matmul_precision("float32"):
            return jax.vjp(lambda *args: product(*args, INDEX), x, other)[1](
                jnp.ones(jax.eval_shape(product, x, other, INDEX).shape)
            )

    with jax.default_matmul_precision("bfloat16"):
        program = jax.export.export(jax.jit(gradient), platforms=["tpu"])(
            *map(np.float32, operands)
        )
    text = program.mlir_module()
    # The gradient of the matrices is a kernel, whose own products do not show in this text.
    count = {"matmul": 1, "outer": 2}[name]
    assert text.count('precision_config = ["HIGHEST", "HIGHEST"]') == count
    assert '"DEFAULT"' not in text


def network(params, index, implementation):
    """Two layers of experts with a nonlinearity, and the product of rows; [t, out] -> scalar."""
    run = functools.partial(grouped_matmul, index=index, implementation=implementation)
    hidden = jnp.tanh(run(params["x"], params["w"]))
    summed = outer(params["x"], hidden, index, implementation=implementation)
    back = run(hidden, jnp.swapaxes(jnp.tanh(summed / ROWS), 1, 2))
    return jnp.sum(back**2 * params["x"])


PARAMS = {"x": X, "w": W}
TANGENT = {"x": normal(7, *X.shape), "w": normal(8, *W.shape)}


def close_trees(found, expected, **tolerance):
    jax.tree.map(functools.partial(close, **tolerance), found, expected)


def grad(params, index, implementation):
    return jax.grad(network)(params, index, implementation)


def jvp_of_grad(params, index, implementation):
    return jax.jvp(lambda p: grad(p, index, implementation), (params,), (TANGENT,))[1]


def squared_gradient(params, index, implementation):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grad(params, index, implementation)))


def grad_of_grad(params, index, implementation):
    return jax.grad(squared_gradient)(params, index, implementation)


@functools.cache
def compiled(derivative, implementation):
    return jax.jit(functools.partial(derivative, implementation=implementation))


@X64
@pytest.mark.parametrize("derivative", [grad, jvp_of_grad, grad_of_grad])
def test_derivatives_equal_those_of_the_dense_product(derivative):
    found, expected = (compiled(derivative, i)(PARAMS, INDEX) for i in ("ragged", "dense"))
    assert all(np.abs(leaf).max() > 1 for leaf in jax.tree.leaves(expected))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    close_trees(found, expected, atol=1e-12 * scale)


@X64
def test_derivatives_equal_central_differences():
    def moved(step):
        return jax.tree.map(lambda p, d: p + step * d, PARAMS, TANGENT)

    def central(derivative):
        up, down = (compiled(derivative, "ragged")(moved(s), INDEX) for s in (1e-5, -1e-5))
        return jax.tree.map(lambda a, b: (a - b) / 2e-5, up, down)

    gradient = compiled(grad, "ragged")(PARAMS, INDEX)
    slope = sum(jnp.vdot(gradient[name], TANGENT[name]) for name in PARAMS)
    np.testing.assert_allclose(slope, central(network), rtol=1e-6)
    curvature = compiled(jvp_of_grad, "ragged")(PARAMS, INDEX)
    close_trees(curvature, central(grad), rtol=1e-6, atol=1e-5)


BATCHED = {"x": normal(10, BATCH, ROWS, IN), "w": normal(11, BATCH, GROUPS, IN, OUT)}
BATCHED_INDEX = draw_index(12, BATCH, ROWS)


@X64
@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, 0), (0, 0, None), (None, 0, None),
                                  (0, None, None), (None, None, 0), (None, 0, 0)])  # fmt: skip
def test_vmap_equals_a_loop_over_examples(axes):
    """Both products, every choice of what is shared, unsorted and sorted."""
    shared = {"x": X, "w": W, "y": Y, "index": INDEX}
    batched = BATCHED | {"y": normal(13, BATCH, ROWS, OUT), "index": BATCHED_INDEX}
    for product, loop, second in ((grouped_matmul, matmul_loop, "w"), (outer, outer_loop, "y")):
        names = ("x", second, "index")
        pick = [(shared if a is None else batched)[n] for a, n in zip(axes, names, strict=True)]
        for is_sorted in (False, True):
            operands = [*pick[:2], np.sort(pick[2]) if is_sorted else pick[2]]
            found = jax.vmap(functools.partial(product, is_sorted=is_sorted), axes)(*operands)
            expected = [
                loop(*(o if a is None else o[b] for o, a in zip(operands, axes, strict=True)))
                for b in range(BATCH)
            ]
            close(found, expected)


@X64
def test_vmap_over_an_inner_axis_and_out():
    moved = [np.moveaxis(BATCHED["x"], 0, 2), np.moveaxis(BATCHED["w"], 0, 1), BATCHED_INDEX.T]
    found = jax.vmap(grouped_matmul, (2, 1, 1), 1)(*moved)
    expected = [matmul_loop(*one) for one in zip(*BATCHED.values(), BATCHED_INDEX, strict=True)]
    close(np.moveaxis(found, 1, 0), expected)


@X64
def test_nested_vmap():
    """Per-example matrices inside, shared ones outside, and the other way round."""
    x, index = normal(14, 2, BATCH, ROWS, IN), draw_index(15, 2, BATCH, ROWS)
    inner = jax.vmap(grouped_matmul, (0, 0, 0))
    found = jax.vmap(inner, (0, None, 0))(x, BATCHED["w"], index)
    other = jax.vmap(jax.vmap(grouped_matmul, (0, None, 0)), (0, 0, 0))(x, BATCHED["w"][:2], index)
    for i in range(2):
        for b in range(BATCH):
            close(found[i, b], matmul_loop(x[i, b], BATCHED["w"][b], index[i, b]))
            close(other[i, b], matmul_loop(x[i, b], BATCHED["w"][i], index[i, b]))


@X64
@pytest.mark.parametrize("share", ["w", "nothing"])
@pytest.mark.parametrize("derivative", [grad, jvp_of_grad, grad_of_grad])
def test_vmap_of_derivatives(share, derivative):
    params = BATCHED | {"w": W} if share == "w" else BATCHED
    axes = {"x": 0, "w": None if share == "w" else 0}
    run = functools.partial(derivative, implementation="ragged")
    found = jax.jit(jax.vmap(run, (axes, 0)))(params, BATCHED_INDEX)
    for b in range(BATCH):
        own = {"x": params["x"][b], "w": W if share == "w" else params["w"][b]}
        expected = compiled(derivative, "dense")(own, BATCHED_INDEX[b])
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        close_trees(jax.tree.map(lambda leaf, b=b: leaf[b], found), expected, atol=1e-12 * scale)


@X64
@pytest.mark.parametrize("derivative", [jax.grad, lambda f: jax.grad(lambda p: jnp.sum(
    jax.grad(f)(p)["w"] ** 2))])  # fmt: skip
def test_derivatives_of_vmap(derivative):
    """Shared matrices get the sum over examples."""

    def total(params, implementation):
        run = functools.partial(network, implementation=implementation)
        values = jax.vmap(run, ({"x": 0, "w": None}, 0))(params, BATCHED_INDEX)
        return jnp.sum(values**2) / 1e6

    params = {"x": BATCHED["x"], "w": W}
    found, expected = (
        jax.jit(derivative(functools.partial(total, implementation=i)))(params)
        for i in ("ragged", "dense")
    )
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    close_trees(found, expected, rtol=1e-11, atol=1e-12 * scale)


@X64
def test_scan_over_layers_with_remat():
    """An inner gradient step inside, differentiated through: what a meta-gradient does."""
    layers = normal(16, 3, GROUPS, IN, IN) / 4

    def forward(layers, x, index, implementation):
        def layer(x, w):
            return x + jnp.tanh(grouped_matmul(x, w, index, implementation=implementation)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, layers)[0] ** 2)

    def outer_loss(layers, x, index, implementation):
        gradient = jax.grad(forward)(layers, x, index, implementation)
        return forward(layers - 0.01 * gradient, x, index, implementation)

    def batch_loss(layers, implementation):
        run = functools.partial(outer_loss, implementation=implementation)
        return jnp.sum(jax.vmap(run, (None, 0, 0))(layers, BATCHED["x"], BATCHED_INDEX))

    found, expected = (
        jax.jit(jax.grad(functools.partial(batch_loss, implementation=i)))(layers)
        for i in ("ragged", "dense")
    )
    close(found, expected, rtol=1e-11, atol=1e-12 * np.abs(expected).max())


def test_an_empty_group_gets_no_gradient():
    dw = jax.grad(lambda w: grouped_matmul(X, w, INDEX).sum())(np.float32(W))
    assert (dw[EMPTY] == 0).all() and (dw[0] != 0).all()


def on_two_devices():
    assert jax.local_device_count() == 2
    run = functools.partial(grad, implementation="ragged")
    axes = ({"x": 0, "w": None}, 0)
    params = {"x": np.float32(BATCHED["x"][:2]), "w": np.float32(W)}
    found = jax.pmap(run, in_axes=axes)(params, BATCHED_INDEX[:2])
    expected = jax.vmap(run, axes)(params, BATCHED_INDEX[:2])
    close_trees(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-4)


def test_two_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", "from tests.models import test_grouped as t; t.on_two_devices()"],
        env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_the_cpu_program_does_not_compute_every_group():
    """Temporary memory stays below one copy of the rows per group."""
    x, w, index = jnp.ones((2048, 32)), jnp.ones((64, 32, 32)), jnp.zeros(2048, int)
    loss = jax.grad(lambda x, w: jnp.sum(grouped_matmul(x, w, index) ** 2), (0, 1))
    memory = jax.jit(loss).lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * x.nbytes < 64 * x.nbytes
