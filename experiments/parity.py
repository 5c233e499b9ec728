"""Check our numbers against recorded calls of the public MemDLM code.

    python -m experiments.parity FOLDER

Replays every ``.npz`` case in the folder (``tests/golden/README.md`` describes the format; names
of files mean nothing but for ``weights*.npz``), prints the worst relative error of every quantity
of every case, and exits with 1 if one is above its tolerance, 2 if a case cannot be replayed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from memdlm_jax.evaluation import parity


def check(folder: Path) -> int:
    """Replay and print; the exit status."""
    try:
        cases, problems = parity.load_folder(folder)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, problem in problems.items():
        print(f"{name}\n    error: {problem}", flush=True)
    failed, unreadable, total = [], list(problems), 0
    for case in cases:
        try:
            quantities = parity.replay(case)
        except parity.BadCase as error:
            unreadable.append(case.name)
            print(f"{case.name}\n    error: {error}", flush=True)
            continue
        print(case.name)
        for found in quantities:
            verdict = "ok" if found.equal else "DIFFERS"
            bound = f"(at most {found.tolerance:.0e})"
            print(f"    {found.name:24} {found.error:9.1e}  {bound}  {verdict}", flush=True)
        total += len(quantities)
        if not all(found.equal for found in quantities):
            failed.append(case.name)
    print(
        f"{len(cases)} cases, {total} quantities compared; "
        f"different: {', '.join(failed) or 'none'}; not replayed: {', '.join(unreadable) or 'none'}"
    )
    return 2 if unreadable else int(bool(failed))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.parity",
        description="Replay recorded calls of the public code and compare.",
    )
    # Every case compiles programs of its own, and they are tiny.
    jax.config.update("jax_disable_most_optimizations", True)
    parser.add_argument("folder", type=Path, help="folder with .npz cases and weights*.npz")
    sys.exit(check(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
