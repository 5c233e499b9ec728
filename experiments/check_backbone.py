"""Check model folders against recordings of the published modelling code.

    python -m experiments.check_backbone FOLDER ... [--base=FOLDER]

Loads every folder in float32, compares with the ``golden.npz`` in it (all keys and cases; the
format stands in ``memdlm_jax/evaluation/backbones.py``), prints the worst error per quantity, and
exits with 1 if one is above the tolerance, 2 if a folder cannot be checked. A folder with a PEFT
adapter is checked on its base: the folder that its ``adapter_config.json`` names, or ``--base``.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from memdlm_jax import storage
from memdlm_jax.checkpoints import hub, hugging_face
from memdlm_jax.evaluation import backbones
from memdlm_jax.evaluation.backbones import Compared


def check(folder: Path, base: Path | None, tolerance: float) -> list[Compared]:
    """Load a folder and compare it with its recording.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be loaded, or has no recording.
    """
    file = folder / "golden.npz"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: there is nothing to compare with")
    denoiser, theta = hugging_face.load(folder, base=base)
    with np.load(file, allow_pickle=False) as recording:
        golden = {name: recording[name] for name in recording.files}
    plain = golden.pop("logits_base", None)
    found = backbones.compare(denoiser, theta, golden, tolerance)
    if plain is not None:
        found += _base(folder, base, golden | {"logits": plain}, tolerance)
    return found


def _base(folder: Path, base: Path | None, golden: dict, tolerance: float) -> list[Compared]:
    """Compare an adapter's base alone."""
    denoiser, theta = hugging_face.load(hugging_face.base_of(folder, base))
    found = backbones.compare(denoiser, theta, golden, tolerance)
    return [dataclasses.replace(c, name="logits_base") for c in found if c.name == "logits"]


def report(folder: str, found: list[Compared]) -> None:
    """Print the worst error of every quantity, and everything that is wrong."""
    print(folder)
    for quantity, compared in backbones.worst(found):
        at = "" if compared.name == quantity else f" ({compared.name})"
        bound = "" if compared.tolerance is None else f"  (at most {compared.tolerance:.0e})"
        verdict = compared.note or ("ok" if compared.equal else "DIFFERS")
        print(f"    {quantity + at:36} {_error(compared):>9}{bound}  {verdict}")
    for compared in found:
        if not compared.equal:
            print(f"    DIFFERS {compared.name} {compared.note or _error(compared)}")


def _error(compared: Compared) -> str:
    """The error, or a dash if nothing could be compared."""
    return "-" if compared.note and math.isnan(compared.error) else f"{compared.error:.1e}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.check_backbone",
        description="Compare model folders with recordings of the published modelling code.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument(
        "--base", type=storage.path, help="model folder under adapter folders, ignored for others"
    )
    parser.add_argument("--tolerance", type=float, default=backbones.TOLERANCE)
    options = parser.parse_args(arguments)
    if not 0 <= options.tolerance < math.inf:
        parser.error(f"--tolerance={options.tolerance} must be at least 0")
    jax.config.update("jax_default_matmul_precision", "highest")
    wrong, unchecked, total = [], [], 0
    for folder in options.folders:
        try:
            local = storage.path(hub.local(folder))
            base = options.base if hugging_face.is_adapter(local) else None
            found = check(local, base, options.tolerance)
        except (OSError, ImportError, ValueError) as error:
            unchecked.append(folder)
            print(f"{folder}\n    error: {error}")
            continue
        report(folder, found)
        total += len(found)
        wrong += [str(folder)] * (not all(compared.equal for compared in found))
    print(
        f"{len(options.folders)} folders, {total} arrays compared; "
        f"different: {', '.join(wrong) or 'none'}; not checked: {', '.join(unchecked) or 'none'}"
    )
    sys.exit(2 if unchecked else int(bool(wrong)))


if __name__ == "__main__":
    main()
