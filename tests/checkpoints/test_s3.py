"""Checkpoints on S3 by the real clients: two processes write them, one reads them."""

import json
import logging
import os
import socket
import subprocess
import sys
import urllib.request

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
    for name in list(os.environ):  # A developer's own must not lead to a real account.
        if name.upper().startswith(("AWS_", "FSSPEC_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-west-2",
        "AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true", "FSSPEC_CONFIG_DIR": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # Not in the region that is configured: clients must ask.
    boto3.client("s3", region_name="eu-west-1").create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    yield os.environ
    # What a server holds would outlive it.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
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
    codes = [process.returncode for process in started]
    assert not any(codes), "\n".join(error[-3000:] for _, error in said)
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
        orbax_s3.teach("s3://b/run")


@pytest.mark.parametrize(
    ("region", "endpoint", "given"),
    [
        ("eu-west-1", "https://s3.amazonaws.com", None),
        ("us-gov-west-1", "https://s3.us-gov-west-1.amazonaws.com", None),
        ("cn-north-1", "https://s3.cn-north-1.amazonaws.com.cn", "https://s3.cn-north-1.amazonaws.com.cn"),
        ("us-west-2", "https://s3-fips.aws-global.amazonaws.com", "https://s3-fips.us-west-2.amazonaws.com"),
        ("us-east-1", "https://bucket.vpce-1.s3.us-east-1.vpce.amazonaws.com/", "https://bucket.vpce-1.s3.us-east-1.vpce.amazonaws.com"),
        ("us-east-1", "http://store:9000", "http://store:9000"),
    ],
)  # fmt: skip
def test_what_tensorstore_is_told_of_the_service(monkeypatch, region, endpoint, given):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    expected = {"aws_region": region} | ({"endpoint": given} if given else {})
    assert orbax_s3._settings(region, endpoint) == expected


def test_a_bucket_that_is_not_there_is_named(environment):
    done = subprocess.run(
        [sys.executable, "-c", "from memdlm_jax.checkpoints.training_state import *\n"
         "TrainingCheckpoints('s3://nowhere/run', {})"],
        env=environment, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode and "s3://nowhere: the bucket must be there" in done.stderr
