"""Answer prompts with a model folder.

    python -m experiments.generate --config=experiments/configs/generate.py \
        --config.model=MODEL --config.prompt="How are you?"

``--config.memory.enabled=True`` writes each prompt into memory first, with the settings that the
model was trained with; ``--config.memory.steps=4`` and the like change them.
"""

from ml_collections import config_dict

from experiments import _memory


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
    config.base = config_dict.placeholder(str)
    config.under = ""
    config.decode = {"length": 32, "block_length": 8, "steps": 32, "temperature": 0.0}

    # None: as the model was trained.
    config.memory = _memory.changes()
    config.memory.enabled = False
    return config
