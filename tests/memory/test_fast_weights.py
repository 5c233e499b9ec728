"""What fast weights are made of, where they sit, and how they start."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.evaluation import spectrum
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from tests.models.small import small

SHAPES = {
    "attention/q_proj": (10, 16, 16),
    "mlp/gate_proj": (10, 16, 40),
    "mlp/up_proj": (10, 16, 40),
    "mlp/down_proj": (10, 40, 16),
}
DENOISER = types.SimpleNamespace(
    num_layers=10,
    adaptable=lambda split=0: {path: (n - split, *rest) for path, (n, *rest) in SHAPES.items()},
)
FFN_PATHS = ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
CONFIG = MemoryConfig(rank=3, alpha=6.0, layer_fraction=0.4)


@pytest.fixture(scope="module")
def phi():
    return fast_weights.init(jax.random.key(0), DENOISER, CONFIG, groups=2)


def test_lora_shapes_cover_the_adapted_layers_of_the_target_modules(phi):
    assert set(phi) == {"mlp"} and set(phi["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
    for path in FFN_PATHS:
        _, rows, columns = SHAPES[path]
        delta = phi["mlp"][path.split("/")[1]]["delta"]
        assert delta.A.shape == (2, 4, rows, 3)
        assert delta.B.shape == (2, 4, 3, columns)
        assert delta.scale == 2.0
    assert {leaf.dtype for leaf in jax.tree.leaves(phi)} == {jnp.dtype("float32")}


def test_a_is_uniform_within_one_over_root_of_the_inputs_and_b_is_zero(phi):
    for path in FFN_PATHS:
        delta = phi["mlp"][path.split("/")[1]]["delta"]
        bound = SHAPES[path][1] ** -0.5
        share = np.abs(np.asarray(delta.A[0])) / bound
        assert 0.95 < share.max() <= 1
        assert abs(share.mean() - 0.5) < 0.08
        assert not np.asarray(delta.B).any()


def test_groups_start_alike_modules_and_layers_do_not(phi):
    gate, up = (np.asarray(phi["mlp"][name]["delta"].A) for name in ("gate_proj", "up_proj"))
    np.testing.assert_array_equal(gate[0], gate[1])
    assert (gate != up).any()
    assert (gate[0, 0] != gate[0, 1]).any()


def test_the_key_decides(phi):
    def gate(seed):
        other = fast_weights.init(jax.random.key(seed), DENOISER, CONFIG, groups=2)
        return np.asarray(other["mlp"]["gate_proj"]["delta"].A)

    np.testing.assert_array_equal(gate(0), phi["mlp"]["gate_proj"]["delta"].A)
    assert (gate(1) != gate(0)).any()


def test_full_adapter_is_one_zero_matrix():
    config = dataclasses.replace(
        CONFIG, adapter="full", target_modules=("attention/q_proj", "mlp/down_proj")
    )
    phi = fast_weights.init(jax.random.key(0), DENOISER, config, groups=3)
    assert phi["attention"]["q_proj"]["delta"].W.shape == (3, 4, 16, 16)
    assert phi["mlp"]["down_proj"]["delta"].W.shape == (3, 4, 40, 16)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(phi))


def test_unknown_modules_are_named_beside_the_known():
    config = dataclasses.replace(CONFIG, target_modules=("mlp/gate_proj", "mlp/w1"))
    with pytest.raises(ValueError, match=r"target_modules has 'mlp/w1'.*'attention/q_proj'"):
        fast_weights.init(jax.random.key(0), DENOISER, config, groups=1)


@pytest.mark.parametrize(
    ("modules", "paths"),
    [
        (("mlp",), sorted(FFN_PATHS)),
        (("attention",), ["attention/q_proj"]),
        (("mlp", "attention"), sorted(SHAPES)),
        (("mlp", "mlp/up_proj"), sorted(FFN_PATHS)),
        (("mlp/up_proj",), ["mlp/up_proj"]),
        (("up_proj", "q_proj"), ["attention/q_proj", "mlp/up_proj"]),
    ],
)
def test_a_module_stands_for_all_matrices_below_it(modules, paths):
    config = dataclasses.replace(CONFIG, target_modules=modules)
    assert fast_weights.adapted_paths(DENOISER, config) == paths


@pytest.mark.parametrize("module", ["ml", "mlp/", "mlp/up"])
def test_a_part_of_a_name_is_no_module(module):
    with pytest.raises(ValueError, match=f"target_modules has '{module}', unknown"):
        fast_weights.adapted_paths(
            DENOISER, dataclasses.replace(CONFIG, target_modules=("mlp", module))
        )


class TestDropout:
    def used(self, rate, key=1, layer=0, module="up_proj"):
        phi = fast_weights.init(jax.random.key(0), DENOISER, CONFIG, groups=1)
        one_group = jax.tree.map(lambda leaf: leaf[0] + 1.0, phi)
        dropped = fast_weights.with_dropout(one_group, jax.random.key(key), rate)
        pair = dropped["mlp"][module]["delta"], one_group["mlp"][module]["delta"]
        return [jax.tree.map(lambda leaf: leaf[layer], delta) for delta in pair]

    def test_rate_zero_is_the_identity(self):
        phi = fast_weights.init(jax.random.key(0), DENOISER, CONFIG, groups=1)
        assert fast_weights.with_dropout(phi, jax.random.key(0), 0.0) is phi

    def test_inputs_are_dropped_and_the_rest_scaled_up(self):
        """With x the unit vectors, each output row is the matrix's, over 1 - rate or zero."""
        delta, plain = self.used(0.25)
        x = jnp.eye(16)
        out, full = np.asarray(delta(x)), np.asarray(plain(x))
        zero = ~out.any(-1)
        assert 0 < zero.sum() < 16
        np.testing.assert_allclose(out[~zero], full[~zero] / 0.75, rtol=1e-5)

    def test_the_mean_over_keys_is_the_fast_weight_itself(self):
        x = jnp.linspace(-1, 1, 16)[None]

        def output(key):
            phi = fast_weights.init(jax.random.key(0), DENOISER, CONFIG, groups=1)
            phi = jax.tree.map(lambda leaf: leaf[0] + 1.0, phi)
            delta = fast_weights.with_dropout(phi, key, 0.25)["mlp"]["up_proj"]["delta"]
            return jax.tree.map(lambda leaf: leaf[0], delta)(x)

        outputs = jax.jit(jax.vmap(output))(jax.random.split(jax.random.key(0), 4000))
        error = np.std(outputs, axis=0) / np.sqrt(4000)
        expected = np.asarray(self.used(0.0)[1](x))
        assert (np.abs(np.mean(outputs, axis=0) - expected) < 5 * error).all()

    def test_layers_matrices_and_keys_drop_apart(self):
        def kept(**where):
            return np.asarray(self.used(0.5, **where)[0](jnp.eye(16))).any(-1)

        first = kept()
        for other in (kept(layer=1), kept(module="gate_proj"), kept(key=2)):
            assert (first != other).any()
        np.testing.assert_array_equal(first, kept())


@pytest.mark.parametrize(
    ("layers", "fraction", "adapted"),
    [
        (1, 0.1, 1),
        (3, 1.0, 3),
        (4, 0.1, 1),
        (4, 0.25, 1),
        (8, 0.1, 1),
        (10, 0.2, 2),
        # 10 * (1 - 0.8) is 1.9999999999999996 in floating point.
        (10, 0.8, 9),
        (16, 0.1, 2),
        (32, 0.1, 4),
    ],
)
def test_adapted_layers_follow_the_public_codes_rounding(layers, fraction, adapted):
    assert layers - fast_weights.first_adapted_layer(layers, fraction) == adapted
    denoiser = types.SimpleNamespace(num_layers=layers)
    config = MemoryConfig(layer_fraction=fraction)
    assert fast_weights.split_of(denoiser, config) == layers - adapted


def test_a_fraction_lost_in_rounding_is_refused():
    with pytest.raises(ValueError, match="layer_fraction=1e-20 adapts none of 4 layers: 1 - "):
        fast_weights.first_adapted_layer(4, 1e-20)


def test_low_rank_and_dense_are_linear_maps():
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 4), (4, 2), (2, 3)))
    ours = fast_weights.LowRank(jnp.asarray(a), jnp.asarray(b), 2.5)(jnp.asarray(x))
    np.testing.assert_allclose(ours, 2.5 * x @ a @ b, rtol=1e-5)
    w = jnp.asarray(a @ b)
    np.testing.assert_allclose(fast_weights.Dense(w)(x), x @ a @ b, rtol=1e-5, atol=1e-6)


def test_groups_are_consecutive_rows_and_come_back():
    tree = {"x": jnp.arange(24).reshape(6, 4), "y": jnp.arange(6), "none": None}
    grouped = fast_weights.group_rows(tree, 3)
    assert grouped["x"].shape == (3, 2, 4) and grouped["y"].tolist() == [[0, 1], [2, 3], [4, 5]]
    back = fast_weights.ungroup_rows(grouped)
    np.testing.assert_array_equal(back["x"], tree["x"])
    assert back["none"] is None and fast_weights.number_of_groups(grouped) == 3


def test_group_norms_are_over_all_leaves_of_a_group():
    tree = {"a": jnp.array([[3.0, 0.0], [1.0, 2.0]]), "b": jnp.array([[[4.0]], [[2.0]]])}
    np.testing.assert_allclose(fast_weights.group_norms(tree), [5.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_memory_is_described_by_what_it_changes(adapter):
    config = MemoryConfig(
        rank=2, alpha=4.0, layer_fraction=0.4, target_modules=("up_proj",), adapter=adapter
    )
    phi = fast_weights.init(jax.random.key(0), small("llada_moe"), config, 2)
    nothing = spectrum.describe(phi)
    assert all((found["norm"] == 0).all() and (found["rank"] == 0).all()
               for found in nothing.values())  # fmt: skip
    noise = np.random.default_rng(0)
    phi = jax.tree.map(lambda x: jnp.asarray(noise.normal(size=x.shape), x.dtype), phi)
    described = spectrum.describe(phi)
    assert list(described) == ["mlp/experts/up_proj"]
    delta = phi["mlp"]["experts"]["up_proj"]["delta"]
    assert isinstance(delta, fast_weights.LowRank if adapter == "lora" else fast_weights.Dense)
    change = delta.scale * delta.A @ delta.B if adapter == "lora" else delta.W
    singular = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
    p = singular**2 / (singular**2).sum(-1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1)
    found = described["mlp/experts/up_proj"]
    assert found["norm"].shape == (2, 2, 6)
    np.testing.assert_allclose(found["norm"], np.sqrt((singular**2).sum(-1)), rtol=1e-4)
    np.testing.assert_allclose(found["rank"], np.exp(entropy), rtol=1e-3)
