"""What the tests on the tiny denoiser share."""

import pytest

from tests.memory import tiny


@pytest.fixture(scope="module")
def wide():
    """64-bit types for a whole module."""
    with tiny.float64():
        yield


@pytest.fixture(scope="module")
def theta(wide):
    """Parameters of the tiny denoiser in float64."""
    return tiny.MODEL.init(0)
