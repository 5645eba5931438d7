"""The OpenAPI document is true: schemathesis makes requests of it, good and bad, and finds no answer it does not state.

All its checks are on; schemathesis.toml says what is changed of them and why. The long run, so many requests for each
operation in each of its phases (and CNN_RAY_SEED to repeat one):

    CNN_RAY_EXAMPLES=1000 pytest -m slow tests/contract/test_openapi.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from running_endpoint import running

from cnn_ray.artifact import set_alias
from cnn_ray.auth import add_key
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint
from cnn_ray.openapi import build_openapi

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("*.json"))
DOCUMENTS: dict[str, dict[str, Any]] = {
    endpoint: build_openapi(["small"], ServeConfig(model="small@1"), auth=endpoint == "locked")
    for endpoint in ("open", "locked")
}


@pytest.fixture(scope="module")
def locked(small_models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL of an endpoint of `small@champion` that wants a key, and the key."""
    folder = tmp_path_factory.mktemp("openapi")
    models_uri, keys_uri = str(folder / "models"), str(folder / "keys.json")
    shutil.copytree(small_models, models_uri)
    set_alias(models_uri, "small", "champion", 1)
    key = add_key(keys_uri, "schemathesis")
    config = ServeConfig(
        models_uri=models_uri, model="small@champion", precision="f32", num_threads=1, api_keys_uri=keys_uri,
        max_instances=8, access_log=False,
    )  # fmt: skip
    with running(Endpoint(config)) as address:
        yield f"http://{address}", key


def run_schemathesis(locked: tuple[str, str], folder: Path, *options: str) -> str:
    """What the tool says of a run over all operations, which must have found nothing."""
    url, key = locked
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run",
        f"{url}/openapi.json", "--header", f"Authorization: Bearer {key}", "--no-color", "--generation-database=none",
        *options,
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases_of(said: str) -> int:
    found = re.search(r"(\d+) generated", said)
    assert found is not None, said
    return int(found[1])


@pytest.mark.parametrize("auth", [True, False])
def test_the_document_is_openapi(auth):
    config = ServeConfig(model="a@1", page=auth, open_metrics=auth)

    validate(build_openapi(["a", "b"], config, auth=auth))


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_the_document_states_every_golden_answer(path):
    """Its status and content type, and a schema that its JSON keeps: also where schemathesis sends no such request."""
    golden = json.loads(path.read_text())
    request, response = golden["request"], golden["response"]
    document = DOCUMENTS[golden.get("endpoint", "open")]
    operation = operation_of(document, request["method"].lower(), request["path"])
    if operation is None:  # a path or method that there is not
        assert response["status"] in (400, 404, 405)
        return
    stated = operation["responses"][str(response["status"])]
    if "$ref" in stated:
        stated = document["components"]["responses"][stated["$ref"].rpartition("/")[2]]
    schema = stated["content"][response["headers"]["Content-Type"]]["schema"]
    if "json" in response:
        Draft202012Validator({**schema, "components": document["components"]}).validate(response["json"])


def operation_of(document: dict[str, Any], method: str, path: str) -> dict[str, Any] | None:
    """The operation of the document that answers the path, None where there is none."""
    for template, item in document["paths"].items():
        pattern = re.sub(r"\\{\w+\\}", r"[^/:]+", re.escape(template))
        if re.fullmatch(pattern, path, re.I):
            return item.get(method)
    return None


def test_the_endpoint_sends_the_document(locked):
    url, key = locked
    sent = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {key}"})

    assert sent.headers["content-type"] == "application/json"
    assert "/v1/models/{name}/labels/{label}:predict" in sent.json()["paths"]
    assert sent.json()["components"]["parameters"]["name"]["schema"]["enum"] == ["small"]


def test_schemathesis_finds_no_violation(locked, tmp_path):
    said = run_schemathesis(locked, tmp_path, "--phases=examples,coverage", "--seed=1", "--no-shrink")

    assert cases_of(said) > 1000


@pytest.mark.slow
def test_schemathesis_finds_no_violation_for_long(locked, tmp_path):
    examples = int(os.environ.get("CNN_RAY_EXAMPLES", "50"))
    seed = ["--seed", os.environ["CNN_RAY_SEED"]] if "CNN_RAY_SEED" in os.environ else []

    said = run_schemathesis(locked, tmp_path, "--max-examples", str(examples), *seed)

    assert cases_of(said) > 10 * examples
