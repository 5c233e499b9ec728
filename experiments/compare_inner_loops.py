"""Fine-tune with several inner loops and seeds, and compare their held-out losses.

    python -m experiments.compare_inner_loops --config=experiments/configs/compare_inner_loops.py

Every variant is a set of changes to ``finetune.memory``; with one seed all variants take the same
batches with the same masks from the same start. Losses are those of the validation split after the
last step, memory on and off, so nothing was selected on them. Writes ``results.json`` and
``table.md``; running it again takes up where it stopped.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats
from ml_collections import config_dict

from experiments import _cli, finetune
from experiments.finetune import FinetuneConfig
from memdlm_jax import storage
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.progress import Progress
from memdlm_jax.training.sharding import MeshConfig

logger = logging.getLogger(__name__)

LOSSES = ("memory_off", "memory_on")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """All settings of a comparison.

    Attributes:
        output: folder of the runs and of the table.
        finetune: what all runs share; output and seed of its ``train`` are filled in.
        variants: (name, memory settings); the first is the one that others are compared with.
        seeds: seeds of training: masks, phi_0, start of a learned inner loop, and data order.
    """

    output: str
    finetune: FinetuneConfig
    variants: tuple[tuple[str, MemoryConfig], ...]
    seeds: tuple[int, ...]

    def __post_init__(self):
        if not self.output:
            raise ValueError("output='' must name a folder")
        names = [name for name, _ in self.variants]
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"variants={names} must be two or more different names")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds={self.seeds} must be different numbers, at least one")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds} must be at least 0")
        for field, value in (
            ("train.validate_every", self.finetune.train.validate_every),
            ("validation_batches", self.finetune.validation_batches),
        ):
            if not value:
                raise ValueError(f"finetune.{field}=0 must be at least 1: nothing is compared")


def from_config_dict(config: config_dict.ConfigDict) -> CompareConfig:
    """Build the settings; a variant holds changes to ``finetune.memory``.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    tuning, output = settings["finetune"], settings["output"]
    memory = dict(tuning["memory"])
    if memory.pop("enabled", True) is not True:
        raise ValueError("config.finetune.memory.enabled must be True: variants have a memory")
    for field, default in (("output", ""), ("seed", 0)):
        if tuning["train"].setdefault(field, default) != default:
            raise ValueError(
                f"config.finetune.train.{field}={tuning['train'][field]!r} must be {default!r}: "
                "every run has its own"
            )
    _cli.drop_disabled(tuning, "mesh", MeshConfig)
    tuning |= {"memory": memory, "train": tuning["train"] | {"output": output or "?"}}
    variants = []
    for variant in settings["variants"]:
        if len(variant) != 2:
            raise ValueError(f"config.variants has {variant!r}; it must be (name, changes)")
        name, changes = variant
        built = _cli.build(MemoryConfig, memory | dict(changes), f"config.variants.{name}")
        variants.append((name, built))
    return _cli.build(CompareConfig, settings | {"variants": tuple(variants)})


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train what is not yet trained, and write what the runs ended with."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in config.variants}
    with Progress("comparison", len(config.seeds) * len(config.variants), "run") as bar:
        for seed in config.seeds:
            for name, memory in config.variants:
                with bar.doing(f"training {name}, seed {seed}"):
                    found[name].append(last_validation(config, name, memory, seed))
                bar.update()
                logger.info("%s, seed %d: %s", name, seed, found[name][-1])
    results = {
        "config": dataclasses.asdict(config),
        "losses": found,
        "differences": differences(found),
    }
    folder = storage.path(config.output)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    table = as_table(results)
    (folder / "table.md").write_text(table)
    print(table)
    return results


def last_validation(
    config: CompareConfig, name: str, memory: MemoryConfig, seed: int
) -> dict[str, float]:
    """Validation losses after the last step of one run, trained now or before."""
    folder = storage.path(config.output) / f"{name}-seed{seed}"
    train = dataclasses.replace(config.finetune.train, output=str(folder), seed=seed)
    pipeline = dataclasses.replace(config.finetune.pipeline, seed=seed)
    one = dataclasses.replace(config.finetune, memory=memory, train=train, pipeline=pipeline)
    result = finetune.finetune(one)
    if not result.finished:
        sys.exit(f"stopped after step {result.state.step}; run the same command to go on")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line.get("validation/loss/memory_off") is not None]
    return {key: measured[-1][f"validation/loss/{key}"] for key in LOSSES}


def differences(found: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Every variant less the first, seed by seed: mean, 95 % interval over seeds (Student's t)."""
    first, *others = found
    result: dict[str, dict[str, Any]] = {}
    for name in others:
        pairs = zip(found[name], found[first], strict=True)
        gaps = [{key: a[key] - b[key] for key in LOSSES} for a, b in pairs]
        result[name] = {key: _with_interval([gap[key] for gap in gaps]) for key in LOSSES}
    return result


def _with_interval(values: list[float]) -> dict[str, Any]:
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"values": values, "mean": mean, "half_width": None}
    error = float(np.std(values, ddof=1)) / n**0.5
    return {"values": values, "mean": mean, "half_width": scipy.stats.t.ppf(0.975, n - 1) * error}


def as_table(results: Mapping[str, Any]) -> str:
    """Markdown: losses by variant, and each variant against the first."""
    seeds = results["config"]["seeds"]
    lines = [
        f"Validation loss after the last step, nats per maskable token, {len(seeds)} seeds "
        "(mean ± standard deviation). Memory on has seen its targets: compare it with nothing but "
        "itself.",
        "",
        "| inner loop | memory off | memory on |",
        "|---|---|---|",
    ]
    for name, runs in results["losses"].items():
        cells = []
        for key in LOSSES:
            values = [run[key] for run in runs]
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.4f} ± {deviation:.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(iter(results["losses"]))
    lines += ["", f"| less {first}, seed by seed | memory off | memory on |", "|---|---|---|"]
    for name, gaps in results["differences"].items():
        cells = []
        for key in LOSSES:
            width = gaps[key]["half_width"]
            interval = "one seed" if width is None else f"± {width:.4f} (95 %)"
            cells.append(f"{gaps[key]['mean']:+.4f} {interval}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(config: CompareConfig) -> None:
    """Run from the command line."""
    compare(config)


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/compare_inner_loops.py")
