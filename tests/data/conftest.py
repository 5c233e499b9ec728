"""A small tokenizer and filler text that need no network."""

import pydoc_data.topics
import re

import pytest

from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Plain English sentences from the standard library's documentation."""
    text = " ".join(
        pydoc_data.topics.topics[name] for name in ("for", "function", "import", "with")
    )
    found = re.findall(r"[A-Z][a-z][a-z ,]+\.", re.sub(r"\s+", " ", text))
    return [sentence for sentence in found if len(sentence) > 20]


@pytest.fixture(scope="session")
def tokenizer(sentences) -> Tokenizer:
    """A byte-level BPE of a few hundred merges."""
    task = "One of the special magic numbers for key is: mentioned in the provided text"
    return train_tokenizer([*sentences, *[task] * 5], 2_000)
