"""Fine-tune a small model on needle episodes and dialogues, with the Parametric Memory.

    python -m experiments.finetune --config=experiments/configs/finetune_needles.py \
        --config.init=MODEL --config.train.output=runs/needles_memdlm

The plain MDLM on the same batches with the same masks:

    python -m experiments.finetune --config=experiments/configs/finetune_needles.py \
        --config.init=MODEL --config.train.output=runs/needles_mdlm --config.memory.enabled=False
"""

from ml_collections import config_dict

from experiments import _memory, _model


def get_config() -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.init = ""
    config.dtype = "float32"
    config.base = "float32"
    config.under = ""
    config.remat = "none"
    config.vocab_chunk = 0
    config.validation_batches = 16

    config.data = config_dict.ConfigDict()
    config.data.directory = "cache/data"
    config.data.seed = 0
    config.data.encode = {"max_length": 256, "long_prompt": "truncate_left"}
    config.data.sources = (
        {
            "kind": "needles",
            "needles": {"length": 128, "num_keys": 2},
            "episodes": (4000, 200, 200),
        },
        {
            "kind": "needles",
            "needles": {"length": 256, "num_keys": 4},
            "episodes": (4000, 200, 200),
        },
        {"kind": "chitchat"},
    )

    config.pipeline = config_dict.ConfigDict()
    config.pipeline.buckets = ()  # the fewest with at most max_padding
    config.pipeline.max_padding = 0.08
    config.pipeline.max_buckets = 16
    config.pipeline.bucket_multiple = 8
    config.pipeline.rows_per_batch = 16
    config.pipeline.seed = 0
    config.pipeline.supervise_padding = False

    config.memory = _memory.defaults()
    config.memory.enabled = True

    config.lora = _model.lora_defaults()
    config.lora.enabled = False

    config.mesh = _model.mesh_defaults()
    config.mesh.enabled = False

    config.distributed = _model.distributed_defaults()

    config.schedule = config_dict.ConfigDict()
    config.schedule.name = "linear"  # or "cosine", or "my_module:MySchedule"
    config.schedule.minimum_time = 1e-3
    config.schedule.sampling = "iid"

    config.loss = {"weighting": "scheduler", "normalisation": "token", "padding": "masked"}

    config.train = config_dict.ConfigDict()
    config.train.output = ""
    config.train.steps = 2000
    config.train.seed = 0
    config.train.log_every = 20
    config.train.validate_every = 200
    config.train.save_every = 500
    config.train.keep_last = 2
    config.train.profile_steps = 0
    config.train.peak_flops = 0.0
    config.train.count_flops = True

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.total_steps = config.train.get_ref("steps")
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.schedule = "cosine"
    config.optimizer.end_fraction = 0.0
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = config_dict.FieldReference(1.0, object)  # a float or None
    config.optimizer.inner_scale = 100.0
    config.optimizer.accumulation = 1
    return config
