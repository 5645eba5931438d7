"""A damaged version behind an alias: the old one answers, and status, metrics and log say what is wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path

import httpx
import pytest
from factories import image_bytes

from cnn_ray.artifact import set_alias
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint

PNG = {"Content-Type": "image/png"}
MESSAGE = (
    "The version cannot be loaded: other bytes in openvino/model.bin. "
    "The one before it answers. See the log of the server."
)


@pytest.fixture
def models_uri(small_models: str, tmp_path: Path) -> str:
    """small@1 is the champion; small@2 has a file of other bytes."""
    for version in (1, 2):
        shutil.copytree(Path(small_models) / "small" / "1", tmp_path / "small" / str(version))
        description = tmp_path / "small" / str(version) / "artifact.json"
        description.write_text(json.dumps(json.loads(description.read_text()) | {"version": version}))
    (tmp_path / "small" / "2" / "openvino" / "model.bin").write_bytes(b"damaged")
    set_alias(str(tmp_path), "small", "champion", 1)
    return str(tmp_path)


def test_a_damaged_version_behind_an_alias_is_seen(models_uri, caplog):
    config = ServeConfig(model="small@champion", models_uri=models_uri, precision="f32", num_threads=1)
    endpoint = Endpoint(config)

    async def run() -> dict[str, httpx.Response]:
        set_alias(models_uri, "small", "champion", 2)
        await endpoint.follow()
        transport = httpx.ASGITransport(app=endpoint)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            got = {
                path: await client.get(path)
                for path in (
                    "/v1/models/small",
                    "/v1/models/small/versions/1",
                    "/v1/models/small/versions/2",
                    "/v2/models/small/ready",
                    "/v2/models/small/versions/1/ready",
                    "/v2/models/small/versions/2/ready",
                    "/v2/health/ready",
                    "/metrics",
                )
            }
            got["predict"] = await client.post("/v1/models/small:predict", content=image_bytes(1), headers=PNG)
            return got

    try:
        with caplog.at_level(logging.WARNING):
            answers = asyncio.run(run())
    finally:
        endpoint.close()

    assert (answers["predict"].status_code, answers["predict"].json()["version"]) == (200, 1)
    fine = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    broken = {"version": "2", "state": "END", "status": {"error_code": "DATA_LOSS", "error_message": MESSAGE}}
    assert answers["/v1/models/small"].json() == {"model_version_status": [broken, fine]}
    assert answers["/v1/models/small/versions/1"].json() == {"model_version_status": [fine]}
    assert answers["/v1/models/small/versions/2"].json() == {"model_version_status": [broken]}
    assert models_uri not in answers["/v1/models/small"].text, "where files lie is nobody's business"
    ready = {path: answer.status_code for path, answer in answers.items() if path.endswith("ready")}
    assert [status for path, status in ready.items() if "versions/2" in path] == [503]
    assert {status for path, status in ready.items() if "versions/2" not in path} == {200}
    assert 'cnn_ray_failed_versions{model="small",version="2"} 1.0' in answers["/metrics"].text
    assert any("the old versions stay" in message and "small@2" in message for message in caplog.messages)


def test_without_one_nothing_is_said(models_uri):
    endpoint = Endpoint(ServeConfig(model="small@1", models_uri=models_uri, precision="f32", num_threads=1))

    async def run() -> str:
        await endpoint.follow()
        transport = httpx.ASGITransport(app=endpoint)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return (await client.get("/metrics")).text

    try:
        assert "cnn_ray_failed_versions{" not in asyncio.run(run())
    finally:
        endpoint.close()
