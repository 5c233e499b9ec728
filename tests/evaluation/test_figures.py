import base64
import io

import matplotlib.image
import numpy as np
import pytest

from memdlm_jax.evaluation import figures

DEPTHS = [(0.0, 0.5), (0.5, 1.0)]
PREFIX = "data:image/png;base64,"


def pixels(uri):
    assert uri.startswith(PREFIX)
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.removeprefix(PREFIX))))


@pytest.fixture
def drawn(monkeypatch):
    """Texts and images of the figures that are drawn."""
    kept = []
    original = figures._data_uri

    def keep(figure):
        kept.append(figure)
        return original(figure)

    monkeypatch.setattr(figures, "_data_uri", keep)
    return kept


def test_heat_map_puts_every_accuracy_in_its_cell(drawn):
    uri = figures.heat_map([[1.0, 0.25], [None, 0.0], [0.5, 0.123]], DEPTHS, [128, 256, 512], "m")
    assert pixels(uri).ndim == 3
    panel = drawn[0].axes[0]
    texts = {text.get_position(): text.get_text() for text in panel.texts}
    assert texts == {
        (0, 0): "100", (0, 1): "25", (1, 0): "–", (1, 1): "0", (2, 0): "50", (2, 1): "12",
    }  # fmt: skip
    image = panel.images[0].get_array()
    np.testing.assert_array_equal(image.filled(-1), [[1.0, -1, 0.5], [0.25, 0.0, 0.123]])
    assert panel.images[0].get_clim() == (0, 1)
    assert [t.get_text() for t in panel.get_xticklabels()] == ["128", "256", "512"]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["0–50 %", "50–100 %"]


def test_the_same_numbers_give_the_same_image():
    one, again, other = (figures.heat_map([[v]], [(0, 1)], [64]) for v in (0.5, 0.5, 0.6))
    assert one == again != other


def test_an_empty_map_is_all_dashes(drawn):
    figures.heat_map([[None, None]], DEPTHS, [128])
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["–", "–"]


@pytest.mark.parametrize(
    ("values", "lengths", "message"),
    [
        ([], [], "0 lengths and 2 depths"),
        ([[0.1, 0.2]], [1, 2], r"values has rows of \[2\] cells; 2 rows \(lengths\) of 2"),
        ([[0.1]], [1], r"values has rows of \[1\] cells; 1 rows"),
        ([[0.1, 1.2]], [1], r"values has 1.2, which must lie in \[0, 1\]"),
    ],
)
def test_maps_that_do_not_fit_are_named(values, lengths, message):
    with pytest.raises(ValueError, match=message):
        figures.heat_map(values, DEPTHS, lengths)


def test_attention_profile_draws_heads_and_their_mean(drawn):
    off, on = [[0.1, 0.3], [0.5, 0.7]], [[0.1, 0.3], [0.9, 0.7]]
    assert pixels(figures.attention_profile({"off": off, "on": on}, 0.05)).ndim == 3
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].lines}
    np.testing.assert_allclose(lines["memory off"], [0.2, 0.6])
    np.testing.assert_allclose(lines["memory on"], [0.2, 0.8])
    np.testing.assert_allclose(lines["uniform attention"], [0.05, 0.05])
    points = [list(line.get_ydata()) for line in drawn[0].axes[0].lines if line.get_marker() == "."]
    assert points == [*off, *on]
    for modes in ({}, {"off": off, "on": on[:1]}):
        with pytest.raises(ValueError, match="layers; one number"):
            figures.attention_profile(modes, 0.05)


def test_loss_curves_are_an_image_of_their_own():
    curve = [
        {"step": i, "loss/memory_on": 1.0 / (i + 1), "loss/memory_off": None} for i in range(5)
    ]
    assert pixels(figures.loss_curves({"mdlm": curve, "memdlm": curve[:3]})).ndim == 3
