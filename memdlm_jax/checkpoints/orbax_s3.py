"""Orbax on ``s3://``: what it does on ``gs://``, with TensorStore's driver of S3.

By a path's first letters Orbax 0.12 decides whether a folder can be renamed and which driver of
TensorStore takes the arrays, and of buckets it knows Google's alone. What lies beneath,
TensorStore and ``etils.epath``, knows S3 as well, so four small functions of Orbax are given a
case for it. The rest is Orbax's as on ``gs://``: each process writes its share below a name of its
own, the first joins them, and a step counts once its file ``commit_success.txt`` is there. Data
files may be larger than on ``gs://`` (2 GiB), as Orbax has a smaller target for that alone.
"""

import functools
import importlib
import os
import re
from collections.abc import Callable
from typing import Any

import fsspec
import orbax.checkpoint as ocp

SCHEME = "s3://"
VERIFIED = ("0.12.8",)
"""Releases of Orbax with which runs on S3 were tested; others may have changed what is private."""
_RULES = "orbax.checkpoint._src.path.gcs_utils"
_DRIVERS = "orbax.checkpoint._src.serialization.tensorstore_utils"


def is_on_s3(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of S3."""
    return os.fspath(path).startswith(SCHEME)


def teach(folder: str | os.PathLike[str]) -> None:
    """Give Orbax its case of ``s3://``, in this process; all other paths are as before.

    Args:
        folder: a URL of S3, whose bucket must be there.

    Raises:
        ImportError: the release of Orbax that is installed is not one of ``VERIFIED``.
        FileNotFoundError, PermissionError: there is no such bucket, or not for this account.
    """
    if ocp.__version__ not in VERIFIED:
        raise ImportError(
            f"{folder}: Orbax {ocp.__version__} is installed, but S3 was verified with Orbax "
            f"{', '.join(VERIFIED)} only, since it needs private functions; install "
            f"orbax-checkpoint=={VERIFIED[-1]}, or write to a disk or to gs://"
        )
    _service(_bucket(os.fspath(folder)))
    for place, name, case in (
        (_RULES, "is_gcs_path", lambda path: True),
        (_RULES, "get_kvstore_for_gcs", _place),
        (_DRIVERS, "_use_gcs_driver", lambda path: True),
        (_DRIVERS, "_normalize_path", _normal),
    ):
        module = importlib.import_module(place)
        otherwise = getattr(module, name)
        if not hasattr(otherwise, "otherwise"):
            setattr(module, name, _with_case(otherwise, case))


def _with_case(otherwise: Callable[[Any], Any], case: Callable[[str], Any]) -> Callable[[Any], Any]:
    def chosen(path: Any) -> Any:
        return case(os.fspath(path)) if is_on_s3(path) else otherwise(path)

    chosen.otherwise = otherwise  # type: ignore[attr-defined]
    return chosen


def _normal(path: str) -> str:
    return SCHEME + os.path.normpath(path.removeprefix(SCHEME))


def _bucket(path: str) -> str:
    return path.removeprefix(SCHEME).partition("/")[0]


def _place(path: str) -> dict[str, Any]:
    """TensorStore's specification of a place in a bucket."""
    bucket = _bucket(path)
    below = path.removeprefix(f"{SCHEME}{bucket}").removeprefix("/")
    return {"driver": "s3", "bucket": bucket, "path": below, **_service(bucket)}


@functools.cache
def _service(bucket: str) -> dict[str, Any]:
    """Address of the service that s3fs uses, and region of the bucket as the service says it."""
    files = fsspec.filesystem("s3")
    try:
        answer = files.call_s3("head_bucket", Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
    except OSError as error:
        raise type(error)(f"{SCHEME}{bucket}: the bucket must be there: {error}") from error
    region = answer.get("x-amz-bucket-region") or files.s3.meta.region_name
    return _settings(region, files.s3.meta.endpoint_url)


def _settings(region: str, endpoint: str) -> dict[str, Any]:
    """What TensorStore is told; addresses of AWS for all it forms by itself, and only these."""
    settings: dict[str, Any] = {"aws_region": region}
    if not re.fullmatch(r"https://s3(\.[a-z0-9-]+)?\.amazonaws\.com/?", endpoint):
        settings["endpoint"] = endpoint.rstrip("/").replace("aws-global", region)
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # Found first in any case, but with complaints.
        settings["aws_credentials"] = {"type": "environment"}
    return settings
