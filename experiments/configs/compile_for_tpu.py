"""What a training or decoding step of a published model would take on a pod.

    python -m experiments.compile_for_tpu --topology=v5e:16x16 \
        --config=experiments/configs/compile_for_tpu.py:llada_moe_7b_a1b

Trains all parameters with memory by first-order meta-gradients, 4096 tokens a row, all of them
targets. Other settings are a matter of ``--config.lora.enabled=True``,
``--config.memory.meta_gradient=exact`` or ``--config.program=decode``.
"""

from ml_collections import config_dict

from experiments import _decode, _memory, _model


def get_config(model: str = "llada_moe_7b_a1b") -> config_dict.ConfigDict:
    """All settings; names and meaning are those of the dataclasses."""
    config = config_dict.ConfigDict()
    config.model = model
    config.topology = "v5e:16x16"
    config.program = "train"
    config.rows = 0
    config.length = 4096
    config.capacity = 0
    config.base = "bfloat16"
    config.remat = "full"
    config.vocab_chunk = 0
    config.effort = 0.0
    config.json = ""
    config.hlo = ""

    config.mesh = _model.mesh_defaults()
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.memory = _memory.defaults()
    config.memory.enabled = True
    config.lora = _model.lora_defaults()
    config.lora.enabled = False
    config.optimizer = {"total_steps": 1000, "accumulation": 1}
    config.decode = _decode.settings(length=512, block_length=32, cache="dual")
    return config
