"""Models by hub id; the download itself is the library's."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from memdlm_jax.checkpoints import hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    calls = []

    def download(repository, **given):
        calls.append((repository, given))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_pinned_id_is_downloaded_without_code_or_pickles(asked, tmp_path):
    assert hub.local("GSAI-ML/LLaDA-8B-Base@0f2787f") == str(tmp_path)
    ((repository, given),) = asked
    assert repository == "GSAI-ML/LLaDA-8B-Base" and given["revision"] == "0f2787f"
    assert not any(
        pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in given["allow_patterns"]
    )


@pytest.mark.parametrize("name", ["runs/mdlm/best", "GSAI-ML/LLaDA-8B-Base", "/a/b@c/d", ""])
def test_folders_are_left_alone(asked, name):
    assert hub.local(name) == name and not asked


def test_a_folder_that_looks_like_an_id_wins(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@1").mkdir(parents=True)
    assert hub.local("org/name@1") == "org/name@1" and not asked


def test_a_failure_is_one_line(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        FileNotFoundError, match=r"org/name@1 could not be downloaded: cannot reach the hub$"
    ):
        hub.local("org/name@1")
