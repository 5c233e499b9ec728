"""Settings of the memory: every bad value is refused by name."""

import dataclasses

import pytest

from memdlm_jax.memory.config import FFN_MODULES, MemoryConfig

NAN = float("nan")
BAD = [
    ("steps", 0),
    ("steps", -1),
    ("learning_rate", 0.0),
    ("learning_rate", -0.1),
    ("learning_rate", NAN),
    ("clip_norm", 0.0),
    ("clip_norm", -1.0),
    ("clip", "layer"),
    ("epochs", 0),
    ("masking", "progressive"),
    ("loss", "kl"),
    ("hidden_distance", "l1"),
    ("temperature", 0.0),
    ("supervise", "all"),
    ("weighting", "elbo"),
    ("normalisation", "mean"),
    ("padding", "outer"),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("groups", 2),
    ("learned", ("rate",)),
    ("learned", ("rates", "rates")),
    ("pre_anchor_scale", 0.99),
    ("pre_anchor_scale", NAN),
    ("pre_anchor_scale", float("inf")),
    ("adapter", "ia3"),
    ("rank", 0),
    ("alpha", 0.0),
    ("layer_fraction", 0.0),
    ("layer_fraction", -0.5),
    ("layer_fraction", 1.01),
    ("target_modules", ()),
    ("scope", "batch"),
    ("meta_gradient", "second_order"),
    ("prompt_mask_ratio", 0.0),
    ("prompt_mask_ratio", 1.1),
]
EDGES = [
    ("steps", 1),
    ("pre_anchor_scale", 1.0),
    ("layer_fraction", 1.0),
    ("prompt_mask_ratio", 1.0),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"memory\.{field}=.* must be ") as error:
        MemoryConfig(**{field: value})
    wrong = value[0] if value and isinstance(value, tuple) and field != "learned" else value
    assert repr(wrong) in str(error.value) or field == "learned"


@pytest.mark.parametrize(("field", "value"), EDGES)
def test_edges_of_the_ranges_are_allowed(field, value):
    assert getattr(MemoryConfig(**{field: value}), field) == value


def test_defaults_are_the_papers():
    config = MemoryConfig()
    assert (config.steps, config.learning_rate, config.clip_norm) == (2, 0.1, 1.0)
    assert (config.rank, config.alpha, config.layer_fraction) == (32, 64.0, 0.1)
    assert (config.pre_anchor_scale, config.prompt_mask_ratio) == (1.5, 0.2)
    assert config.target_modules == FFN_MODULES
    assert (config.scope, config.meta_gradient) == ("example", "first_order")


def test_cannot_be_changed_after_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().rank = 0
