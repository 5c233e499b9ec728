"""Settings every test shares."""

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def float64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
