# pyright: strict
"""The Open Inference Protocol v2 over HTTP as pure functions, for clients of Triton, KServe and OpenVINO Model Server.

Follows kserve/open-inference-protocol's inference_rest.md and Triton's extension_binary_data.md. What a request may
hold is in `cnn_ray.infer_bodies`; the answer has both or one of

    label    BYTES [N]      the class with the best score
    scores   FP32 [N, C]    in the order of the labels, which the model's metadata names; with the parameter
                            `classification: K` BYTES [N, K], the best classes as "score:index:label"
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from cnn_ray import __version__, json_bodies
from cnn_ray.infer_bodies import InferRequest, parse_infer
from cnn_ray.json_bodies import shown
from cnn_ray.request_errors import MethodError, UnknownModelError
from cnn_ray.triton_extensions import EXTENSIONS, classified

__all__ = [
    "Action",
    "InferRequest",
    "Route",
    "build_health",
    "build_infer",
    "build_model_metadata",
    "build_model_ready",
    "build_server_metadata",
    "model_not_found",
    "parse_infer",
    "parse_route",
]
"""The whole of the protocol in one name; the bodies of requests have a module of their own."""

Action = Literal[
    "live",
    "ready",
    "server_metadata",
    "server_statistics",
    "model_metadata",
    "model_ready",
    "model_config",
    "model_statistics",
    "infer",
    "repository_index",
    "repository_control",
]

_PATHS: tuple[tuple[re.Pattern[str], Action], ...] = (
    (re.compile(r"/v2/health/live"), "live"),
    (re.compile(r"/v2/health/ready"), "ready"),
    (re.compile(r"/v2/?"), "server_metadata"),
    (re.compile(r"/v2/models/stats"), "server_statistics"),
    (re.compile(r"/v2/repository/index"), "repository_index"),
    (re.compile(r"/v2/repository/models/([^/]+)/(?:load|unload)"), "repository_control"),
    (re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?"), "model_metadata"),
    (re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/ready"), "model_ready"),
    (re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/config"), "model_config"),
    (re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/stats"), "model_statistics"),
    (re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer"), "infer"),
)
_POSTED = ("infer", "repository_index", "repository_control")
_MAX_VERSION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is about; `name` is empty where the path names no model."""

    action: Action
    name: str = ""
    version: int | None = None


def parse_route(method: str, path: str) -> Route:
    """What the request is about, from its method and its path as it was sent (percent-encoded, without the query).

    Raises:
        UnknownModelError: no such path, or the version is not a number.
        MethodError: the path wants another method.
    """
    for pattern, action in _PATHS:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        allowed = ("POST",) if action in _POSTED else ("GET", "HEAD")
        if method not in allowed:
            error = MethodError(f"Expected {' or '.join(allowed)} for {shown(path)}. Received: {shown(method)}.")
            error.allow = ", ".join(allowed)
            raise error
        if not pattern.groups:
            return Route(action)
        name, version = unquote(match[1]), match[2] if pattern.groups > 1 else None
        if version is None:
            return Route(action, name)
        if not re.fullmatch(r"[0-9]{1,19}", version) or int(version) > _MAX_VERSION:
            raise UnknownModelError(f"Request for unknown model: '{shown(name)}' version {shown(version)} is not found")
        return Route(action, name, int(version))
    raise UnknownModelError(f"Malformed request: {shown(method)} {shown(path)}")


def model_not_found(route: Route) -> UnknownModelError:
    """The error for a model or version that is not served here, in Triton's words."""
    version = "" if route.version is None else f" version {route.version}"
    return UnknownModelError(f"Request for unknown model: '{shown(route.name)}'{version} is not found")


def build_infer(
    request: InferRequest, name: str, version: int, labels: Sequence[str], scores: npt.NDArray[np.float32]
) -> tuple[bytes, int | None]:
    """The body of the answer to an infer request, from float32 [N, C] scores; and, where binary tensors follow the
    JSON, its length for the header Inference-Header-Content-Length."""
    tensors: list[dict[str, object]] = []
    tail: list[bytes] = []
    for output, binary in request.outputs:
        if output == "label":
            texts = [labels[int(index)] for index in scores.argmax(axis=1)]
            tensor: dict[str, object] = {"name": output, "datatype": "BYTES", "shape": [len(texts)]}
            values, packed = texts, _packed(texts)
        elif request.classes:
            best = classified(scores, labels, request.classes)
            tensor = {"name": output, "datatype": "BYTES", "shape": [len(best), len(best[0])]}
            values = [text for row in best for text in row]
            packed = _packed(values)
        else:
            tensor = {"name": output, "datatype": "FP32", "shape": list(scores.shape)}
            values, packed = scores.astype(np.float64).ravel().tolist(), scores.astype("<f4").tobytes()
        if binary:
            tail.append(packed)
            tensor["parameters"] = {"binary_data_size": len(packed)}
        else:
            tensor["data"] = values
        tensors.append(tensor)
    answer: dict[str, object] = {"model_name": name, "model_version": str(version), "outputs": tensors}
    if request.id is not None:
        answer["id"] = request.id
    head = json_bodies.build(answer)
    return b"".join([head, *tail]), len(head) if tail else None


def build_health(action: Action) -> bytes:
    """The JSON answer of the server's two health routes, `live` and `ready`, when it is."""
    return json_bodies.build({action: True})


def build_server_metadata() -> bytes:
    """The JSON answer that describes this server."""
    return json_bodies.build({"name": "cnn_ray", "version": __version__, "extensions": list(EXTENSIONS)})


def build_model_ready(name: str, *, ready: bool = True) -> bytes:
    """The JSON answer of a model's ready route."""
    return json_bodies.build({"name": name, "ready": ready})


def build_model_metadata(name: str, versions: Sequence[int], labels: Sequence[str], size_px: tuple[int, int]) -> bytes:
    """The JSON answer that describes a model. Its parameters `label_0` ... name the columns of `scores`.

    Of the two inputs a request has one.
    """
    return json_bodies.build(
        {
            "name": name,
            "versions": [str(version) for version in versions],
            "platform": "tensorflow_savedmodel",
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [-1]},
                {"name": "pixels", "datatype": "UINT8", "shape": [-1, *size_px, 3]},
            ],
            "outputs": [
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
                {"name": "scores", "datatype": "FP32", "shape": [-1, len(labels)]},
            ],
            "parameters": {f"label_{index}": label for index, label in enumerate(labels)},
        }
    )


def _packed(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(data)) + data for data in encoded)
