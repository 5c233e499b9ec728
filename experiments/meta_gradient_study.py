"""How far the cheaper meta-gradients are from the exact one, on a given denoiser.

    python -m experiments.meta_gradient_study --config=experiments/configs/meta_gradient_study.py

Takes the same batches through ``first_order``, ``trunk_stopped`` and ``exact`` in float64, checks
the exact gradient by central differences along random directions, and writes ``results.json``,
``table.md`` and ``study.png`` to the output folder.
"""

import dataclasses
import functools
import glob
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import config_dict

from experiments import _cli, _model
from memdlm_jax import storage
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.pipeline import PipelineConfig, make_pipeline
from memdlm_jax.data.prepare import DataConfig, prepare
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.evaluation import gradients
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Batch, Theta

APPROXIMATE = gradients.MODES[:-1]


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """All settings of a study.

    Attributes:
        output: folder of table, plot and numbers.
        models: (name, model folder) of every denoiser to look at; ``NEWEST:PATTERN`` stands for
            the newest folder that matches.
        data: sources; each model's own tokenizer encodes them.
        pipeline: batches of the validation split.
        memory: the Parametric Memory; its meta-gradient is varied.
        schedule: masking of the outer loss.
        batches: batches to take.
        directions: random directions of the derivatives, per batch.
        checked: of these, how many are checked by central differences, on the first batch.
        seed: of masks, phi_0 and directions.
    """

    output: str
    models: tuple[tuple[str, str], ...]
    data: DataConfig
    pipeline: PipelineConfig
    memory: MemoryConfig
    schedule: Schedule
    batches: int = 8
    directions: int = 20
    checked: int = 3
    seed: int = 0

    def __post_init__(self):
        if not self.output:
            raise ValueError("output='' must name a folder")
        if not self.models:
            raise ValueError("models=() must name at least one model folder")
        for field in ("batches", "directions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.memory.learned:
            raise ValueError(f"memory.learned={self.memory.learned} must be (): it is not studied")
        if not 0 <= self.checked <= self.directions:
            raise ValueError(f"checked={self.checked} must lie in 0 .. directions")


def from_config_dict(config: config_dict.ConfigDict) -> StudyConfig:
    """Build the settings.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    return _cli.build(StudyConfig, config.to_dict())


def model_folder(where: str) -> Path:
    """The folder that an entry of ``models`` names.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not where.startswith("NEWEST:"):
        return storage.path(where)
    pattern = where.removeprefix("NEWEST:")
    found = sorted(map(Path, glob.glob(pattern)), key=lambda folder: folder.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no folder matches {pattern}; run the quickstart first, or name model folders in "
            "config.models"
        )
    return found[-1]


def study(config: StudyConfig) -> dict[str, Any]:
    """Measure every model and write what was found."""
    start = time.monotonic()
    folders = {name: model_folder(where) for name, where in config.models}
    models = {name: examine(config, name, folder) for name, folder in folders.items()}
    results = {
        "config": dataclasses.asdict(config),
        "models": models,
        "seconds": time.monotonic() - start,
    }
    output = storage.path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    table = as_table(models)
    (output / "table.md").write_text(table)
    draw(models, output / "study.png")
    print(table)
    print(f"written to {output}: results.json, table.md, study.png ({results['seconds']:.0f} s)")
    return results


def examine(config: StudyConfig, name: str, folder: Path) -> dict[str, Any]:
    """All comparisons of one model."""
    with jax.enable_x64(True):
        denoiser, theta = in_float64(folder)
        split = fast_weights.split_of(denoiser, config.memory)
        rows: dict[str, list] = {mode: [] for mode in APPROXIMATE}
        parts: dict[str, list] = {mode: [] for mode in APPROXIMATE}
        slopes: dict[str, list] = {mode: [] for mode in gradients.MODES}
        checks: list[dict[str, float]] = []
        taken = batches(config, folder)
        with Progress(name, config.batches * len(gradients.MODES), "gradient") as bar:
            for i, batch in enumerate(taken):
                found = {}
                for mode in gradients.MODES:
                    given = arguments(config, denoiser, mode, i, theta, batch)
                    found[mode] = jax.device_get(gradients.gradient(*given))
                    bar.update()
                for mode in APPROXIMATE:
                    rows[mode].append(gradients.compare(found[mode], found["exact"]))
                    parts[mode].append(gradients.compare_parts(found[mode], found["exact"], split))
                for d in range(config.directions):
                    seed = (config.seed * config.batches + i) * config.directions + d
                    direction = gradients.unit_direction(seed, theta)
                    for mode in gradients.MODES:
                        slopes[mode].append(gradients.along(found[mode], direction))
                    if i == 0 and d < config.checked:
                        with bar.doing("checking by central differences"):
                            checks.append(
                                checked(config, denoiser, theta, batch, direction, slopes)
                            )
    truth = np.array(slopes["exact"])
    return {
        "folder": str(folder),
        "whole": {mode: gradients.summarise(rows[mode]) for mode in APPROXIMATE},
        "parts": {
            mode: {
                part: gradients.summarise([one[part] for one in parts[mode] if part in one])
                for part in parts[mode][0]
            }
            for mode in APPROXIMATE
        },
        "slopes": slopes,
        "slope_error": {
            mode: float(np.sqrt(np.mean((np.array(slopes[mode]) - truth) ** 2) / np.mean(truth**2)))
            for mode in APPROXIMATE
        },
        "central_differences": checks,
    }


def in_float64(folder: Path) -> tuple[Transformer, Theta]:
    """A model folder's denoiser and parameters in float64."""
    denoiser, theta = hugging_face.load(folder)
    denoiser = denoiser.with_config(dtype="float64", param_dtype="float64")
    return denoiser, jax.tree.map(lambda leaf: leaf.astype("float64"), theta)


def batches(config: StudyConfig, folder: Path) -> Iterator[Batch]:
    """The first batches of the validation split, encoded with the model's tokenizer."""
    tokenizer = str(_model.tokenizer_folder(str(folder)))
    prepared = prepare(dataclasses.replace(config.data, tokenizer=tokenizer))
    pipeline = make_pipeline(prepared, "validation", config.pipeline)
    if config.batches > pipeline.steps_per_epoch:
        raise ValueError(
            f"batches={config.batches} must be at most {pipeline.steps_per_epoch}, all of the "
            "validation split: rows would count twice"
        )
    return (pipeline.batch_at(step) for step in range(config.batches))


def arguments(
    config: StudyConfig, denoiser: Transformer, mode: Any, i: int, theta: Theta, batch: Batch
):
    """Arguments of ``gradients.memory_on_loss`` for batch i: one draw for all modes and models."""
    memory = dataclasses.replace(config.memory, meta_gradient=mode)
    inner_loop = InnerLoop(denoiser, memory)
    key = jax.random.fold_in(jax.random.key(config.seed), i)
    return inner_loop, config.schedule, theta, batch, key


def checked(config, denoiser, theta, batch, direction, slopes) -> dict[str, float]:
    """The newest slope of each mode beside the central differences along its direction."""
    inner_loop, schedule, _, *rest = arguments(config, denoiser, "exact", 0, theta, batch)
    loss = functools.partial(_loss_at, inner_loop, schedule, rest)
    truth = gradients.slope(loss, theta, direction, step=1e-3)
    return {mode: slopes[mode][-1] for mode in gradients.MODES} | {"central": truth}


def _loss_at(inner_loop, schedule, rest, theta):
    return gradients.memory_on_loss(inner_loop, schedule, theta, *rest)


def as_table(models: dict[str, Any]) -> str:
    """Markdown: the whole gradient, random directions, then part by part."""
    lines = [
        "Against the exact meta-gradient, mean ± standard deviation over batches.",
        "",
        "| model | gradient | angle, degrees | error of the whole | size | worst tensor's own "
        "direction | entries of wrong sign | error along random directions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        for mode, numbers in found["whole"].items():
            cells = [
                _number(numbers["angle"], "{:.2f}"), _percent(numbers["error"]),
                _number(numbers["size"], "{:.3f}"), _percent(numbers["worst_tensor"]),
                _percent(numbers["wrong_sign"]), f"{100 * found['slope_error'][mode]:.1f} %",
            ]  # fmt: skip
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    lines += ["", "| model | part | " + " | ".join(f"{m}: angle | error" for m in APPROXIMATE)]
    lines[-1] += " |"
    lines.append("|---|---|" + "---|---|" * len(APPROXIMATE))
    for name, found in models.items():
        for part in found["parts"][APPROXIMATE[0]]:
            cells = []
            for mode in APPROXIMATE:
                numbers = found["parts"][mode][part]
                cells += [_number(numbers["angle"], "{:.2f}"), _percent(numbers["error"])]
            lines.append(f"| {name} | {part} | " + " | ".join(cells) + " |")
    lines += ["", "| model | central differences | exact | trunk_stopped | first_order |"]
    lines.append("|---|---|---|---|---|")
    for name, found in models.items():
        for check in found["central_differences"]:
            values = (check[key] for key in ("central", "exact", "trunk_stopped", "first_order"))
            lines.append(f"| {name} | " + " | ".join(f"{value:+.9f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _number(value: tuple[float, float], form: str) -> str:
    return " ± ".join(form.format(part) for part in value)


def _percent(value: tuple[float, float]) -> str:
    return " ± ".join(f"{100 * part:.1f}" for part in value) + " %"


def draw(models: dict[str, Any], path: Path) -> None:
    """One panel per model: derivatives along random directions, approximate against exact."""
    figure = Figure(figsize=(4.6 * len(models), 4.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, (name, found) in zip(panels, models.items(), strict=True):
        exact = found["slopes"]["exact"]
        for mode, marker in zip(APPROXIMATE, "ox", strict=True):
            panel.plot(exact, found["slopes"][mode], marker, ms=4, alpha=0.7, label=mode)
        ends = min(exact), max(exact)
        panel.plot(ends, ends, color="black", lw=0.8, label="exact")
        panel.set_title(name)
        panel.set_xlabel("exact derivative along a random direction")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("approximate derivative, same direction")
    panels[0].legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(config: StudyConfig) -> None:
    """Run from the command line."""
    study(config)


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/meta_gradient_study.py")
