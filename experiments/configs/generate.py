"""Answer prompts with a model folder.

    python -m experiments.generate --config=experiments/configs/generate.py \
        --config.model=MODEL --config.prompt="How are you?"

``--config.memory.enabled=True`` writes each prompt into memory first, as suits a model that was
trained with the same memory.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.model = ""
    config.prompt = ""
    config.input = ""
    config.output = ""
    config.history = False
    config.seed = 0
    config.max_length = 0
    config.batch_size = 8
    config.dtype = "float32"
    config.decode = {"length": 32, "block_length": 8, "steps": 32, "temperature": 0.0}

    config.memory = config_dict.ConfigDict()
    config.memory.enabled = False
    config.memory.steps = 2
    config.memory.learning_rate = 0.1
    config.memory.clip_norm = 1.0
    config.memory.pre_anchor_scale = 1.5
    config.memory.adapter = "lora"
    config.memory.rank = 32
    config.memory.alpha = 64.0
    config.memory.layer_fraction = 0.1
    config.memory.target_modules = ("mlp",)
    config.memory.prompt_mask_ratio = 0.2
    return config
