"""Checkpoints on S3 by the real clients: two processes write them, one reads them."""

import json
import logging
import os
import re
import urllib.request
from pathlib import Path

import boto3
import orbax.checkpoint as ocp
import pytest
from moto.server import ThreadedMotoServer
from orbax.checkpoint._src.path import gcs_utils

from memdlm_jax.checkpoints import orbax_s3
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from tests.launch import launch


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
        "AWS_EC2_METADATA_DISABLED": "true", "FSSPEC_CONFIG_DIR": str(tmp_path / "none"),
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # Not in the region that is configured: clients must ask.
    boto3.client("s3", region_name="eu-west-1").create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    yield
    # What a server holds would outlive it.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    server.stop()


def together(job, folder, count):
    codes, said = launch("tests.checkpoints.on_s3", job, folder, count, {})
    assert not any(codes), "\n".join(text[-3000:] for text in said)
    return [json.loads((folder / f"{job}-{number}.json").read_text()) for number in range(count)]


@pytest.mark.distributed
def test_two_processes_write_what_one_reads(environment, tmp_path):
    both = together("write", tmp_path, 2)
    assert both == [{"steps": [2, 4, 5], "best": 2}] * 2
    (found,) = together("read", tmp_path, 1)
    assert found == {
        "step": 4, "position": 40, "same": {"a": True, "b": True, "n": True},
        "steps": [2, 4], "aside": True, "killed": [], "region": "eu-west-1",
        "model": True, "missing": True,
    }  # fmt: skip
    listed = boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix="deep/run/4/state/ocdbt.")
    assert {file["Key"].split("/")[4] for file in listed["Contents"]} == {
        "ocdbt.process_0", "ocdbt.process_1",
    }  # fmt: skip


def test_another_release_of_orbax_is_refused_on_s3_only(monkeypatch, tmp_path):
    before = gcs_utils.is_gcs_path
    monkeypatch.setattr(ocp, "__version__", "0.12.99")
    wanted = r"s3://b/run.*: Orbax 0\.12\.99 is installed.*verified with Orbax 0\.12\.8 only"
    with pytest.raises(ImportError, match=wanted):
        TrainingCheckpoints("s3://b/run", {})
    assert gcs_utils.is_gcs_path is before
    TrainingCheckpoints(tmp_path / "run", {}).close()


def test_the_release_that_is_installed_by_default_is_verified():
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    pinned = re.search(r"^orbax-checkpoint==(.+)$", constraints, re.MULTILINE)
    assert pinned and pinned[1] in orbax_s3.VERIFIED


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
