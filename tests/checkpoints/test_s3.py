"""Checkpoints on S3 by the real clients: two processes write them, one reads them."""

import json
import logging
import os
import socket
import subprocess
import sys

import boto3
import pytest
from moto.server import ThreadedMotoServer
from orbax.checkpoint._src.path import gcs_utils

from memdlm_jax.checkpoints import orbax_s3


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A server that speaks S3, with one bucket, and how its clients find it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": str(tmp_path / "none"), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    yield os.environ
    server.stop()


def launch(job, count, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = [sys.executable, "-m", "tests.checkpoints.on_s3", job, port, str(count)]
    started = [
        subprocess.Popen(
            [*base, str(number)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), said[0][1][-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.mark.distributed
def test_two_processes_write_what_one_reads(environment):
    both = launch("write", 2, environment)
    assert both == [{"steps": [2, 4, 5], "best": 2}] * 2
    (found,) = launch("read", 1, environment)
    assert found == {
        "step": 4, "position": 40, "same": {"a": True, "b": True, "n": True},
        "steps": [2, 4], "aside": True,
    }  # fmt: skip
    listed = boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix="deep/run/4/state/ocdbt.")
    assert {file["Key"].split("/")[4] for file in listed["Contents"]} == {
        "ocdbt.process_0", "ocdbt.process_1",
    }  # fmt: skip


def test_a_release_of_orbax_without_the_place_for_it_is_named(monkeypatch):
    monkeypatch.delattr(gcs_utils, "is_gcs_path")
    with pytest.raises(ImportError, match=r"s3://: this release of Orbax has no .*is_gcs_path"):
        orbax_s3.teach()
