"""What grouped products do not take, and how they say so."""

import pytest

from memdlm_jax.models.grouped import grouped_matmul, grouped_outer
from tests.models.test_grouped import GROUPS, INDEX, W, X, Y


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x is float\d+ of shape \(6,\); it must be float of rank 2"),
        ({"x": INDEX[:, None]}, "x is int32"),
        ({"w": W[0]}, r"w is float\d+ of shape \(6, 4\); it must be float of rank 3"),
        ({"w": W[:, 1:]}, r"w has shape \(5, 5, 4\); x \(40, 6\) needs \[e >= 1, 6, out\]"),
        ({"w": W[:0]}, r"w has shape \(0, 6, 4\)"),
        ({"index": INDEX[1:]}, r"index is int32 of shape \(39,\); x \(40, 6\) needs one integer"),
        ({"index": X[:, 0]}, r"index is float\d+"),
        ({"implementation": "sparse"}, "implementation='sparse' must be one of"),
    ],
)
def test_matmul_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{"x": X, "w": W, "index": INDEX} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": Y[1:]}, r"y has shape \(39, 4\); x \(40, 6\) needs \[40, out\]"),
        ({"y": W}, r"y is float\d+ of shape \(5, 6, 4\); it must be float of rank 2"),
        ({"num_groups": 0}, "num_groups=0 must be at least 1"),
        ({"implementation": ""}, "implementation='' must be one of"),
    ],
)
def test_outer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_outer(**{"x": X, "y": Y, "index": INDEX, "num_groups": GROUPS} | arguments)
