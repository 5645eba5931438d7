# pyright: strict
"""JSON bodies that strangers send -> Python values, bounded in depth, memory and time; base64; nested pixel lists.

A body is at most as long as the endpoint allows, but JSON grows when it is read: `[[],[],...` takes 3 bytes per list
and CPython 64. So the marks that make values (`, : [ {`) are counted before anything is parsed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cnn_ray.request_errors import RequestError

MAX_MARKS = 4_000_000
"""Commas, colons and opening brackets of one body: some 20 images of 224 px as pixel lists."""
MAX_DEPTH = 64
"""Arrays and objects within each other."""

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.S)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_SHOWN_CHARS = 100


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in the body, in UTF-8. NaN and Infinity are read too, as TensorFlow Serving does.

    Raises:
        RequestError: it is no JSON object, too deep, or of too many values.
    """
    if not body:
        raise RequestError("JSON Parse error: The document is empty")
    _check_bounds(body)
    try:
        document: object = json.loads(body.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RequestError(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except UnicodeDecodeError:
        raise RequestError("JSON Parse error: the document is not UTF-8") from None
    except RecursionError:
        raise RequestError("JSON Parse error: the document is nested too deeply") from None
    except ValueError:  # an integer of more than 4,300 digits
        raise RequestError("JSON Parse error: a number is too long") from None
    if not isinstance(document, dict):
        raise RequestError(f"JSON Value of type {type_name(document)}: Is not object")
    return cast("dict[str, Any]", document)


def _check_bounds(body: bytes) -> None:
    opened = body.count(b"[") + body.count(b"{")
    if opened + body.count(b",") + body.count(b":") > MAX_MARKS:
        raise RequestError(
            f"Expected a JSON document of at most {MAX_MARKS} commas, colons and brackets. Received: more. "
            "Next: send fewer images, encoded ones, or the binary tensors of /v2."
        )
    if opened <= MAX_DEPTH:
        return
    marks = np.frombuffer(_STRINGS.sub(b"", body).translate(None, _NO_BRACKETS), np.uint8)
    opens = (marks == ord("[")) | (marks == ord("{"))
    steps = np.where(opens, np.int8(1), np.int8(-1))
    if len(steps) and int(steps.cumsum(dtype=np.int32).max()) > MAX_DEPTH:
        raise RequestError(f"JSON Parse error: the document is nested too deeply, {MAX_DEPTH} levels are allowed")


def decode_base64(text: str, index: int) -> bytes:
    """The bytes of a base64 text, read as leniently as absl::Base64Unescape: white space, no padding.

    Raises:
        RequestError: it is not base64; the message names the instance.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    compact = "".join(text.split())
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4 if "=" not in compact else 0), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"Failed to process element: {index}. Unable to base64 decode") from None


def nested_pixels(values: list[Any], size_px: tuple[int, int], name: str) -> npt.NDArray[np.uint8]:
    """uint8 [N, H, W, 3] of N nested lists of whole numbers.

    Raises:
        RequestError: another shape, or numbers that are no uint8.
    """
    height, width = size_px
    level = values
    for length in (height, width, 3):
        if any(type(item) is not list or len(cast("list[Any]", item)) != length for item in level):
            raise RequestError(f"Expected '{name}' as nested lists of shape [N, {height}, {width}, 3].")
        level = list(chain.from_iterable(cast("list[list[Any]]", level)))
    return flat_pixels(level, name).reshape(len(values), height, width, 3)


def flat_pixels(values: list[Any], name: str) -> npt.NDArray[np.uint8]:
    """uint8 [N] of a list of N whole numbers.

    Raises:
        RequestError: one of them is not a whole number from 0 to 255.
    """
    try:
        if set(map(type, values)) <= {int}:
            return np.frombuffer(bytearray(values), np.uint8)
    except ValueError:
        pass
    raise RequestError(f"Expected '{name}' as whole numbers from 0 to 255 (uint8).")


def build(value: object) -> bytes:
    """The value as compact JSON in ASCII."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def type_name(value: object) -> str:
    """What JSON calls a value's type."""
    names = {"NoneType": "Null", "bool": "Bool", "int": "Number", "float": "Number", "str": "String", "list": "Array"}
    return names.get(type(value).__name__, "Object")


def shown(text: str) -> str:
    """The text as an error message may hold it: short."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
