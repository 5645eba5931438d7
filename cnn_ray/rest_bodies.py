# pyright: strict
"""The bodies that clients of TensorFlow Serving's REST API send: predict and classify.

Both forms of predict (rows, columns), both signatures of our SavedModel:

    serving_default   image_bytes: string [N], an encoded image each, {"b64": "..."} in JSON
    serving_pixels    pixels: uint8 [N, H, W, 3], nested lists
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cnn_ray.json_bodies import decode_base64, nested_pixels, parse_object, shown, type_name
from cnn_ray.request_errors import RequestError

IMAGE_SIGNATURE, IMAGE_INPUT = "serving_default", "image_bytes"
PIXEL_SIGNATURE, PIXEL_INPUT = "serving_pixels", "pixels"


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A parsed predict body. `inputs` are encoded images (serving_default) or uint8 [N, H, W, 3] (serving_pixels).

    `columnar` says in which of the two forms the client asked, because the answer comes in the same form.
    """

    inputs: tuple[bytes, ...] | npt.NDArray[np.uint8]
    columnar: bool


def parse_predict(body: bytes, *, size_px: tuple[int, int], max_instances: int) -> PredictRequest:
    """The images or pixels of a predict body, in request order, at least one and at most `max_instances`.

    Nested lists, and inputs named `pixels`, are pixels where the request names no signature.

    Raises:
        RequestError: the body is not JSON, or not a predict request for one of the two signatures.
    """
    document = parse_object(body)
    signature = _signature(document)
    if signature not in (None, IMAGE_SIGNATURE, PIXEL_SIGNATURE):
        raise RequestError(f'Serving signature name: "{shown(signature)}" not found in signature def')
    raw, columnar = _inputs(document)
    if signature is None:
        signature = PIXEL_SIGNATURE if _holds_pixels(raw) else IMAGE_SIGNATURE
    input_name = IMAGE_INPUT if signature == IMAGE_SIGNATURE else PIXEL_INPUT
    values = _column(raw, input_name) if columnar else _rows(_list(raw, "instances"), input_name)
    _check_count(len(values), max_instances)
    if signature == PIXEL_SIGNATURE:
        return PredictRequest(nested_pixels(values, size_px, PIXEL_INPUT), columnar)
    return PredictRequest(tuple(_image(value, index) for index, value in enumerate(values)), columnar)


def parse_classify(body: bytes, *, max_instances: int) -> tuple[bytes, ...]:
    """The encoded images of a classify body, one per example: its feature `image_bytes`, or the one in `context`.

    Raises:
        RequestError: the body is not JSON, or not a classify request with an image in each example.
    """
    document = parse_object(body)
    signature = _signature(document)
    if signature == PIXEL_SIGNATURE:
        raise RequestError(
            "Expected classification signature method_name to be tensorflow/serving/classify. "
            "Was: tensorflow/serving/predict"
        )
    if signature not in (None, IMAGE_SIGNATURE):
        raise RequestError(f"No signature was found with the name: {shown(signature)}")
    context = _example(document["context"]) if "context" in document else {}
    if "examples" not in document:
        raise RequestError("When method is classify, key 'examples' is expected and was not found")
    examples: object = document["examples"]
    if not isinstance(examples, list):
        raise RequestError("Expecting 'examples' value to be an list/array")
    if not examples:
        raise RequestError("'examples' value is an empty array")
    _check_count(len(cast("list[Any]", examples)), max_instances)
    shared = _feature(context, 0) if IMAGE_INPUT in context else None
    images: list[bytes] = []
    for index, value in enumerate(cast("list[Any]", examples)):
        example = _example(value)
        image = _feature(example, index) if IMAGE_INPUT in example else shared
        if image is None:
            raise RequestError(f"Failed to process element: {index}. Feature: {IMAGE_INPUT} is required")
        images.append(image)
    return tuple(images)


def _signature(document: dict[str, Any]) -> str | None:
    signature: object = document.get("signature_name", "")
    if not isinstance(signature, str):
        raise RequestError("JSON Value not formatted correctly. 'signature_name' key must be a string value.")
    return signature or None  # TensorFlow Serving reads "" as none


def _inputs(document: dict[str, Any]) -> tuple[object, bool]:
    if "instances" in document and "inputs" in document:
        raise RequestError("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
    if "instances" in document:
        return document["instances"], False
    if "inputs" not in document:
        raise RequestError("Missing 'inputs' or 'instances' key")
    return document["inputs"], True


def _holds_pixels(raw: object) -> bool:
    """Whether nested lists are meant where the request does not say so: by the first value, or by its name."""
    first = raw
    if isinstance(raw, list) and raw:
        first = cast("list[object]", raw)[0]
    if isinstance(first, dict):
        return PIXEL_INPUT in first and IMAGE_INPUT not in first
    return isinstance(first, list)


def _column(inputs: object, input_name: str) -> list[Any]:
    if isinstance(inputs, dict) and not _is_b64(cast("dict[str, Any]", inputs)):
        named = cast("dict[str, Any]", inputs)
        if input_name not in named:
            raise RequestError(f"Missing named input: {input_name} in 'inputs' object.")
        return _list(named[input_name], "inputs")
    return _list(cast("object", inputs), "inputs")


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
        raise RequestError(f"JSON Value of type {type_name(value)}: Expecting '{key}' to be an list/array")
    if not value:
        raise RequestError(f"No values in '{key}' array")
    return cast("list[Any]", value)


def _check_count(count: int, max_instances: int) -> None:
    if count > max_instances:
        raise RequestError(f"Expected at most {max_instances} instances. Received: {count}. Next: split them.")


def _is_b64(value: dict[str, Any]) -> bool:
    return len(value) == 1 and isinstance(value.get("b64"), str)


def _image(value: object, index: int) -> bytes:
    if not isinstance(value, dict) or not _is_b64(cast("dict[str, Any]", value)):
        raise RequestError(
            f'Failed to process element: {index}. Expected an encoded image as {{"b64": "..."}}. '
            f"Received: a JSON {type_name(cast('object', value))}."
        )
    return decode_base64(cast("dict[str, str]", value)["b64"], index)


def _example(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"Example must be JSON object but got JSON {type_name(value)}")
    return cast("dict[str, Any]", value)


def _feature(example: dict[str, Any], index: int) -> bytes:
    value: object = example[IMAGE_INPUT]
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    if len(values) != 1:
        raise RequestError(f"Failed to process element: {index}. Feature: {IMAGE_INPUT} wants exactly one value")
    return _image(values[0], index)
