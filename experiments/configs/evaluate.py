"""Compare an MDLM and a MemDLM on needles and on held-out conversations.

    python -m experiments.evaluate --config=experiments/configs/evaluate.py \
        --config.mdlm=MODEL --config.memdlm=MODEL

``--config.held_out.path=TEST.jsonl --config.held_out.split=all`` reads the whole of a file that is
not trained on; otherwise the test share of its groups, 5 %.

``--config.needles.enabled=False`` and the like leave a part out; ``tasks`` (RULER and BABILong),
``exposure`` (exposure bias) and ``retrieval`` (what memory alone knows) are out until they are
``enabled``. Running the command again takes up where it stopped.
"""

import typing
from typing import Any

from ml_collections import config_dict

from experiments import _decode, _memory, _model
from memdlm_jax.evaluation.tasks import Variant


def get_config() -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.output = "runs/evaluate"
    config.mdlm = ""
    config.memdlm = ""
    config.source = {"kind": "chitchat", "path": ""}
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
    # The length of an answer is the task's.
    config.task_decode = _decode.settings(block_length=1, steps=0)
    del config.task_decode.length
    config.reply = _decode.settings(length=32, block_length=8, steps=0)

    config.likelihood = config_dict.ConfigDict()
    config.likelihood.enabled = True
    config.likelihood.samples = 8
    config.likelihood.seed = 0

    # The paper's tasks and lengths.
    config.tasks = config_dict.ConfigDict()
    config.tasks.enabled = False
    config.tasks.names = ("niah_multivalue", "ruler_vt", "ruler_cwe", "babilong_qa1")
    config.tasks.lengths = (4096, 8192)
    config.tasks.samples = 100
    config.tasks.seeds = (0,)
    config.tasks.depths = ()
    # None: the task's definition.
    kinds = typing.get_type_hints(Variant)
    config.tasks.variant = {
        name: config_dict.placeholder(_kind(hint)) for name, hint in kinds.items()
    }
    for name in ("babilong", "squad", "hotpot"):
        config.tasks[name] = ""

    config.exposure = {"enabled": False, "steps": 48, "seed": 0, "resamples": 2000}

    config.retrieval = config_dict.ConfigDict()
    config.retrieval.enabled = False
    config.retrieval.lengths = (192,)
    config.retrieval.num_keys = (4,)
    config.retrieval.episodes = 100
    config.retrieval.seed = 0
    config.retrieval.written = "prompt"
    config.retrieval.attention = True
    config.retrieval.task = dict(config.needles.task)
    config.retrieval.task.split = config.get_ref("split")

    config.distributed = _model.distributed_defaults()
    config.held_out = {"path": "", "split": "", "rows": 200, "max_length": 256, "samples": 3}
    return config


def _kind(hint: Any) -> type:
    """The type of an optional setting; of a choice among words it is that of words."""
    (kind,) = (k for k in typing.get_args(hint) if k is not type(None))
    return str if typing.get_origin(kind) is typing.Literal else kind
