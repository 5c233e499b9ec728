"""What ``make quickstart`` installs is enough for what the quickstart imports."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("memdlm_jax", "experiments")


def declared():
    """Distributions that ``pip install .[corpus]`` asks for."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    asked = settings["options"]["install_requires"], settings["options.extras_require"]["corpus"]
    names = [line for text in asked for line in text.split("\n") if line and line[0] != "#"]
    return {normal(re.match(r"[\w-]+", name)[0]) for name in names}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def loaded():
    """Files of our modules that the quickstart has loaded before it begins to work."""
    script = "import sys, experiments.quickstart\nfor name in list(sys.modules): print(name)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name in done.stdout.split():
        if name.split(".")[0] in OURS:
            path = ROOT / name.replace(".", "/")
            yield path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(file):
    """Top-level names that a module imports when it is loaded itself."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_import_of_the_quickstart_is_declared():
    files = list(loaded())
    assert ROOT / "memdlm_jax/training/loop.py" in files
    owners = importlib.metadata.packages_distributions()
    found = {name: file for file in files for name in imported(file)}
    foreign = {n: f for n, f in found.items() if n not in {*sys.stdlib_module_names, *OURS}}
    missing = {
        name: str(file)
        for name, file in foreign.items()
        if not declared() & set(map(normal, owners[name]))
    }
    assert "jax" in foreign and not missing
