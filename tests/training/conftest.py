"""Compile quickly and once: these tests are about what is computed, not about how fast."""

import jax
import pytest

QUICK = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(autouse=True, scope="package")
def environment(tmp_path_factory):
    """Settings of JAX, here and (as environment variables) in the processes that tests start."""
    settings = QUICK | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    settings["jax_default_matmul_precision"] = "highest"
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
