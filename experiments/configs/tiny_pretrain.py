"""The shipped denoiser: 1.5 M parameters, context 512, pretrained on two CPU cores in two stages.

Retrieval first, then running text with a quarter of needle questions and a falling learning rate:

    python -m experiments.pretrain --config=experiments/configs/tiny_pretrain.py
    python -m experiments.pretrain --config=experiments/configs/tiny_pretrain.py:text

Running a command again resumes it. The result of the shipped weights, with seconds, tokens and
seed, stands in memdlm_jax/assets/tiny/README.md.
"""

from ml_collections import ConfigDict, FieldReference

from experiments import _model


def get_config(stage: str = "retrieval") -> ConfigDict:
    """Settings of a stage; the sections are fields of ``experiments.pretrain.PretrainConfig``."""
    if stage not in ("retrieval", "text"):
        raise ValueError(f"stage {stage!r} must be 'retrieval' or 'text'")
    config = _retrieval()
    if stage == "text":
        config.start = "runs/pretrain/model"
        config.tokenizer = "runs/pretrain/tokenizer.json"
        config.train.output = "runs/pretrain_text"
        config.train.steps = 1500
        config.data.needle_share = 0.25
        config.data.needle_only_batches = 0
        config.data.seed = 1
        config.optimizer.learning_rate = 1.5e-3
        config.optimizer.warmup_fraction = 0.02
        config.optimizer.schedule = "cosine"
        config.optimizer.total_steps = 1500
    return config


def _retrieval() -> ConfigDict:
    config = ConfigDict()
    config.start = ""
    config.tokenizer = ""
    config.validation_batches = 12
    config.model = ConfigDict(
        {
            "vocab_size": 4096,
            "width": 128,
            "num_layers": 5,
            "num_heads": 4,
            "num_kv_heads": 4,
            "hidden_features": 344,
            "mask_token_id": 1,
            "max_length": 512,
            "rope_theta": 500_000.0,
            "tied": True,
        }
    )
    config.induction = ConfigDict({"enabled": True})
    config.data = ConfigDict(
        {
            "seed": 0,
            "source": {"kind": "chitchat_and_topics", "path": ""},
            "text_length": 256,
            "text_rows": 16,
            "needle_lengths": (96, 128, 192, 320, 512),
            "needle_tokens": 3072,
            "needle_share": 0.5,
            "needle_only_batches": 600,
            "max_keys": 8,
        }
    )
    config.schedule = ConfigDict(
        {"name": "linear", "minimum_time": 0.1, "sampling": "low_discrepancy"}
    )
    config.optimizer = ConfigDict(
        {
            "total_steps": 100_000,
            "learning_rate": 1e-3,
            "warmup_fraction": 0.001,
            "schedule": "constant",
            "beta2": 0.98,
            "clip_norm": FieldReference(1.0, object),  # a float or None
        }
    )
    config.train = ConfigDict(
        {
            "output": "runs/pretrain",
            "steps": 1097,
            "seed": 0,
            "log_every": 50,
            "validate_every": 500,
            "save_every": 250,
            "profile_steps": 0,
            "peak_flops": 0.0,
            "count_flops": True,
        }
    )
    config.mesh = ConfigDict(
        {"enabled": False, "data": -1, "fsdp": 1, "tensor": 1, "expert": 1, "sequence": 1}
    )
    config.distributed = _model.distributed_defaults()
    config.probe = ConfigDict(
        {
            "task": {"split": "validation"},
            "lengths": (192, 320),
            "num_keys": (4,),
            "episodes": 100,
        }
    )
    return config
