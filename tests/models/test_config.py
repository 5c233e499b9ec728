"""The checks of a model's sizes, also where annotations are strings, as in this file."""

from __future__ import annotations

import dataclasses

import pytest

from memdlm_jax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Own(TransformerConfig):
    """A family with two sizes of its own."""

    experts: int = 1
    scale: float = 1.0
    window: int | None = None


SIZES = dict(
    vocab_size=20, width=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_features=24,
    mask_token_id=1, max_length=32,
)  # fmt: skip


def test_what_is_no_whole_number_need_not_be_one():
    assert Own(**SIZES, scale=0.5, window=None).experts == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 2.0}, r"experts=2\.0 must be a whole number"),
        ({"experts": True}, "experts=True must be a whole number"),
        ({"experts": -1}, "experts=-1 must be at least 0"),
        ({"num_layers": "3"}, "num_layers='3' must be a whole number"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ],
    ids=str,
)
def test_sizes_are_whole_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        Own(**(SIZES | change))
