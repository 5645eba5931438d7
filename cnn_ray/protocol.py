# pyright: strict
"""TensorFlow Serving's REST protocol as pure functions: paths and bodies in, values out; values in, bodies out.

Words, routes, shapes and statuses follow tensorflow/serving's api_rest.md, http_rest_api_util.cc and json_tensor.cc for
the two signatures of our SavedModel, so that a client of `tensorflow_model_server` needs no change:

    serving_default   image_bytes: string [N] (an encoded image each)  -> classes: string [N, C], scores: float32 [N, C]
    serving_pixels    pixels: uint8 [N, H, W, 3]                       -> scores: float32 [N, C]

Ours alone: nested lists are taken for pixels where no signature is named, `:classify` works on serving_default (there
it wants a signature over tf.Example), a wrong method is a 405 and not a 400, and `:explain`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from cnn_ray import json_bodies
from cnn_ray.json_bodies import shown
from cnn_ray.records import RowFailure
from cnn_ray.request_errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    DeadlineError,
    MethodError,
    OverloadedError,
    RequestError,
    UnauthorizedError,
    UnknownLabelError,
    UnknownModelError,
    UnsupportedTypeError,
)
from cnn_ray.rest_bodies import (
    IMAGE_INPUT,
    IMAGE_SIGNATURE,
    PIXEL_INPUT,
    PIXEL_SIGNATURE,
    PredictRequest,
    parse_classify,
    parse_predict,
)

__all__ = [
    "BodyTimeoutError",
    "BodyTooLargeError",
    "DeadlineError",
    "MethodError",
    "OverloadedError",
    "PredictRequest",
    "RequestError",
    "Route",
    "UnauthorizedError",
    "UnknownLabelError",
    "UnknownModelError",
    "UnsupportedTypeError",
    "build_classifications",
    "build_error",
    "build_metadata",
    "build_predictions",
    "build_status",
    "build_verdict",
    "check_body_size",
    "declared_size",
    "model_not_found",
    "parse_classify",
    "parse_predict",
    "parse_route",
    "row_error",
]
"""The whole of the protocol in one name; the errors and the bodies of requests have modules of their own."""

Scores = npt.NDArray[np.float32]

Action = Literal["predict", "classify", "explain", "status", "metadata"]
State = Literal["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]

_MODEL = r"/v1/models/([^/:]+)(?:/versions/([0-9]+)|/labels/([^/:]+))?"
_POST_PATH = re.compile(_MODEL + r":(classify|regress|predict|explain)", re.I | re.A)
_GET_PATH = re.compile(_MODEL + r"(?:/(metadata))?", re.I | re.A)
_NO_MODEL_PATH = re.compile(r"/v1/models(?:/versions/[0-9]+|/labels/[^/:]+)?(?:/metadata)?", re.I | re.A)
_MAX_VERSION = 2**63 - 1
_INIT_OP = "__saved_model_init_op"
_PREDICT_METHOD = "tensorflow/serving/predict"


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is about: a model and its version, a label (one of our aliases), or neither of the two."""

    action: Action
    name: str
    version: int | None = None
    label: str | None = None


def parse_route(method: str, path: str) -> Route:
    """What the request is about, from its method and its path as it was sent (percent-encoded, without the query).

    Raises:
        UnknownModelError: the path is outside of /v1/.
        MethodError: the path wants another method.
        RequestError: the path is malformed, or the version does not fit into 64 bits.
    """
    malformed = f"Malformed request: {shown(method)} {shown(path)}"
    match = _POST_PATH.fullmatch(path)
    if match is not None:
        if method != "POST":
            raise _method_error(malformed, "POST")
        name, version, label, action = match.groups()
        if action.lower() == "regress":
            raise RequestError(
                f"Expected regression signature method_name to be tensorflow/serving/regress. Was: {_PREDICT_METHOD}"
            )
        return _route(cast("Action", action.lower()), name, version, label)
    match = _GET_PATH.fullmatch(path)
    if match is not None:
        if method not in ("GET", "HEAD"):
            raise _method_error(malformed, "GET, HEAD")
        name, version, label, metadata = match.groups()
        return _route("metadata" if metadata else "status", name, version, label)
    if not path.lower().startswith("/v1/"):
        raise UnknownModelError(malformed)
    if method in ("GET", "HEAD") and _NO_MODEL_PATH.fullmatch(path):
        raise RequestError("Missing model name in request.")
    raise RequestError(malformed)


def model_not_found(route: Route) -> UnknownModelError:
    """The error for a model, version or label that is not served here, in TensorFlow Serving's words."""
    name = shown(route.name)
    if route.label is not None:
        return UnknownLabelError(f"Unrecognized servable version label: {shown(route.label)}")
    if route.action != "status":
        spec = f"Latest({name})" if route.version is None else f"Specific({name}, {route.version})"
        return UnknownModelError(f"Servable not found for request: {spec}")
    if route.version is None:
        return UnknownModelError(f"Could not find any versions of model {name}")
    return UnknownModelError(f"Could not find version {route.version} of model {name}")


def check_body_size(size_bytes: int, max_body_bytes: int) -> None:
    """Returns when a body of so many bytes is allowed.

    Raises:
        BodyTooLargeError: it is larger.
    """
    if size_bytes > max_body_bytes:
        raise BodyTooLargeError(
            f"Expected a body of at most {max_body_bytes} bytes. Received: more. Next: send fewer instances."
        )


def declared_size(content_length: str | None) -> int:
    """Bytes that a Content-Length header announces; 0 without the header (a chunked body is counted while it is read).

    Raises:
        RequestError: the header is not a number.
    """
    if content_length is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", content_length):
        raise RequestError(f"Expected a number in Content-Length. Received: {shown(content_length)}.")
    return int(content_length)


def row_error(index: int, failure: RowFailure) -> RequestError:
    """The error for an image that could not be read; it names the instance (from 0) and the quarantine code."""
    return RequestError(f"Instance {index} is not a readable image: {failure.code.value}: {failure.detail}")


def build_predictions(request: PredictRequest, labels: Sequence[str], scores: Scores) -> bytes:
    """The JSON answer to a predict request, from float32 [N, C] scores with one column per label.

    Each number is the float32 written as a double with all its digits, so a client that reads it back as float32 gets
    the same bits. NaN and Infinity are written as the tokens that TensorFlow Serving uses too.
    """
    rows = _numbers(scores)
    if not isinstance(request.inputs, tuple):  # serving_pixels has one output, and a single output has no name
        return json_bodies.build({"outputs" if request.columnar else "predictions": rows})
    classes = list(labels)
    if request.columnar:
        return json_bodies.build({"outputs": {"classes": [classes] * len(rows), "scores": rows}})
    return json_bodies.build({"predictions": [{"classes": classes, "scores": row} for row in rows]})


def build_classifications(labels: Sequence[str], scores: Scores) -> bytes:
    """The JSON answer to a classify request: per example the pairs of label and score, in label order.

    The key is `results`, as in json_tensor.cc and its tests; api_rest.md says `result` in one place.
    """
    pairs = [[list(pair) for pair in zip(labels, row, strict=True)] for row in _numbers(scores)]
    return json_bodies.build({"results": pairs})


def build_verdict(
    name: str,
    version: int,
    labels: Sequence[str],
    scores: Scores,
    *,
    positive_label: str | None,
    threshold: float | None,
) -> bytes:
    """The JSON answer for people and scripts, from the float32 [C] scores of one image.

    `flagged` says whether the score of the positive label reaches the threshold; null where the model has none.
    """
    best = int(scores.argmax())
    by_label = dict(zip(labels, cast("list[float]", scores.astype(np.float64).tolist()), strict=True))
    flagged = None if positive_label is None or threshold is None else by_label[positive_label] >= threshold
    verdict = {"label": labels[best], "score": by_label[labels[best]], "flagged": flagged, "scores": by_label}
    return json_bodies.build({**verdict, "model": name, "version": version})


def build_status(versions: Sequence[tuple[int, State]], failures: Mapping[int, str] | None = None) -> bytes:
    """The JSON answer to a status request: versions and their states, the newest first as in TensorFlow Serving.

    `failures` are versions that could not be loaded, with the reason; TensorFlow Serving calls their state END.
    """
    ok = {"error_code": "OK", "error_message": ""}
    states = {version: (state, ok) for version, state in versions}
    for version, reason in (failures or {}).items():
        states[version] = ("END", {"error_code": "DATA_LOSS", "error_message": reason})
    rows = [
        {"version": str(version), "state": state, "status": status}
        for version, (state, status) in sorted(states.items(), reverse=True)
    ]
    return json_bodies.build({"model_version_status": rows})


def build_metadata(name: str, version: int, labels: Sequence[str], size_px: tuple[int, int]) -> bytes:
    """The JSON answer to a metadata request: the signatures of the model's SavedModel, tensor for tensor."""
    height, width = size_px
    classes = _tensor("StatefulPartitionedCall:0", "DT_STRING", -1, len(labels))
    image_bytes = _tensor(f"{IMAGE_SIGNATURE}_{IMAGE_INPUT}:0", "DT_STRING", -1)
    pixels = _tensor(f"{PIXEL_SIGNATURE}_{PIXEL_INPUT}:0", "DT_UINT8", -1, height, width, 3)
    init: dict[str, object] = {"dtype": "DT_INVALID", "tensor_shape": {"dim": (), "unknown_rank": True}, "name": "NoOp"}
    signatures = {
        _INIT_OP: _signature({}, {_INIT_OP: init}, ""),
        IMAGE_SIGNATURE: _signature(
            {IMAGE_INPUT: image_bytes},
            {"classes": classes, "scores": _tensor("StatefulPartitionedCall:1", "DT_FLOAT", -1, len(labels))},
        ),
        PIXEL_SIGNATURE: _signature(
            {PIXEL_INPUT: pixels}, {"scores": _tensor("StatefulPartitionedCall_1:0", "DT_FLOAT", -1, len(labels))}
        ),
    }
    spec = {"name": name, "signature_name": "", "version": str(version)}
    return json_bodies.build({"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}})


def build_error(message: str) -> bytes:
    """The JSON body of every answer that is not a success."""
    return json_bodies.build({"error": message})


def _numbers(scores: Scores) -> list[list[float]]:
    return cast("list[list[float]]", scores.astype(np.float64).tolist())


def _tensor(name: str, dtype: str, *shape: int) -> dict[str, object]:
    dims = [{"size": str(size), "name": ""} for size in shape]
    return {"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": name}


def _signature(
    inputs: dict[str, object], outputs: dict[str, object], method_name: str = _PREDICT_METHOD
) -> dict[str, object]:
    return {"inputs": inputs, "outputs": outputs, "method_name": method_name, "defaults": {}}


def _method_error(message: str, allow: str) -> MethodError:
    error = MethodError(message)
    error.allow = allow
    return error


def _route(action: Action, name: str, version: str | None, label: str | None) -> Route:
    if version is not None and (len(version) > 4000 or int(version) > _MAX_VERSION):
        raise RequestError(f"Failed to convert version: {shown(version)} to numeric.")
    return Route(action, unquote(name), None if version is None else int(version), label and unquote(label))
