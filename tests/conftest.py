"""Settings every test shares."""

import os

# Halves the time of compilation. XLA reads it once, at its first use, so it stands before all
# else: a run in this process and one in a process that a test starts must compile alike.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

pytest_plugins = ["tests.buckets"]

jax.config.update("jax_default_matmul_precision", "highest")
# Programs compile in half the time: tests are about what is computed, not about how fast.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Drop a file's programs after it: each maps memory, and a process may map only so often.

    A worker that kept them all had some 60,000 mappings near the end of the suite, where Linux
    allows 65,530 and XLA dies of one more, and held several gigabytes.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def float64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
