"""Conversations and needles as rows of at most 512 tokens, with the shipped tokenizer.

    python -m experiments.prepare_data --config=experiments/configs/prepare_data.py

Own data: ``--config.sources="({'kind': 'jsonl', 'path': 'my.jsonl'},)"``; the line format stands in
docs/data.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings; the fields are those of ``memdlm_jax.data.prepare.DataConfig``."""
    config = ConfigDict()
    config.directory = "cache/data"
    config.tokenizer = "memdlm_jax/assets/tiny/tokenizer.json"
    config.vocab_size = 4096
    config.seed = 0
    config.encode = ConfigDict({"max_length": 512, "long_prompt": "drop", "long_response": "drop"})
    config.sources = (
        {"kind": "chitchat"},
        {"kind": "needles", "needles": {"length": 256, "num_keys": 4}},
    )
    return config
