"""Weight-only quantised matrices: a frozen base in 4.5 or 8.5 bits per weight.

A ``Quantized`` stands where a kernel ``[..., in, out]`` would stand in a parameter tree. Blocks of
consecutive weights along ``in`` share one float32 scale, so with blocks of 64 the state is 4.5 bits
per weight for ``nf4`` and 8.5 for ``int8``. Only storage is narrow: products run in the dtype of
the activations.

Why not a library: qwix 0.1.8 quantises plain arrays too and packs its ``uint4`` codes, but
Orbax cannot save that dtype, its NF4 decoder flattens the array, which gathers a matrix that is
sharded along ``out``, and it refuses an ``in`` that the block does not divide. Compiled for a TPU
v5e, its product of 256 bfloat16 rows with a 4096 x 4096 matrix needs 202 MB of scratch memory where
ours needs none. Two codes in a ``uint8`` save, shard and slice like any other array.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["int8", "nf4"]

NF4_LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The 16 levels of NormalFloat4, in units of the block's largest magnitude (QLoRA, appendix E)."""

SMALLEST_BLOCK = 8
"""A block shrinks to divide ``in``, but not below this: scales would outweigh the codes."""


@flax.struct.dataclass
class Quantized:
    """A frozen matrix ``[..., in, out]`` as codes and scales; leading axes are layers or experts.

    A pytree whose two leaves carry the same leading axes, so that ``lax.scan``, ``vmap`` and slices
    over layers or experts treat it like the kernel it replaces. No gradient reaches it.

    Attributes:
        codes: ``int8`` [..., in, out] in [-127, 127], or ``nf4``: uint8 [..., in / 2, out]. Byte
            ``r`` of a block of ``n`` weights holds the code of its weight ``r`` in the low half
            and of its weight ``n / 2 + r`` in the high half (neighbours are thus never
            interleaved, which lets the TPU compiler fuse the unpacking into the product).
        scales: float32 [..., in / block, out], the step of ``int8`` or the largest magnitude of an
            ``nf4`` block.
        kind: ``"int8"`` or ``"nf4"``.
    """

    codes: jax.Array
    scales: jax.Array
    kind: Kind = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., in, out] of the matrix."""
        *leading, rows, out = self.codes.shape
        return (*leading, rows * 2 if self.kind == "nf4" else rows, out)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes

    def __call__(
        self, x: jax.Array, multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul
    ) -> jax.Array:
        """Return ``multiply(x, w)`` with the matrix in the dtype of ``x``.

        The matrix is decoded again in the backward pass: kept as a residual, it would hold every
        layer in full precision between the passes.

        Args:
            x: [..., in], floating.
            multiply: (x [..., in], w [..., in, out]) -> product, linear in ``x``.
        """
        return jax.checkpoint(lambda x, q: multiply(x, dequantize(q, x.dtype)))(x, self)


def quantize(kernel: jax.Array, kind: Kind, block: int | None = 64) -> Quantized:
    """Round a matrix to the nearest codes, block by block along ``in``.

    ``nf4`` is NormalFloat4 with one scale per block, without the second quantisation of the scales
    (QLoRA, arXiv 2305.14314, section 3); ``int8`` is symmetric, largest magnitude / 127. Either is
    computed in float32. A block that does not divide ``in`` shrinks to the largest size that does
    (an even one for ``nf4``): 24 inputs make one block of 24, 96 make two of 48. A block of zeros
    comes back as zeros.

    Args:
        kernel: [..., in, out], floating, any number of leading axes.
        kind: ``"int8"`` or ``"nf4"``.
        block: weights that share a scale; ``None`` for the whole input axis.

    Returns:
        Codes and scales; errors are at most scale / 2 (``int8``) or 0.152 scale (``nf4``).

    Raises:
        ValueError: for an unknown kind, a kernel that is not a floating matrix, a block that cannot
            be shrunk to divide ``in``, or weights that are not finite in float32. Inside a
            transformation values are unknown: there such a block decodes to non-finite weights.
    """
    if kind not in ("int8", "nf4"):
        raise ValueError(f"kind={kind!r} must be 'int8' or 'nf4'")
    if isinstance(kernel, Quantized):
        raise ValueError(f"kernel is quantised already, as {kernel.kind}")
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"kernel is {kernel.dtype} {kernel.shape}, it must be floating [..., in, out]"
        )
    codes, scales = _encode(kernel, kind, _block_size(kernel.shape[-2], kind, block))
    # A largest magnitude inherits every NaN and infinity of its block.
    if not isinstance(scales, jax.core.Tracer) and not bool(jnp.isfinite(scales).all()):
        raise ValueError(f"kernel {kernel.shape} has weights that are not finite in float32")
    return Quantized(codes, scales, kind)


def dequantize(q: Quantized, dtype: Any) -> jax.Array:
    """Decode to [..., in, out] in ``dtype``: code times scale in float32, then one rounding.

    Differentiation sees a constant.

    Raises:
        ValueError: if ``dtype`` is not floating.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={jnp.dtype(dtype).name} must be floating")
    *leading, blocks, out = q.scales.shape
    codes = q.codes.reshape(*leading, blocks, -1, out)
    if q.kind == "nf4":
        values = _level(jnp.concatenate([codes & 15, codes >> 4], axis=-2))
    else:
        values = codes.astype(jnp.float32)
    scales = jax.lax.stop_gradient(q.scales)[..., None, :]
    return (values * scales).astype(dtype).reshape(q.shape)


def quantized_tree(
    theta: Any, kind: Kind, wanted: Callable[[str], bool], block: int | None = 64
) -> Any:
    """Quantise the chosen matrices of a parameter tree and leave the rest untouched.

    Args:
        theta: parameters; matrices end in [in, out].
        kind: see ``quantize``.
        wanted: given the path of a leaf, such as ``layers/mlp/gate_proj/kernel``, whether to
            quantise it.
        block: see ``quantize``.

    Returns:
        The same tree with a ``Quantized`` at every wanted path.

    Raises:
        ValueError: if no path is wanted, or with the path of the leaf if ``quantize`` refuses it.
    """
    entries, structure = jax.tree_util.tree_flatten_with_path(
        theta, is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in entries]
    chosen = [wanted(path) for path, _ in named]
    if not any(chosen):
        raise ValueError(f"no leaf is wanted; the paths are {[path for path, _ in named]}")
    leaves = [
        _quantize_named(path, leaf, kind, block) if take else leaf
        for (path, leaf), take in zip(named, chosen, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _quantize_named(path: str, leaf: Any, kind: Kind, block: int | None) -> Quantized:
    """Quantise one leaf; an error names its path."""
    try:
        return quantize(leaf, kind, block)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _block_size(inputs: int, kind: Kind, block: int | None) -> int:
    """The largest size up to ``block`` that divides ``inputs``, an even one for ``nf4``."""
    if block is not None and block < 1:
        raise ValueError(f"block={block} must be at least 1, or None for the whole input axis")
    multiple = 2 if kind == "nf4" else 1
    most = inputs if block is None else min(block, inputs)
    least = max(multiple, min(most, SMALLEST_BLOCK))
    for size in range(most, least - 1, -1):
        if inputs % size == 0 and size % multiple == 0:
            return size
    even = "even " if multiple == 2 else ""
    raise ValueError(
        f"block={block} cannot divide in={inputs}: no {even}size from {least} to {most} does"
    )


@functools.partial(jax.jit, static_argnames=("kind", "block"))
def _encode(kernel: jax.Array, kind: Kind, block: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of ``quantize``; compiled, as eager steps would store a copy at each."""
    *leading, inputs, out = kernel.shape
    weights = kernel.astype(jnp.float32).reshape(*leading, inputs // block, block, out)
    scales = jnp.abs(weights).max(axis=-2)
    if kind == "int8":
        scales = scales / 127
    ratios = weights / jnp.where(scales > 0, scales, 1)[..., None, :]
    if kind == "nf4":
        low, high = jnp.split(_nearest_level(ratios), 2, axis=-2)
        codes = low | (high << 4)
    else:
        # Only a scale among the subnormal numbers, rounded itself, can exceed the range.
        codes = jnp.clip(jnp.round(ratios), -127, 127).astype(jnp.int8)
    return codes.reshape(*leading, -1, out), scales


def _nearest_level(ratios: jax.Array) -> jax.Array:
    """Index in [0, 15] of the nearest NF4 level, uint8; halfway goes to the lower level."""
    middles = (NF4_LEVELS[1:].astype(np.float64) + NF4_LEVELS[:-1]) / 2
    # Fifteen comparisons fuse into one pass; a binary search was 29 times slower on a CPU.
    above = ((ratios > np.float32(middle)).astype(jnp.uint8) for middle in middles)
    return functools.reduce(jnp.add, above)


def _level(codes: jax.Array) -> jax.Array:
    """The NF4 level of each code in [0, 15], float32: four rounds of choosing by one bit."""
    # A table look-up becomes a gather on a TPU, which cannot fuse into the product: it touches 570
    # times the memory.
    values = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, odd, even) for even, odd in pairs]
    return values[0]
