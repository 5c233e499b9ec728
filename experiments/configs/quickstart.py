"""From the shipped denoiser to a report in about ten minutes on two CPU cores.

    python -m experiments.quickstart --config=experiments/configs/quickstart.py

``--config.finetune.train.steps=20 --config.evaluate.needles.episodes=20`` is a quick look.
"""

from ml_collections import config_dict

from experiments.configs import evaluate, finetune_needles


def get_config() -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.output = "runs/quickstart"
    config.model = ""
    config.conversations = 300

    config.memory = finetune_needles.get_config().memory
    del config.memory["enabled"]
    config.memory.rank = 8
    config.memory.alpha = 16.0

    config.finetune = finetune_needles.get_config()
    for filled in ("init", "memory"):
        del config.finetune[filled]
    config.finetune.data.directory = "runs/quickstart/data"
    config.finetune.data.encode = {"max_length": 320, "long_prompt": "truncate_left"}
    config.finetune.data.sources = (
        {
            "kind": "needles",
            "needles": {"length": 192, "num_keys": 4},
            "episodes": (2000, 100, 0),
        },
        {
            "kind": "needles",
            "needles": {"length": 320, "num_keys": 8},
            "episodes": (2000, 100, 0),
        },
    )
    config.finetune.pipeline.buckets = (192, 320)
    config.finetune.pipeline.rows_per_batch = 8
    config.finetune.validation_batches = 8
    config.finetune.train.steps = 200
    config.finetune.train.log_every = 5
    config.finetune.train.validate_every = 40
    config.finetune.train.save_every = 80

    config.evaluate = evaluate.get_config()
    for filled in ("output", "memory", "mdlm", "memdlm"):
        del config.evaluate[filled]
    config.evaluate.needles.lengths = (384, 504)
    config.evaluate.needles.num_keys = (12,)
    config.evaluate.needles.episodes = 200
    # Questions of another seed than those that the settings above were chosen on.
    config.evaluate.needles.seed = 1
    config.evaluate.likelihood.samples = 4
    config.evaluate.held_out.rows = 150
    return config
