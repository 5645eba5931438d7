# pyright: strict
"""The OpenAPI 3.1 document of the endpoint: every route, body, answer and status there is, and none else.

It is held to be true by tests that let schemathesis make requests of it (tests/contract/test_openapi.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from cnn_ray import __version__
from cnn_ray.config import ServeConfig
from cnn_ray.image_bodies import IMAGE_TYPES
from cnn_ray.openapi_schemas import Json, build_schemas

STATUSES = {
    "400": "The request is malformed, or an image cannot be read.",
    "401": "No API key, or an unknown one.",
    "403": "There are no API keys, and the request comes from a web page elsewhere or names another host.",
    "404": "No such model, version or path.",
    "405": "The path exists but not with this method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "An image type that is not read here, or an encoded body.",
    "429": "Overload. Next: wait as long as Retry-After says and send it again.",
    "500": "Internal error; the log of the server has the cause.",
    "503": "Not ready, or going away. Next: send it again.",
    "504": "No answer before the deadline.",
}
_HEADERS = {
    "401": {"WWW-Authenticate": "Bearer"},
    "405": {"Allow": "The methods of the path."},
    "429": {"Retry-After": "Seconds to wait."},
}
_OF_GET = ("400", "404", "405", "500", "503", "504")
_OF_POST = ("400", "404", "405", "408", "413", "415", "429", "500", "503", "504")


def build_openapi(names: Sequence[str], config: ServeConfig, *, auth: bool) -> Json:
    """The document of an endpoint that answers for the named models; `auth` says whether it wants API keys."""
    paths = {**_rest_paths(), **_infer_paths(config), **_other_paths(config)}
    guarded = not auth and not config.allow_anonymous  # then only requests of this machine are answered
    for item in paths.values():
        for method in ("get", "post"):
            if method in item:
                item[method] = _finished(dict(_mapping(item[method])), auth, guarded)
    version: Json = {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}
    components: Json = {
        "schemas": build_schemas(config.max_instances),
        "parameters": {
            "name": _parameter("name", {"type": "string", "enum": list(names)}, "Name of the model.", names[0]),
            "version": _parameter(
                "version", version, "Version of the model; without one, its default alias decides.", 1
            ),
            "label": _parameter(
                "label", {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}, "Alias of a version.", "champion"
            ),
        },
        "responses": {status: _error_response(status) for status in STATUSES},
        "headers": {"X-Request-ID": {"description": "The request's own, or a new one.", "schema": {"type": "string"}}},
    }
    if auth:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cnn_ray",
            "version": __version__,
            "description": (
                "Scores images with published models. Speaks TensorFlow Serving's REST (/v1), the Open Inference "
                "Protocol (/v2), and a short form for people: an image in, a verdict out. Any request may bring "
                "X-Request-ID (comes back) and X-Request-Timeout-Seconds (then 504)."
            ),
        },
        "paths": paths,
        "components": components,
    }


def _mapping(value: object) -> Json:
    if not isinstance(value, dict):
        raise TypeError(f"Expected a mapping. Received: {value!r}.")
    return value  # pyright: ignore[reportUnknownVariableType]


def _parameter(name: str, schema: Json, description: str, example: object) -> Json:
    parameter: Json = {"name": name, "in": "path", "required": True, "schema": schema}
    return {**parameter, "description": description, "example": example}


def _error_response(status: str) -> Json:
    headers: Json = {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}}
    for name, description in _HEADERS.get(status, {}).items():
        kind = "integer" if name == "Retry-After" else "string"
        headers[name] = {"description": description, "required": True, "schema": {"type": kind}}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": STATUSES[status], "headers": headers, "content": content}


def _finished(operation: Json, auth: bool, guarded: bool) -> Json:
    """The operation with its error answers, and its key where it wants one."""
    is_open = bool(operation.pop("is_open", False))
    statuses = _OF_POST if "requestBody" in operation else _OF_GET
    if auth and not is_open:
        operation["security"] = [{"key": []}]
        statuses = ("401", *statuses)
    if guarded:
        statuses = ("403", *statuses)
    responses = dict(_mapping(operation["responses"]))
    responses.update({status: {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)})
    return {**operation, "responses": responses}


def _ok(content: Json) -> Json:
    headers: Json = {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}}
    return {"200": {"description": "Answered.", "headers": headers, "content": content}}


def _json(schema: str) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _get(summary: str, content: Json, *, is_open: bool = False) -> Json:
    return {"get": {"summary": summary, "responses": _ok(content), "is_open": is_open}}


def _post(summary: str, body: Json, content: Json, *, required: bool = True) -> Json:
    return {
        "post": {"summary": summary, "requestBody": {"required": required, "content": body}, "responses": _ok(content)}
    }


def _refused(summary: str) -> Json:
    """A request that is understood and never granted: there is no answer but an error."""
    body: Json = {"application/json": {"schema": {"type": "object"}}}
    return {"post": {"summary": summary, "requestBody": {"content": body}, "responses": {}}}


def _with_parameters(item: Json, *names: str) -> Json:
    return {"parameters": [{"$ref": f"#/components/parameters/{name}"} for name in names], **item}


def _image_content() -> Json:
    file: Json = {"type": "string", "format": "image-file", "contentMediaType": "image/*"}
    form: Json = {"type": "object", "required": ["file"], "properties": {"file": file}, "additionalProperties": False}
    return {
        **{kind: {"schema": {"type": "string", "format": "image-file"}} for kind in IMAGE_TYPES},
        "multipart/form-data": {"schema": form},
    }


def _rest_paths() -> dict[str, Json]:
    verdict: Json = {"oneOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("Predictions", "Verdict")]}
    paths: dict[str, Json] = {}
    for suffix, parameters in (
        ("", ("name",)),
        ("/versions/{version}", ("name", "version")),
        ("/labels/{label}", ("name", "label")),
    ):
        model = "/v1/models/{name}" + suffix
        operations = {
            model: _get("Versions of the model and their states.", _json("Status")),
            f"{model}/metadata": _get("Signatures of the model.", _json("Metadata")),
            f"{model}:predict": _post(
                "Scores of images (TensorFlow Serving), or the verdict on one.",
                {**_json("Predict"), **_image_content()},
                {"application/json": {"schema": verdict}},
            ),
            f"{model}:classify": _post(
                "Labels and scores of images (TensorFlow Serving).", _json("Classify"), _json("Classifications")
            ),
            f"{model}:explain": _post(
                "What in one image decides: a heat map over it.",
                {**_json("Explain"), **_image_content()},
                {"image/png": {"schema": {"type": "string", "format": "image-file"}}},
            ),
        }
        paths.update({path: _with_parameters(item, *parameters) for path, item in operations.items()})
    return paths


def _infer_paths(config: ServeConfig) -> dict[str, Json]:
    paths = {
        "/v2": _get("The server.", _json("ServerMetadata")),
        "/v2/health/live": _get("Whether the server runs.", _json("Live"), is_open=True),
        "/v2/health/ready": _get("Whether all models are loaded.", _json("Ready"), is_open=True),
        "/v2/models/stats": _get("What was counted of the models in memory.", _json("ModelStatistics")),
        "/v2/repository/index": _post(
            "All versions of the models.", _json("Index"), _json("RepositoryIndex"), required=False
        ),
    }
    for action in ("load", "unload"):
        item = _refused(f"Refused: models are not {action}ed over HTTP.")
        paths[f"/v2/repository/models/{{name}}/{action}"] = _with_parameters(item, "name")
    length: Json = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Bytes of JSON before the binary tensors; 0: the whole body is one encoded image.",
        "schema": {"type": "integer", "minimum": 0, "maximum": config.max_body_bytes},
    }
    octets: Json = {"application/octet-stream": {"schema": {"type": "string", "format": "image-file"}}}
    for suffix, parameters in (("", ("name",)), ("/versions/{version}", ("name", "version"))):
        model = "/v2/models/{name}" + suffix
        infer = _post("Labels and scores of images.", {**_json("Infer"), **octets}, {**_json("Inferred"), **octets})
        infer["post"] = {**_mapping(infer["post"]), "parameters": [length]}
        operations = {
            model: _get("Inputs and outputs of the model.", _json("ModelMetadata")),
            f"{model}/ready": _get("Whether the model is loaded.", _json("ModelReady")),
            f"{model}/config": _get("Configuration of the model, as Triton writes it.", _json("ModelConfig")),
            f"{model}/stats": _get("What was counted of the model.", _json("ModelStatistics")),
            f"{model}/infer": infer,
        }
        paths.update({path: _with_parameters(item, *parameters) for path, item in operations.items()})
    return paths


def _other_paths(config: ServeConfig) -> dict[str, Json]:
    def text(kind: str) -> Json:
        return {kind: {"schema": {"type": "string"}}}

    paths = {
        "/openapi.json": _get("This document.", {"application/json": {"schema": {"type": "object"}}}),
        "/metrics": _get("Figures for Prometheus.", text("text/plain"), is_open=config.open_metrics),
    }
    if config.page:
        paths["/"] = _get("The page for people.", text("text/html"), is_open=True)
        paths["/page/page.js"] = _get("Its script.", text("text/javascript"), is_open=True)
        paths["/page/page.css"] = _get("Its style.", text("text/css"), is_open=True)
    return paths
