"""Answer prompts with a model folder.

    python -m experiments.generate --config=experiments/configs/generate.py \
        --config.model=MODEL --config.prompt="How are you?"
    python -m experiments.generate --config=experiments/configs/generate.py:llada2_1_quality ...

The second form takes a published sampler's settings: llada, dllm, llada2, llada2_1_quality,
llada2_1_speed, dream, fast. ``--config.memory.enabled=True`` writes each prompt into memory first,
with the settings that the model was trained with; ``--config.memory.steps=4`` and the like change
them.
"""

from ml_collections import config_dict

from experiments import _decode, _memory, _model


def get_config(sampler: str = "") -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.model = ""
    config.prompt = ""
    config.input = ""
    config.context = ""
    config.show_context = True
    config.save_memory = ""
    config.load_memory = ""
    config.output = ""
    config.history = False
    config.seed = 0
    config.max_length = 0
    config.batch_size = 8
    config.dtype = "float32"
    config.base = config_dict.placeholder(str)
    config.under = ""
    if sampler:
        config.decode = _decode.settings(sampler)
    else:
        config.decode = _decode.settings(length=32, block_length=8, steps=0)

    config.distributed = _model.distributed_defaults()

    # None: as the model was trained.
    config.memory = _memory.changes()
    config.memory.enabled = config_dict.placeholder(bool)  # None: only with load_memory.
    return config
