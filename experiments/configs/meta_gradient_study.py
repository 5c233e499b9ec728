"""The three meta-gradients compared on the shipped denoiser and on the quickstart's MemDLM.

python -m experiments.meta_gradient_study --config=experiments/configs/meta_gradient_study.py
"""

from ml_collections import config_dict

from experiments.configs import finetune_needles


def get_config() -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.output = "runs/meta_gradient_study"
    config.models = (
        ("shipped", "memdlm_jax/assets/tiny"),
        ("fine-tuned", "NEWEST:runs/quickstart/memdlm-*/best"),
    )
    config.batches = 8
    config.directions = 20
    config.checked = 3
    config.seed = 0

    config.memory = finetune_needles.get_config().memory
    for varied in ("enabled", "meta_gradient"):
        del config.memory[varied]
    config.memory.rank = 8
    config.memory.alpha = 16.0

    config.data = config_dict.ConfigDict()
    config.data.directory = "runs/meta_gradient_study/data"
    config.data.seed = 0
    config.data.encode = {"max_length": 192, "long_prompt": "truncate_left"}
    config.data.sources = (
        {
            "kind": "needles",
            "needles": {"length": 192, "num_keys": 4},
            "episodes": (64, 64, 0),
        },
    )
    config.pipeline = {"buckets": (192,), "rows_per_batch": 8, "seed": 0}
    config.schedule = {"minimum_time": 1e-3, "sampling": "low_discrepancy"}
    return config
