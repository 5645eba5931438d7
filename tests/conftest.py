"""What all tests share: one S3 server (moto) for the session and a fresh bucket for each test that asks."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cnn_ray.artifact import Artifact


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of the server; the environment points there, for child processes too, and at no real account."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def s3_uri(s3_server: str) -> str:
    """`s3://bucket/prefix` of an empty bucket that no other test uses."""
    import boto3

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Models folder with `small@1`; made once, because making it imports TensorFlow."""
    from factories import publish_small_artifact

    folder = str(tmp_path_factory.mktemp("models"))
    publish_small_artifact(folder)
    return folder


@pytest.fixture(scope="session")
def small_artifact(small_models: str) -> Artifact:
    """The artifact `small@1`."""
    from cnn_ray.artifact import load_artifact

    return load_artifact(small_models, "small@1")
