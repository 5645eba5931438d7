# pyright: strict
"""The infer bodies that clients of the Open Inference Protocol v2 send: JSON, and Triton's binary tensor extension.

A request has one of

    image    BYTES [N] or [N, 1]   encoded images: as binary tensor; in JSON as base64 text, because a JSON string
                                   holds Unicode and no PNG or JPEG is valid UTF-8
    pixels   UINT8 [N, H, W, 3]    of the model's own size: as binary tensor, or as nested or flat list in JSON

With `Inference-Header-Content-Length: 0` the whole body is one encoded image, as in Triton's raw binary requests.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cnn_ray.json_bodies import decode_base64, flat_pixels, parse_object, shown
from cnn_ray.request_errors import RequestError

OUTPUTS = ("label", "scores")

_REFUSED_PARAMETERS = ("shared_memory_region",)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed infer body. `inputs` are encoded images or uint8 [N, H, W, 3].

    `outputs` are the names to answer, in order, each with whether it is to be a binary tensor. `classes` is how many of
    the best classes to answer in place of the scores; 0: the scores themselves.
    """

    inputs: tuple[bytes, ...] | npt.NDArray[np.uint8]
    id: str | None = None
    outputs: tuple[tuple[str, bool], ...] = tuple((name, False) for name in OUTPUTS)
    classes: int = 0


def parse_infer(
    body: bytes, header_length: str | None, *, size_px: tuple[int, int], max_instances: int
) -> InferRequest:
    """The images or pixels of an infer body, at least one and at most `max_instances`, and what to answer.

    `header_length` is the header Inference-Header-Content-Length: where the JSON ends and binary tensors begin.

    Raises:
        RequestError: the body is not an infer request for this model.
    """
    length = _header_length(header_length, len(body))
    if length == 0 and header_length is not None:
        if not body:
            raise RequestError("Expected an encoded image as the body. Received: nothing.")
        return InferRequest((body,))
    document = parse_object(body[:length])
    inputs: object = document.get("inputs")
    if not isinstance(inputs, list) or len(cast("list[Any]", inputs)) != 1:
        raise RequestError("Expected 'inputs' as a list of one tensor, named 'image' or 'pixels'.")
    tensor = _object(cast("list[object]", inputs)[0], "an input")
    request_id: object = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("Expected 'id' as a string.")
    outputs, classes = _outputs(document)
    shape = _shape(tensor)
    if not 1 <= shape[0] <= max_instances:
        raise RequestError(f"Expected 1 to {max_instances} instances. Received: {shape[0]}. Next: split them.")
    raw = _binary(tensor, memoryview(body)[length:])
    name: object = tensor.get("name")
    if name == "image":
        return InferRequest(_images(tensor, shape, raw), request_id, outputs, classes)
    if name == "pixels":
        return InferRequest(_pixels(tensor, shape, raw, size_px), request_id, outputs, classes)
    raise RequestError(f"unexpected inference input '{shown(str(name))}': expected 'image' or 'pixels'")


def _header_length(text: str | None, size_bytes: int) -> int:
    if text is None:
        return size_bytes
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > size_bytes:
        raise RequestError(
            f"Expected at most {size_bytes} in Inference-Header-Content-Length. Received: {shown(text)}."
        )
    return int(text)


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"Expected {what} as a JSON object.")
    return cast("dict[str, Any]", value)


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    given: object = holder.get("parameters")  # optional fields may be null: many JSON libraries write them so
    parameters = {} if given is None else _object(given, "'parameters'")
    for name in _REFUSED_PARAMETERS:
        if parameters.get(name) is not None:
            raise RequestError(f"The parameter '{name}' is not supported here.")
    return parameters


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value: object = parameters.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"Expected the parameter '{name}' as true or false.")
    return value


def _outputs(document: dict[str, Any]) -> tuple[tuple[tuple[str, bool], ...], int]:
    """Return the outputs to answer, and how many classes of the scores."""
    binary = _flag(_parameters(document), "binary_data_output", False)
    wanted: object = document.get("outputs")
    if wanted is None:
        wanted = []
    if not isinstance(wanted, list):
        raise RequestError("Expected 'outputs' as a list.")
    outputs: dict[str, bool] = {}
    classes = 0
    for item in cast("list[object]", wanted)[: len(OUTPUTS) + 1]:
        output = _object(item, "an output")
        name: object = output.get("name")
        if name not in OUTPUTS or name in outputs:
            raise RequestError(
                f"unexpected inference output '{shown(str(name))}': expected 'label' and 'scores' at most"
            )
        parameters = _parameters(output)
        outputs[str(name)] = _flag(parameters, "binary_data", binary)
        classes = _classes(parameters, str(name)) or classes
    return tuple(outputs.items()) or tuple((name, binary) for name in OUTPUTS), classes


def _classes(parameters: dict[str, Any], output: str) -> int:
    """Return how many classes are asked for, 0 for none."""
    count: object = parameters.get("classification")
    if count is None:
        return 0
    if type(count) is not int or count < 0:
        raise RequestError("Expected the parameter 'classification' as a whole number, 0 or more.")
    if count and output != "scores":
        raise RequestError(f"Expected the parameter 'classification' of 'scores' only. Received: of '{output}'.")
    return count


def _shape(tensor: dict[str, Any]) -> list[int]:
    shape: object = tensor.get("shape")
    if isinstance(shape, list) and 1 <= len(cast("list[object]", shape)) <= 4:
        sizes = cast("list[object]", shape)
        if all(type(size) is int and 0 <= size < 2**31 for size in sizes):
            return cast("list[int]", sizes)
    raise RequestError("Expected 'shape' as a list of 1 to 4 whole numbers.")


def _binary(tensor: dict[str, Any], rest: memoryview) -> memoryview | None:
    size: object = _parameters(tensor).get("binary_data_size")
    if size is None:
        if rest:
            raise RequestError(f"unexpected additional input data: {len(rest)} bytes after the JSON")
        return None
    if type(size) is not int or size != len(rest):
        raise RequestError(f"Expected {len(rest)} as 'binary_data_size': so many bytes follow the JSON.")
    if tensor.get("data") is not None:
        raise RequestError("Expected either 'data' or 'binary_data_size'. Received: both.")
    return rest


def _check_datatype(tensor: dict[str, Any], datatype: str) -> None:
    received: object = tensor.get("datatype")
    if received != datatype:
        raise RequestError(f"Expected datatype {datatype} of '{tensor['name']}'. Received: {shown(str(received))}.")


def _flat(tensor: dict[str, Any], count: int, depth: int) -> list[Any]:
    """The `count` elements of a tensor's data, which may be a flat list or one nested as its shape says."""
    data: object = tensor.get("data")
    level = cast("list[Any]", data) if isinstance(data, list) else []
    for _ in range(depth - 1):
        if len(level) == count or not all(type(item) is list for item in level):
            break
        level = list(chain.from_iterable(level))
    if len(level) != count or not isinstance(data, list):
        raise RequestError(f"Expected 'data' with the {count} elements that 'shape' says.")
    return level


def _images(tensor: dict[str, Any], shape: list[int], raw: memoryview | None) -> tuple[bytes, ...]:
    _check_datatype(tensor, "BYTES")
    if shape[1:] not in ([], [1]):
        raise RequestError(f"Expected the shape [N] or [N, 1] of 'image'. Received: {shape}.")
    if raw is not None:
        return _unpacked(raw, shape[0])
    images: list[bytes] = []
    for index, text in enumerate(_flat(tensor, shape[0], len(shape))):
        if isinstance(text, list) and len(cast("list[Any]", text)) == 1:
            text = cast("list[Any]", text)[0]
        if not isinstance(text, str):
            raise RequestError(f"Failed to process element: {index}. Expected base64 text in 'data'.")
        images.append(decode_base64(text, index))
    return tuple(images)


def _pixels(
    tensor: dict[str, Any], shape: list[int], raw: memoryview | None, size_px: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    _check_datatype(tensor, "UINT8")
    if shape[1:] != [*size_px, 3]:
        raise RequestError(f"Expected the shape [N, {size_px[0]}, {size_px[1]}, 3] of 'pixels'. Received: {shape}.")
    count = shape[0] * size_px[0] * size_px[1] * 3
    if raw is None:
        return flat_pixels(_flat(tensor, count, 4), "pixels").reshape(shape)
    if len(raw) != count:
        raise RequestError(f"Expected {count} bytes of 'pixels', as its shape says. Received: {len(raw)}.")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _unpacked(raw: memoryview, count: int) -> tuple[bytes, ...]:
    elements: list[bytes] = []
    at = 0
    while at + 4 <= len(raw) and len(elements) < count:
        (size,) = struct.unpack_from("<I", raw, at)
        elements.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(raw) or len(elements) != count:
        raise RequestError(
            f"Expected {count} elements, each after its length in 4 bytes, in the binary data of 'image'."
        )
    return tuple(elements)
