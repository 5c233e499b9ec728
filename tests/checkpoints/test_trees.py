"""A tree of arrays on disk: what is read is what was written, or an error that lists why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.checkpoints import trees

TREE = {"a": {"x": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2, jnp.bfloat16)}


def test_round_trip_to_the_bit(tmp_path):
    trees.save(tmp_path / "t.safetensors", TREE)
    template = jax.eval_shape(lambda: TREE)
    found = trees.load(tmp_path / "t.safetensors", template)
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(TREE), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_all_differences_are_listed(tmp_path):
    trees.save(tmp_path / "t.safetensors", TREE)
    template = {"a": {"x": jnp.ones((3, 2))}, "c": jnp.ones(1)}
    with pytest.raises(ValueError, match="does not fit") as error:
        trees.load(tmp_path / "t.safetensors", template)
    for part in ("a/x: file has float32[2, 3], must be float32[3, 2]", "b: ", "c: file has none"):
        assert part in str(error.value)


def test_what_is_no_safetensors_file_is_said(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        trees.load(tmp_path / "t.safetensors", TREE)
    with pytest.raises(FileNotFoundError):
        trees.load(tmp_path / "other", TREE)
