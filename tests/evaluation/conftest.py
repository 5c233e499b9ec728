"""A tiny denoiser, a tokenizer and haystack sentences that need no network."""

import jax
import pytest

from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from memdlm_jax.evaluation.systems import three_systems
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

WORDS = ("the", "cat", "sat", "on", "mats", "and", "saw", "how", "every", "green", "bird", "flew")


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Forty different sentences without digits."""
    return [" ".join(WORDS[i % 7 : i % 7 + 5 + i % 4]).capitalize() + "." for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer(sentences) -> Tokenizer:
    """A byte-level BPE with whole numbers."""
    task = "One of the special magic numbers for key is: mentioned in the provided text"
    return train_tokenizer([*sentences, *[task] * 5], 1_500)


@pytest.fixture(scope="session")
def denoiser(tokenizer) -> LLaDA:
    return LLaDA(
        LLaDAConfig(
            vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, num_kv_heads=2,
            hidden_features=24, mask_token_id=tokenizer.mask_id, max_length=256,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def systems(denoiser):
    """Random weights, large enough for answers that depend on the prompt."""
    thetas = [jax.jit(denoiser.init)(jax.random.key(seed)) for seed in (0, 1)]
    thetas = jax.tree.map(lambda x: 3 * x, thetas)
    # One step on one module: what is tested here compiles in a fraction of the time.
    memory = MemoryConfig(
        steps=1, rank=4, alpha=8.0, layer_fraction=0.5, learning_rate=1.0,
        target_modules=("mlp/up_proj",),
    )  # fmt: skip
    return three_systems(denoiser, *thetas, memory)
