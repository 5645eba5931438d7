"""Request and answer pairs of both protocols, replayed against the endpoint: tests/contract/golden/*.json.

A file has `request` (method, path, headers, and a body as json, text or base64) and `response` (status, headers, and a
body as json, base64, or what it starts with). Numbers may differ by 2e-4, because a CPU may round in another way. With
`"endpoint": "locked"` it is asked of an endpoint that wants API keys.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cnn_ray import __version__
from cnn_ray.artifact import set_alias
from cnn_ray.auth import add_key
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint

GOLDEN = sorted(Path(__file__).with_name("golden").glob("*.json"))
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def endpoints(small_models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Endpoint]]:
    """An open and a locked endpoint of `small@1`, which is the champion."""
    folder = tmp_path_factory.mktemp("golden")
    models_uri, keys_uri = str(folder / "models"), str(folder / "keys.json")
    shutil.copytree(small_models, models_uri)
    set_alias(models_uri, "small", "champion", 1)
    add_key(keys_uri, "somebody")
    config = ServeConfig(
        models_uri=models_uri, model="small@champion", precision="f32", num_threads=1, max_instances=4,
        max_body_bytes=40_000, access_log=False,
    )  # fmt: skip
    made = {"open": Endpoint(config), "locked": Endpoint(config.model_copy(update={"api_keys_uri": keys_uri}))}
    yield made
    for endpoint in made.values():
        endpoint.close()


def body_of(request: dict[str, Any]) -> bytes | None:
    if "json" in request:
        return json.dumps(request["json"]).encode()
    if "base64" in request:
        return base64.b64decode(request["base64"])
    return request["text"].encode() if "text" in request else None


def alike(expected: object, received: object) -> bool:
    """Whether two JSON values are the same but for rounding in fractions."""
    if isinstance(expected, dict) and isinstance(received, dict):
        return list(expected) == list(received) and all(alike(expected[key], received[key]) for key in expected)
    if isinstance(expected, list) and isinstance(received, list):
        return len(expected) == len(received) and all(map(alike, expected, received))
    if isinstance(expected, float) and isinstance(received, float):
        return math.isclose(expected, received, abs_tol=TOLERANCE)
    return type(expected) is type(received) and expected == received


def ask(endpoint: Endpoint, request: dict[str, Any]) -> httpx.Response:
    headers = {"Content-Type": "application/json"} if "json" in request else {}

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app=endpoint)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(
                request["method"],
                request["path"],
                content=body_of(request),
                headers={**headers, **request.get("headers", {})},
            )

    return asyncio.run(asked())


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_replay(path: Path, endpoints: dict[str, Endpoint]) -> None:
    golden = json.loads(path.read_text().replace("VERSION", __version__))
    request, expected = golden["request"], golden["response"]

    answer = ask(endpoints[golden.get("endpoint", "open")], request)

    assert answer.status_code == expected["status"], answer.text
    assert {name: answer.headers.get(name) for name in expected["headers"]} == expected["headers"]
    assert ("Inference-Header-Content-Length" in answer.headers) == (
        "Inference-Header-Content-Length" in expected["headers"]
    )
    assert answer.headers["X-Request-ID"]
    if "json" in expected:
        assert alike(expected["json"], answer.json()), answer.text
    else:
        start = base64.b64decode(expected.get("base64") or expected["starts_base64"])
        assert answer.content.startswith(start)
        assert len(answer.content) == len(start) or "starts_base64" in expected


def test_every_status_of_the_contract_has_a_golden_answer():
    """408, 429, 500, 503 and 504 come from load, time or failure: the endpoint's own tests have them."""
    statuses = {json.loads(path.read_text())["response"]["status"] for path in GOLDEN}
    assert statuses == {200, 400, 401, 403, 404, 405, 413, 415}
