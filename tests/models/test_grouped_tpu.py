"""The kernel that takes the place of XLA's ragged product on TPUs, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.models import grouped

GROUPS, IN, OUT = 5, 6, 4


@pytest.mark.parametrize("rows", [37, 300])
def test_the_kernel_of_tpus_equals_a_plain_loop(rows):
    """Interpreted; a group without rows, groups that end within a tile, rows of no whole tile."""
    rng = np.random.default_rng(0)
    index = np.sort(rng.choice([0, 2, 3], rows))
    x, y = (rng.normal(size=(rows, n)).astype(np.float32) for n in (IN, OUT))
    product = functools.partial(grouped._tiled_outer, interpret=True)
    found = grouped._lower_outer(
        product, jnp.asarray(x), jnp.asarray(y), jnp.asarray(index), num_groups=GROUPS,
        is_sorted=True, precision=None,
    )  # fmt: skip
    expected = np.zeros((GROUPS, IN, OUT))
    for t in range(rows):
        expected[index[t]] += np.outer(x[t], y[t])
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_kernel_of_tpus_keeps_the_precision():
    x, sizes = jnp.zeros((256, 128)), jnp.array([100, 156])
    with jax.default_matmul_precision("float32"):
        program = str(jax.make_jaxpr(grouped._tiled_outer)(x, x, sizes))
    assert program.count("dot_general") == 1 and "Precision.HIGHEST" in program
