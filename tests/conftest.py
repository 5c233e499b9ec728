"""Settings every test shares."""

import gc
import os

# Half the time of compilation, and less again by not cutting programs up for cores that other
# tests use. XLA reads its flags once, at its first use, so they are set before all else. They are
# added to flags that are given (``XLA_FLAGS=--xla_cpu_max_isa=AVX2 make test``), once: workers and
# processes that a test starts inherit them and must compile alike.
_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if _FLAGS not in (_given := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {_given}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

pytest_plugins = ["tests.buckets"]

jax.config.update("jax_default_matmul_precision", "highest")
# Programs compile in half the time: tests are about what is computed, not about how fast.
jax.config.update("jax_disable_most_optimizations", True)
# A tenth of the time goes to looking for cycles while JAX traces; a file's are found at its end.
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Drop a file's programs after it: each maps memory, and a process may map only so often.

    A worker that kept them all had some 60,000 mappings near the end of the suite, where Linux
    allows 65,530 and XLA dies of one more, and held several gigabytes.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def float64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
