"""Compare an MDLM and a MemDLM on needles and on held-out conversations.

    python -m experiments.evaluate --config=experiments/configs/evaluate.py \
        --config.mdlm=MODEL --config.memdlm=MODEL

``--config.held_out.path=TEST.jsonl --config.held_out.split=all`` reads the whole of a file that is
not trained on; otherwise the test share of its groups, 5 %.

``--config.needles.enabled=False`` and ``--config.likelihood.enabled=False`` leave a part out.
"""

from ml_collections import config_dict

from experiments import _decode, _memory


def get_config() -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.output = "runs/evaluate"
    config.mdlm = ""
    config.memdlm = ""
    config.haystack = ""
    config.split = "test"
    config.seed = 0
    config.max_length = 0
    config.batch_size = 8
    config.dtype = "float32"
    config.base = config_dict.placeholder(str)
    config.under = ""

    # None: as the model was trained.
    config.memory = _memory.changes()

    config.needles = config_dict.ConfigDict()
    config.needles.enabled = True
    config.needles.lengths = (192, 320)
    config.needles.num_keys = (2, 4)
    config.needles.episodes = 200
    config.needles.seed = 0
    config.needles.task = {"split": config.get_ref("split"), "template": "ruler", "value_digits": 3}

    # From left to right: with a window longer than the answers of training, a model tends to put
    # the end of the answer into the last columns first, and then ends before the value.
    config.decode = _decode.settings(length=4, block_length=1, steps=0)
    config.reply = _decode.settings(length=32, block_length=8, steps=0)

    config.likelihood = config_dict.ConfigDict()
    config.likelihood.enabled = True
    config.likelihood.samples = 8
    config.likelihood.seed = 0

    config.held_out = {"path": "", "split": "", "rows": 200, "max_length": 256, "samples": 3}
    return config
