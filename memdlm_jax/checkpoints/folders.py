"""Small files of a model folder."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file of a model folder.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no JSON object.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: a model folder holds config.json and weights")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content
