"""The table of docs/pods.md."""

import dataclasses
import json

from benchmarks import pods
from experiments import compile_for_tpu
from experiments.configs.compile_for_tpu import get_config
from memdlm_jax.training import ahead_of_time
from memdlm_jax.training.ahead_of_time import Memory, Report
from memdlm_jax.training.hlo import Collective, Costs
from memdlm_jax.training.topology import CHIPS


def test_a_report_becomes_a_line(tmp_path, capsys):
    config = get_config("llada_8b")
    config.lora.enabled, config.mesh.tensor = True, 4
    settings = compile_for_tpu.from_config_dict(config)
    sent = Collective("all-gather", 64, 64, 3, 5 * 2.0**30)
    costs = Costs(394e12, 819e9, (sent,))
    mesh = {"data": 1, "fsdp": 64, "expert": 1, "sequence": 1, "tensor": 4}
    memory = Memory(2**30, 2**31, 0, 3 * 2**30)
    line = ahead_of_time.roofline(CHIPS["v5e"], costs, model_flops=197e12)
    report = Report("v5e:16x16", mesh, memory, costs, 256 * 197 * 10**12, None, line, 0, 1.0, 9.0)
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"config": dataclasses.asdict(settings)} | report.as_dict()))
    pods.main([str(file)])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| `llada_8b` | LoRA, `first_order` | v5e:16x16 (fsdp 64 x tensor 4) | 64 | 3.00 of 16.0 | "
        "197.00 | 394.00 | 763 | 5.00 | 2.000 / 1.000 / 0.027 | 50.0% | 9 |"
    )
