# pyright: strict
"""TensorFlow Serving's REST protocol as pure functions: paths and bodies in, values out; values in, bodies out.

Words, routes and shapes follow tensorflow/serving's api_rest.md, json_tensor.cc and http_rest_api_handler.cc for the
two signatures of our SavedModel, so that a client of `tensorflow_model_server` needs no change:

    serving_default   image_bytes: string [N] (an encoded image each)  -> classes: string [N, C], scores: float32 [N, C]
    serving_pixels    pixels: uint8 [N, H, W, 3]                       -> scores: float32 [N, C]
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt

from cnn_ray.errors import CnnRayError
from cnn_ray.records import RowFailure

IMAGE_SIGNATURE, IMAGE_INPUT = "serving_default", "image_bytes"
PIXEL_SIGNATURE, PIXEL_INPUT = "serving_pixels", "pixels"

_PREDICT_PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/([0-9]+))?:predict")
_STATUS_PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/([0-9]+))?")
_MAX_VERSION = 2**63 - 1
_SHOWN_CHARS = 100


class RequestError(CnnRayError):
    """The client's request cannot be answered; the message goes out as {"error": ...}."""

    http_status: ClassVar[int] = 400


class UnknownModelError(RequestError):
    """The request is about a model, version or path that is not served here."""

    http_status: ClassVar[int] = 404


class MethodError(RequestError):
    """The path exists but not with this HTTP method."""

    http_status: ClassVar[int] = 405


class BodyTooLargeError(RequestError):
    """The body has more bytes than one request may bring."""

    http_status: ClassVar[int] = 413


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is about. `version` is None where the path names none."""

    action: Literal["predict", "status"]
    name: str
    version: int | None


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A parsed predict body. `inputs` are encoded images (serving_default) or uint8 [N, H, W, 3] (serving_pixels).

    `columnar` says in which of the two forms the client asked, because the answer comes in the same form.
    """

    inputs: tuple[bytes, ...] | npt.NDArray[np.uint8]
    columnar: bool


def parse_route(method: str, path: str) -> Route:
    """What the request is about, from its method and its unquoted path.

    Raises:
        UnknownModelError: no such path.
        MethodError: the path wants another method.
        RequestError: the version does not fit into 64 bits.
    """
    actions: tuple[tuple[re.Pattern[str], Literal["predict", "status"], tuple[str, ...]], ...] = (
        (_PREDICT_PATH, "predict", ("POST",)),
        (_STATUS_PATH, "status", ("GET", "HEAD")),
    )
    for pattern, action, methods in actions:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        if method not in methods:
            raise MethodError(f"Expected {' or '.join(methods)} for {_shown(path)}. Received: {_shown(method)}.")
        return Route(action, match[1], _version(match[2]))
    raise UnknownModelError(f"Malformed request: {_shown(method)} {_shown(path)}")


def check_model(route: Route, name: str, version: int) -> None:
    """Returns when the route asks for the given model and version, or for the model without a version.

    Raises:
        UnknownModelError: it asks for another one; the words are TensorFlow Serving's.
    """
    if route.name == name and route.version in (None, version):
        return
    asked = _shown(route.name)
    if route.action == "predict":
        spec = f"Latest({asked})" if route.version is None else f"Specific({asked}, {route.version})"
        raise UnknownModelError(f"Servable not found for request: {spec}")
    if route.version is None:
        raise UnknownModelError(f"Could not find any versions of model {asked}")
    raise UnknownModelError(f"Could not find version {route.version} of model {asked}")


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
        raise RequestError(f"Expected a number in Content-Length. Received: {_shown(content_length)}.")
    return int(content_length)


def parse_predict(body: bytes, *, size_px: tuple[int, int], max_instances: int) -> PredictRequest:
    """The images or pixels of a predict body, in request order, at least one and at most `max_instances`.

    Nothing is built in memory that is not bounded by the body: lengths and types are checked before conversion.

    Raises:
        RequestError: the body is not JSON, or not a predict request for one of the two signatures.
    """
    document = _parse_object(body)
    signature = document.get("signature_name", IMAGE_SIGNATURE)
    if not isinstance(signature, str):
        raise RequestError("JSON Value not formatted correctly. 'signature_name' key must be a string value.")
    signature = signature or IMAGE_SIGNATURE  # TensorFlow Serving reads "" as the default one
    if signature not in (IMAGE_SIGNATURE, PIXEL_SIGNATURE):
        raise RequestError(f'Serving signature name: "{_shown(signature)}" not found in signature def')
    input_name = IMAGE_INPUT if signature == IMAGE_SIGNATURE else PIXEL_INPUT
    values, columnar = _values(document, input_name)
    if len(values) > max_instances:
        raise RequestError(f"Expected at most {max_instances} instances. Received: {len(values)}. Next: split them.")
    if signature == PIXEL_SIGNATURE:
        return PredictRequest(_pixels(values, size_px), columnar)
    return PredictRequest(tuple(_image(value, index) for index, value in enumerate(values)), columnar)


def row_error(index: int, failure: RowFailure) -> RequestError:
    """The error for an image that could not be read; it names the instance (from 0) and the quarantine code."""
    return RequestError(f"Instance {index} is not a readable image: {failure.code.value}: {failure.detail}")


def build_predictions(request: PredictRequest, labels: Sequence[str], scores: npt.NDArray[np.float32]) -> bytes:
    """The JSON answer to a predict request, from float32 [N, C] scores with one column per label.

    Each number is the float32 written as a double with all its digits, so a client that reads it back as float32 gets
    the same bits. NaN and Infinity are written as the tokens that TensorFlow Serving uses too.
    """
    rows = cast("list[list[float]]", scores.astype(np.float64).tolist())
    if not isinstance(request.inputs, tuple):  # serving_pixels has one output, and a single output has no name
        return _json({"outputs" if request.columnar else "predictions": rows})
    classes = list(labels)
    if request.columnar:
        return _json({"outputs": {"classes": [classes] * len(rows), "scores": rows}})
    return _json({"predictions": [{"classes": classes, "scores": row} for row in rows]})


def build_status(version: int) -> bytes:
    """The JSON answer to a status request: the one version, ready to predict."""
    status = {"error_code": "OK", "error_message": ""}
    return _json({"model_version_status": [{"version": str(version), "state": "AVAILABLE", "status": status}]})


def build_error(message: str) -> bytes:
    """The JSON body of every answer that is not a success."""
    return _json({"error": message})


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _version(digits: str | None) -> int | None:
    if digits is None:
        return None
    if len(digits) > len(str(_MAX_VERSION)) or int(digits) > _MAX_VERSION:
        raise RequestError(f"Failed to convert version: {_shown(digits)} to numeric.")
    return int(digits)


def _parse_object(body: bytes) -> dict[str, Any]:
    if not body:
        raise RequestError("JSON Parse error: The document is empty")
    try:
        document: object = json.loads(body)
    except json.JSONDecodeError as error:
        raise RequestError(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except UnicodeDecodeError:
        raise RequestError("JSON Parse error: the document is not UTF-8") from None
    except RecursionError:
        raise RequestError("JSON Parse error: the document is nested too deeply") from None
    except ValueError:  # an integer of more than 4,300 digits
        raise RequestError("JSON Parse error: a number is too long") from None
    if not isinstance(document, dict):
        raise RequestError(f"JSON Value of type {_type_name(document)}: Is not object")
    return cast("dict[str, Any]", document)


def _values(document: dict[str, Any], input_name: str) -> tuple[list[Any], bool]:
    if "instances" in document and "inputs" in document:
        raise RequestError("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
    if "instances" in document:
        return _rows(_list(document["instances"], "instances"), input_name), False
    if "inputs" not in document:
        raise RequestError("Missing 'inputs' or 'instances' key")
    inputs: object = document["inputs"]
    if isinstance(inputs, dict) and not _is_b64(cast("dict[str, Any]", inputs)):
        named = cast("dict[str, Any]", inputs)
        if input_name not in named:
            raise RequestError(f"Missing named input: {input_name} in 'inputs' object.")
        return _list(named[input_name], "inputs"), True
    return _list(cast("object", inputs), "inputs"), True


def _rows(instances: list[Any], input_name: str) -> list[Any]:
    named = isinstance(instances[0], dict) and not _is_b64(instances[0])  # pyright: ignore[reportUnknownArgumentType]
    if not named:
        return instances  # an object among them is refused by its type later
    rows: list[Any] = []
    for index, instance in enumerate(instances):
        if not isinstance(instance, dict) or set(cast("dict[str, Any]", instance)) != {input_name}:
            raise RequestError(
                f"Failed to process element: {index} of 'instances' list. "
                f"JSON object keys must be equal to: {input_name}"
            )
        rows.append(cast("dict[str, Any]", instance)[input_name])
    return rows


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"JSON Value of type {_type_name(value)}: Expecting '{key}' to be an list/array")
    if not value:
        raise RequestError(f"No values in '{key}' array")
    return cast("list[Any]", value)


def _is_b64(value: dict[str, Any]) -> bool:
    return len(value) == 1 and isinstance(value.get("b64"), str)


def _image(value: object, index: int) -> bytes:
    if not isinstance(value, dict) or not _is_b64(cast("dict[str, Any]", value)):
        raise RequestError(
            f'Failed to process element: {index}. Expected an encoded image as {{"b64": "..."}}. '
            f"Received: a JSON {_type_name(cast('object', value))}."
        )
    text = cast("dict[str, str]", value)["b64"]
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    compact = "".join(text.split())  # absl::Base64Unescape allows white space and missing padding too
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4 if "=" not in compact else 0), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"Failed to process element: {index}. Unable to base64 decode") from None


def _pixels(values: list[Any], size_px: tuple[int, int]) -> npt.NDArray[np.uint8]:
    height, width = size_px
    level = values
    for length in (height, width, 3):
        if any(type(item) is not list or len(cast("list[Any]", item)) != length for item in level):
            raise RequestError(f"Expected '{PIXEL_INPUT}' as nested lists of shape [N, {height}, {width}, 3].")
        level = list(chain.from_iterable(cast("list[list[Any]]", level)))
    if any(kind is not int for kind in set(map(type, level))) or min(level) < 0 or max(level) > 255:
        raise RequestError(f"Expected '{PIXEL_INPUT}' as whole numbers from 0 to 255 (uint8).")
    return np.frombuffer(bytearray(level), np.uint8).reshape(len(values), height, width, 3)


def _type_name(value: object) -> str:
    names = {"NoneType": "Null", "bool": "Bool", "int": "Number", "float": "Number", "str": "String", "list": "Array"}
    return names.get(type(value).__name__, "Object")
