"""Talk to a model folder in the terminal.

    python -m experiments.chat --config.model=MODEL --memory
    python -m experiments.chat --config=experiments/configs/chat.py:llada2_1_quality ...

The second form takes a published sampler's settings, as ``configs/generate.py`` does.
``--memory`` is short for ``--config.memory.enabled=True``: every turn's prompt is written into
memory first, with the settings that the model was trained with; ``--config.memory.steps=4`` and the
like change them.
"""

from ml_collections import config_dict

from experiments import _decode, _memory, _model


def get_config(sampler: str = "") -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.model = ""
    config.seed = 0
    config.max_length = 0
    config.dtype = "float32"
    config.base = config_dict.placeholder(str)
    config.under = ""
    config.export = ""
    config.pause = 0.03

    if sampler:
        config.decode = _decode.settings(sampler)
    else:
        config.decode = _decode.settings(length=32, block_length=8, steps=0)

    config.distributed = _model.distributed_defaults()  # Must stay as it is: one process.

    # None: as the model was trained.
    config.memory = _memory.changes()
    config.memory.enabled = False
    return config
