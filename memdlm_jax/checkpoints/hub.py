"""Model folders from the Hugging Face hub: an optional extra, always at a pinned revision."""

import re
from pathlib import Path

# Config, weights and tokenizer; never code, never pickles.
PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja")
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def local(name: str) -> str:
    """The local folder of a model, downloaded if ``name`` is ``ORG/NAME@REVISION``.

    Anything else is returned as it is. A branch moves: name a commit or a tag to get the same
    weights again.

    Raises:
        ImportError: the extra ``hub`` is not installed.
        FileNotFoundError: the hub has no such model or revision, or cannot be reached.
    """
    found = _NAME.fullmatch(name)
    if found is None or Path(name).exists():
        return name
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{name} is on the hub: pip install 'memdlm_jax[hub]', or give a local folder"
        ) from error
    try:
        return huggingface_hub.snapshot_download(
            found["repository"], revision=found["revision"], allow_patterns=list(PATTERNS)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{name} could not be downloaded: {said}") from error
