"""Orbax on ``s3://``: what it does on ``gs://``, with TensorStore's driver of S3.

By a path's first letters Orbax 0.12 decides whether a folder can be renamed and which driver of
TensorStore takes the arrays, and of buckets it knows Google's alone. What lies beneath,
TensorStore and ``etils.epath``, knows S3 as well, so four small functions of Orbax are given a
case for it. The rest is Orbax's as on ``gs://``: each process writes its share below a name of its
own, the first joins them, and a step counts once its file ``commit_success.txt`` is there.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

SCHEME = "s3://"
_RULES = "orbax.checkpoint._src.path.gcs_utils"
_DRIVERS = "orbax.checkpoint._src.serialization.tensorstore_utils"


def is_on_s3(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of S3."""
    return os.fspath(path).startswith(SCHEME)


def teach() -> None:
    """Give Orbax its case of ``s3://``, in this process; all other paths are as before.

    Raises:
        ImportError: the release of Orbax that is installed lacks one of the functions.
    """
    for place, name, case in (
        (_RULES, "is_gcs_path", lambda path: True),
        (_RULES, "get_kvstore_for_gcs", _place),
        (_DRIVERS, "_use_gcs_driver", lambda path: True),
        (_DRIVERS, "_normalize_path", _normal),
    ):
        try:
            module = importlib.import_module(place)
            found = getattr(module, name)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"{SCHEME}: this release of Orbax has no {place}.{name}; install the one that "
                "constraints.txt names, or write to a disk"
            ) from error
        if not hasattr(found, "otherwise"):
            setattr(module, name, _with_case(found, case))


def _with_case(otherwise: Callable[[Any], Any], case: Callable[[str], Any]) -> Callable[[Any], Any]:
    def chosen(path: Any) -> Any:
        return case(os.fspath(path)) if is_on_s3(path) else otherwise(path)

    chosen.otherwise = otherwise  # type: ignore[attr-defined]
    return chosen


def _normal(path: str) -> str:
    return SCHEME + os.path.normpath(path.removeprefix(SCHEME))


def _place(path: str) -> dict[str, Any]:
    """TensorStore's specification of a place in a bucket."""
    bucket, _, below = path.removeprefix(SCHEME).partition("/")
    return {"driver": "s3", "bucket": bucket, "path": below, **_service()}


@functools.cache
def _service() -> dict[str, Any]:
    """Region and address as s3fs has them; TensorStore looks for the same credentials itself."""
    import botocore.session

    found = botocore.session.get_session().create_client("s3").meta
    service: dict[str, Any] = {}
    if found.region_name != "aws-global":  # Without one TensorStore asks where the bucket lies.
        service["aws_region"] = found.region_name
    if not found.endpoint_url.endswith(".amazonaws.com"):
        service["endpoint"] = found.endpoint_url
    if "AWS_ACCESS_KEY_ID" in os.environ:  # Found first in any case, but with complaints.
        service["aws_credentials"] = {"type": "environment"}
    return service
