"""The three meta-gradients compared on the shipped denoiser and on the quickstart's MemDLM.

    python -m experiments.meta_gradient_study --config=experiments/configs/meta_gradient_study.py

Measured so (2 min 42 s; 8 batches of 8 rows, 192 tokens, one seed of draws; float64; mean ±
standard deviation over batches):

                                angle, degrees   |g - exact| / |exact|   worst tensor's direction
    shipped     first_order       1.3 ± 0.8           2.8 ± 1.6 %               5 ± 5 %
                trunk_stopped     1.3 ± 0.8           2.7 ± 1.5 %               4 ± 5 %
    fine-tuned  first_order       5.0 ± 5.0          18.7 ± 19.4 %             35 ± 37 %
                trunk_stopped     5.1 ± 5.0          18.2 ± 18.9 %             23 ± 27 %

The exact gradient equals central differences to all nine printed digits. ``trunk_stopped`` is exact
in the head, where ``first_order`` is off by 21 to 29 % on the fine-tuned denoiser, and no better in
the trunk, where most parameters are. A few batches make most of the error.
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
    config.schedule = {"name": "linear", "minimum_time": 1e-3, "sampling": "low_discrepancy"}
    return config
