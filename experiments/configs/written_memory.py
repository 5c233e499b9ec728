"""Needles that the model reads once and answers when the text is gone, in stages.

    python -m experiments.written_memory --config=experiments/configs/written_memory.py \
        --config.init=memdlm_jax/assets/tiny --config.train.output=runs/written_memory

The settings were found on the validation split. A number behind the file's name keeps only so many
stages: ``--config=experiments/configs/written_memory.py:2``.
"""

from ml_collections import config_dict

from experiments import _memory


def get_config(stages: str = "3") -> config_dict.ConfigDict:
    """All settings of the run; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.init = "memdlm_jax/assets/tiny"
    config.model = ""
    config.probe = 16
    config.episodes = 250
    config.least = 1.0
    config.visible = {"rows": 6, "length": 384, "keys": (4, 8, 12), "needles": 1000}

    config.memory = _memory.defaults()
    config.memory.masking = "cover"
    config.memory.steps = 6
    config.memory.pieces = "parallel"
    config.memory.prompt_chunk = 80
    config.memory.normalisation = "sum"
    config.memory.learning_rate = 0.07
    config.memory.clip = "none"
    config.memory.adapter = "full"
    config.memory.target_modules = ("down_proj",)
    config.memory.layer_fraction = 0.2
    config.memory.meta_gradient = "exact"
    config.memory.learned = ("rates",)

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.end_fraction = 0.1
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.inner_scale = 10.0

    config.train = config_dict.ConfigDict()
    config.train.output = "runs/written_memory"
    config.train.seed = 0
    config.train.log_every = 7  # meets all kinds of batches in turn
    config.train.validate_every = 100
    config.train.save_every = 200
    config.train.count_flops = False

    def needles(keys, tokens, segments, texts, questions=4, **batch):
        task = {"kind": "needles", "keys": keys, "tokens": tokens, "questions": questions}
        sizes = {"texts": texts, "questions": questions, "segment": 80, "segments": segments}
        return {"task": task, "batch": sizes | {"length": 32} | batch}

    def told(kind, texts, questions, task=None, **batch):
        sizes = {"texts": texts, "questions": questions, "segment": 80, "segments": 2}
        task = {"kind": kind, "questions": questions} | (task or {})
        return {"task": task, "batch": sizes | {"length": 32} | batch}

    def facts(**batch):
        return told("conversation", 12, 4, {"keys": 4, "tokens": 100}, **batch)

    four = needles(4, 0, 1, 16)
    eight, sixteen = needles(8, 0, 2, 8, 8), needles(16, 0, 5, 4, 16)
    short, middle, long = needles(4, 192, 4, 6), needles(4, 512, 9, 3), needles(4, 2048, 32, 1)
    stories = told("qa1", 16, 2)
    config.stages = (
        # Answers alone, then all tokens: needles first, which are learnt fastest.
        {"steps": 320, "parts": (needles(4, 0, 1, 16, focus=14.0, hold=140, ramp=180),)},
        {
            "steps": 900,
            "parts": (
                told("qa1", 16, 2, focus=14.0, hold=450, ramp=300),
                facts(focus=14.0, hold=450, ramp=300),
                told("qa1", 16, 2, focus=14.0, hold=450, ramp=300),
                four,
            ),
            "visible": 8,
        },
        # All tasks and lengths.
        {
            "steps": 900,
            "parts": (
                four,
                stories,
                eight,
                sixteen,
                stories,
                short,
                facts(),
                middle,
                stories,
                long,
            ),
            "visible": 8,
        },
    )
    config.evaluate = (four, eight, sixteen, short, middle, long, stories, facts())
    config.stages = config.stages[: int(stages)]
    config.held_out = (four, short, stories, facts())
    config.distributed = {}
    return config
