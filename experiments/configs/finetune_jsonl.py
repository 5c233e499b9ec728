"""Fine-tune on your own examples, with the paper's outer settings (section 5) for all parameters.

    python -m experiments.finetune --config=experiments/configs/finetune_jsonl.py:ROWS.jsonl \
        --config.init=MODEL --config.train.output=runs/own --config.train.steps=STEPS

``ROWS.jsonl`` holds one object a line, with ``prompt`` and ``response`` or with ``messages`` (see
docs/data.md). A model that is meant for fewer than 4,096 tokens needs a smaller
``--config.data.encode.max_length=N``. The paper takes LongAlpaca-12k up to 4,096 tokens for 5
epochs; the script prints the steps of an epoch, the lengths of its batches and their padding.
"""

from ml_collections import config_dict

from experiments.configs import finetune_needles


def get_config(rows: str = "rows.jsonl") -> config_dict.ConfigDict:
    """The settings of ``finetune_needles`` with other data, batches and optimiser."""
    config = finetune_needles.get_config()
    config.dtype = "bfloat16"
    config.remat = "full"
    config.vocab_chunk = 0

    config.data.sources = ({"kind": "jsonl", "path": rows},)
    config.data.encode.max_length = 4096
    config.data.encode.long_prompt = "drop"

    config.optimizer.learning_rate = 2e-5
    config.optimizer.accumulation = 8
    return config
