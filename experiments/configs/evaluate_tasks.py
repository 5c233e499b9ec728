"""RULER and BABILong tasks in small, for models of the quickstart's size.

    python -m experiments.evaluate --config=experiments/configs/evaluate_tasks.py \
        --config.mdlm=MODEL --config.memdlm=MODEL

Two tasks at three lengths: a needle among four in real text, and one among nothing but needles, on
the words of held-out keys, with values of three digits. Both are variants, told so in the results;
``experiments/configs/evaluate.py`` has the definitions.
"""

from ml_collections import config_dict

from experiments.configs import evaluate


def get_config() -> config_dict.ConfigDict:
    """Settings as in ``configs/evaluate.py``, with the tasks alone."""
    config = evaluate.get_config()
    config.output = "runs/evaluate_tasks"
    config.needles.enabled = False
    config.likelihood.enabled = False
    config.held_out.samples = 0
    config.batch_size = 16

    config.tasks.enabled = True
    config.tasks.names = ("niah_multikey_1", "niah_multikey_2")
    config.tasks.lengths = (256, 384, 512)
    config.tasks.samples = 100
    config.tasks.variant.max_new_tokens = 8
    config.tasks.variant.key_split = "test"
    config.tasks.variant.value_digits = 3
    return config
