"""A stand-in for a bucket: the code that reaches ``gs://`` and ``s3://``, over a folder of a disk.

``storage``, ``etils.epath`` and fsspec are the real ones, and so is Orbax with its rules for
buckets; fsspec's file system and TensorStore's driver of buckets are replaced. As in a bucket
nothing can be appended to a file, and a file that is not closed is not there.
"""

import functools

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

from memdlm_jax import storage
from memdlm_jax.checkpoints import orbax_s3


class _Bucket(DirFileSystem):
    """Buckets as the subfolders of a folder."""

    protocol = ("gs", "s3")
    cachable = False

    def open(self, path, mode="rb", *arguments, **options):
        if "a" in mode or "+" in mode:
            raise NotImplementedError(f"{path}: mode={mode!r}: nothing is appended in a bucket")
        return super().open(path, mode, *arguments, **options)


@pytest.fixture
def buckets(tmp_path, monkeypatch):
    """The folder in which what is written to ``gs://NAME/...`` is found under ``NAME/...``."""
    root = tmp_path / "buckets"
    (root / "b").mkdir(parents=True)
    files = _Bucket(path=str(root), fs=LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: files)
    monkeypatch.setattr(storage, "_file_system", lambda scheme: files)
    monkeypatch.setattr(orbax_s3, "_service", lambda bucket: {})
    monkeypatch.setattr(storage, "_installed", lambda package: True)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    driver = functools.partial(_on_disk, root)
    driver.otherwise = driver  # It knows both kinds: ``orbax_s3`` has nothing to add.
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", driver)
    return root


def _on_disk(root, path):
    """TensorStore's place of ``gs://NAME/...`` or ``s3://NAME/...``."""
    place = f"{root}/{path[len('gs://') :]}"
    # A single file; all else are folders, whose end TensorStore's driver of disks wants to see.
    return {"driver": "file", "path": place if place.endswith("_sharding") else f"{place}/"}
