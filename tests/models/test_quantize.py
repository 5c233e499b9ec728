"""Weight-only quantised matrices against plain NumPy loops, exact byte counts and error bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from memdlm_jax.models.quantize import (
    NF4_LEVELS,
    Quantized,
    dequantize,
    quantize,
    quantized_tree,
)

KINDS = ("int8", "nf4")
LARGEST_HALF_GAP = (1 - 0.6961928009986877) / 2


def draw(shape, seed=0, dtype=np.float32):
    """Normal weights whose blocks differ in size, as trained matrices do."""
    generator = np.random.default_rng(seed)
    spread = np.exp(generator.normal(size=(*shape[:-2], 1, shape[-1])))
    return (generator.normal(size=shape) * spread).astype(dtype)


def loop(kernel, kind, block):
    """Codes (one per weight), scales and decoded values of one matrix, a weight at a time."""
    inputs, out = kernel.shape
    codes, values = np.zeros(kernel.shape, int), np.zeros(kernel.shape, np.float32)
    scales = np.zeros((inputs // block, out), np.float32)
    for b in range(inputs // block):
        for column in range(out):
            rows = range(b * block, (b + 1) * block)
            largest = max(np.float32(abs(kernel[row, column])) for row in rows)
            scale = largest / np.float32(127) if kind == "int8" else largest
            scales[b, column] = scale
            for row in rows:
                ratio = kernel[row, column] / scale if scale > 0 else np.float32(0)
                if kind == "int8":
                    code = int(np.round(ratio))
                    value = np.float32(code)
                else:
                    code = int(np.argmin([abs(float(ratio) - float(v)) for v in NF4_LEVELS]))
                    value = NF4_LEVELS[code]
                codes[row, column], values[row, column] = code, value * scale
    return codes, scales, values


def unpack(codes, block):
    """Undo the packing of one matrix byte by byte, as the docstring of ``Quantized`` states it."""
    half = block // 2
    unpacked = np.zeros((codes.shape[0] * 2, codes.shape[1]), int)
    for row, column in np.ndindex(codes.shape):
        start = row // half * block + row % half
        unpacked[start, column] = codes[row, column] % 16
        unpacked[start + half, column] = codes[row, column] // 16
    return unpacked


def bound(kernel, q, block):
    """Largest error that each weight may have, [in, out]."""
    step = 0.5 if q.kind == "int8" else LARGEST_HALF_GAP
    return step * np.repeat(np.asarray(q.scales), block, axis=-2) * (1 + 1e-5)


def test_levels_are_the_normal_quantiles_of_the_paper():
    """QLoRA: zero, and quantiles at equal steps of probability, 8 above it and 7 below."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "asked", "block"),
    [(128, 64, 64), (64, 16, 16), (24, 64, 24), (32, 64, 32), (96, 64, 48), (72, None, 72)],
)
def test_equals_a_plain_loop(kind, inputs, asked, block):
    kernel = draw((inputs, 5))
    q = quantize(kernel, kind, asked)
    codes, scales, values = loop(kernel, kind, block)
    assert (q.shape, q.kind, q.scales.dtype) == ((inputs, 5), kind, jnp.float32)
    # A division by 127 may be compiled as a product with the reciprocal: the last bit may differ.
    np.testing.assert_allclose(q.scales, scales, rtol=2e-7)
    ours = np.asarray(q.codes)
    np.testing.assert_array_equal(unpack(ours, block) if kind == "nf4" else ours, codes)
    np.testing.assert_allclose(dequantize(q, jnp.float32), values, rtol=4e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_error_bounds_of_weights_and_products(kind):
    kernel, x = draw((256, 33), 1), draw((7, 256), 2)
    q = quantize(kernel, kind)
    allowed = bound(kernel, q, 64)
    errors = np.abs(np.asarray(dequantize(q, jnp.float32)) - kernel)
    assert (errors <= allowed).all()
    assert errors.max() > 0.1 * allowed.max()  # the bound is no formality
    assert (np.abs(q(x) - x @ kernel) <= np.abs(x) @ allowed + 1e-4).all()


@pytest.mark.parametrize("level", range(16))
def test_every_level_comes_back_exactly(level):
    kernel = np.full((8, 3), NF4_LEVELS[level])
    kernel[0] = 1.0  # sets the scale
    np.testing.assert_array_equal(dequantize(quantize(kernel, "nf4"), jnp.float32), kernel)


@pytest.mark.parametrize("half", [1, 3, 4, 5])
def test_packing_of_every_pair_of_codes(half):
    """All 256 bytes, at odd and even half blocks, with the scale at 1."""
    low, high = np.divmod(np.arange(256), 16)
    kernel = np.repeat(np.stack([NF4_LEVELS[low], NF4_LEVELS[high]]), half, axis=0)
    kernel = np.concatenate([kernel, np.ones((2 * half, 256), np.float32)], axis=1)
    kernel[:, :256] *= 0.5
    kernel[0, :256], kernel[half, :256] = 0.5 * NF4_LEVELS[low], 0.5
    q = quantize(kernel, "nf4")
    assert q.codes.shape == (half, 512)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), kernel)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_bytes_and_leading_axes(kind, bits):
    kernel = draw((2, 3, 128, 10))
    q = quantize(kernel, kind)
    assert q.shape == kernel.shape
    assert q.nbytes * 8 == bits * kernel.size
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    for layer, expert in np.ndindex(2, 3):
        alone = dequantize(quantize(kernel[layer, expert], kind), jnp.float32)
        np.testing.assert_array_equal(dequantize(q, jnp.float32)[layer, expert], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_blocks_and_tiny_weights(kind):
    kernel = draw((128, 3))
    kernel[:64, 0] = 0
    kernel[:64, 1] *= 1e-43  # subnormal
    q = quantize(kernel, kind)
    decoded = np.asarray(dequantize(q, jnp.float32))
    assert (decoded[:64, 0] == 0).all() and not np.signbit(decoded[:64, 0]).any()
    zero = 0 if kind == "int8" else 0x77  # level 7 is zero, twice in a byte
    assert (q.codes[: 64 if kind == "int8" else 32, 0] == zero).all()
    assert (np.abs(decoded[:64, 1]) <= 1e-41).all()
    assert (decoded[64:] != 0).any(axis=0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_in_and_out(kind):
    kernel = jnp.asarray(draw((64, 9)), jnp.bfloat16)
    q = quantize(kernel, kind)
    wide = quantize(kernel.astype(jnp.float32), kind)
    assert all(map(np.array_equal, jax.tree.leaves(q), jax.tree.leaves(wide)))
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        dequantize(q, jnp.bfloat16), dequantize(q, jnp.float32).astype(jnp.bfloat16)
    )
    x = jnp.asarray(draw((4, 64)), jnp.bfloat16)
    assert q(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(q(x), x @ dequantize(q, jnp.bfloat16))


def test_float64_activations_meet_the_same_matrix(float64):
    q = quantize(draw((64, 9), dtype=np.float64), "nf4")
    x = draw((4, 64), dtype=np.float64)
    w = np.asarray(dequantize(q, jnp.float32)).astype(np.float64)
    assert (q(x).dtype, q.scales.dtype) == (jnp.float64, jnp.float32)
    np.testing.assert_allclose(q(x), x @ w, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_over_layers_equals_a_python_loop(kind):
    q = quantize(draw((3, 32, 32)) / 8, kind, 16)
    x = jnp.asarray(draw((4, 32)))
    scanned = jax.jit(lambda q, x: jax.lax.scan(lambda x, w: (jnp.tanh(w(x)), None), x, q)[0])
    expected = x
    for w in dequantize(q, jnp.float32):
        expected = jnp.tanh(expected @ w)
    np.testing.assert_allclose(scanned(q, x), expected, rtol=1e-5, atol=1e-6)
    tail = jax.tree.map(lambda leaf: leaf[1:], q)
    assert isinstance(tail, Quantized) and tail.shape == (2, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_experts_over_rows_and_of_quantize(kind):
    kernel, x = draw((3, 32, 8)), draw((5, 32))
    q = quantize(kernel, kind, 16)
    mapped = jax.vmap(lambda w: quantize(w, kind, 16))(kernel)
    assert all(map(np.array_equal, jax.tree.leaves(mapped), jax.tree.leaves(q)))
    w = np.asarray(dequantize(q, jnp.float32))
    experts = jax.vmap(lambda q: q(x))(q)
    rows = jax.vmap(lambda row: q(row, lambda row, w: jnp.einsum("i,eio->eo", row, w)))(x)
    np.testing.assert_allclose(experts, np.einsum("bi,eio->ebo", x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rows, np.einsum("bi,eio->beo", x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_order_reach_the_activations_only(kind, float64):
    """f(x) = sum((x w)^3): gradient 3 (x w)^2 w', and the Jacobian product of the gradient."""
    q = quantize(draw((16, 6)), kind)
    x, v = draw((3, 16), 1, np.float64), draw((3, 16), 2, np.float64)
    w = np.asarray(dequantize(q, jnp.float64))

    def cube(x, q=q):
        return (q(x) ** 3).sum()

    gradient, product = jax.jit(lambda x: jax.jvp(jax.grad(cube), (x,), (v,)))(x)
    np.testing.assert_allclose(gradient, 3 * (x @ w) ** 2 @ w.T, rtol=1e-12)
    np.testing.assert_allclose(product, (6 * (x @ w) * (v @ w)) @ w.T, rtol=1e-12, atol=1e-9)
    outer = jax.grad(lambda x: (jax.grad(cube)(x) * v).sum())(x)
    np.testing.assert_allclose(outer, product, rtol=1e-12, atol=1e-9)
    constant = jax.grad(lambda q: cube(x, q), allow_int=True)(q)
    assert (constant.scales == 0).all() and constant.codes.dtype == jax.dtypes.float0


@pytest.mark.parametrize("kind", KINDS)
def test_full_precision_is_neither_an_argument_nor_kept_for_the_backward_pass(kind):
    width, x = 128, jnp.ones((4, 128))

    def loss(q, x):
        return (jax.lax.scan(lambda x, w: (jnp.tanh(w(x)), None), x, q)[0] ** 2).sum()

    def scratch(layers):
        q = quantize(draw((layers, width, width)), kind)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=1)).lower(q, x).compile()
        memory = compiled.memory_analysis()
        assert memory.argument_size_in_bytes == q.nbytes + x.nbytes
        return memory.temp_size_in_bytes

    # What a layer more costs is activations, not a matrix.
    assert scratch(24) - scratch(8) < 16 * (width * width * 4) / 8


def test_quantized_tree_takes_the_wanted_paths_only():
    theta = {
        "embedding": jnp.ones((7, 32)),
        "layers": {
            "norm": {"scale": jnp.ones((2, 32))},
            "mlp": {"up_proj": {"kernel": draw((2, 32, 8))}},
        },
    }
    asked = []

    def wanted(path):
        asked.append(path)
        return path.endswith("/kernel")

    quantised = quantized_tree(theta, "nf4", wanted, 16)
    assert asked == ["embedding", "layers/mlp/up_proj/kernel", "layers/norm/scale"]
    q = quantised["layers"]["mlp"]["up_proj"].pop("kernel")
    plain = quantize(theta["layers"]["mlp"]["up_proj"].pop("kernel"), "nf4", 16)
    assert all(map(np.array_equal, jax.tree.leaves(q), jax.tree.leaves(plain)))
    assert jax.tree.structure(quantised) == jax.tree.structure(theta)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (quantised, theta)), strict=True))


def test_quantized_tree_names_what_it_refuses():
    theta = {"mlp": {"kernel": draw((32, 8)), "bias": jnp.ones(8)}}
    with pytest.raises(ValueError, match=r"no leaf is wanted.*mlp/bias.*mlp/kernel"):
        quantized_tree(theta, "int8", lambda path: False)
    with pytest.raises(ValueError, match=r"mlp/bias: kernel is float32 \(8,\)"):
        quantized_tree(theta, "int8", lambda path: True)
    once = quantized_tree(theta, "int8", lambda path: path == "mlp/kernel")
    with pytest.raises(ValueError, match="mlp/kernel: kernel is quantised already, as int8"):
        quantized_tree(once, "nf4", lambda path: path == "mlp/kernel")


@pytest.mark.parametrize(
    ("kernel", "kind", "block", "message"),
    [
        (np.ones((8, 2), np.float32), "int4", 64, "kind='int4' must be 'int8' or 'nf4'"),
        (np.ones((8, 2), np.int32), "int8", 64, r"kernel is int32 \(8, 2\)"),
        (np.ones((8,), np.float32), "int8", 64, r"kernel is float32 \(8,\)"),
        (np.ones((8, 2), np.float32), "int8", 0, "block=0 must be at least 1"),
        (np.ones((97, 2), np.float32), "int8", 64, "block=64 cannot divide in=97.*from 8 to 64"),
        (np.ones((25, 2), np.float32), "nf4", None, "in=25: no even size from 8 to 25"),
        (np.ones((1, 2), np.float32), "nf4", 64, "in=1: no even size"),
        (np.ones((0, 2), np.float32), "nf4", 64, "in=0: no even size"),
        (np.array([[1.0, np.nan]] * 8), "int8", 64, "not finite"),
        (np.array([[1.0, -np.inf]] * 8), "nf4", 64, "not finite"),
    ],
)
def test_bad_input_is_refused(kernel, kind, block, message):
    with pytest.raises(ValueError, match=message):
        quantize(kernel, kind, block)


def test_a_matrix_is_decoded_to_floating_types_only():
    with pytest.raises(ValueError, match="dtype=int32 must be floating"):
        dequantize(quantize(draw((8, 2)), "int8"), jnp.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_stay_visible_inside_jit(kind, bad):
    kernel = draw((128, 2))
    kernel[70, 1] = bad
    decoded = jax.jit(lambda w: dequantize(quantize(w, kind), jnp.float32))(kernel)
    finite = np.isfinite(decoded)
    assert finite[:64].all() and finite[:, 0].all() and not finite[64:, 1].all()
