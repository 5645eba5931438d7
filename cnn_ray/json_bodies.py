# pyright: strict
"""JSON bodies that strangers send -> Python values, bounded in depth, memory and time; base64; nested pixel lists.

A body is at most as long as the endpoint allows, but JSON grows when it is read: `[[],[],...` takes 3 bytes per list
and CPython 64. So the marks that make values (`, : " [ {`) are counted before anything is parsed.
"""

from __future__ import annotations

import base64
import binascii
import json
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cnn_ray.request_errors import RequestError

MAX_MARKS = 4_000_000
"""Commas, colons, quotes and opening brackets of one body: 19 images of 224 px as pixel lists."""
MAX_ARRAYS = 1_050_000
"""A quarter of that: pixel lists have no more, and the garbage collector looks at each again and again."""
MAX_OBJECTS = 100_000
"""An instance has at most two."""
MAX_DEPTH = 64
"""Arrays and objects within each other."""

_NO_MARKS = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_WHITE_SPACE = b" \t\n\v\f\r"
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
    arrays, objects = body.count(b"["), body.count(b"{")
    marks = arrays + objects + body.count(b",") + body.count(b":") + body.count(b'"')
    if marks > MAX_MARKS or arrays > MAX_ARRAYS or objects > MAX_OBJECTS:
        raise RequestError(
            f"Expected JSON with at most {MAX_MARKS} commas, colons, quotes and brackets, {MAX_ARRAYS} arrays and "
            f"{MAX_OBJECTS} objects. Received: more. Next: send encoded images, or the binary tensors of /v2."
        )
    if arrays + objects > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise RequestError(f"JSON Parse error: the document is nested too deeply, {MAX_DEPTH} levels are allowed")


def _depth(body: bytes) -> int:
    """How deep the brackets outside of strings go; of what is no JSON, something."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # so that each quote left begins or ends a string
    outside = b"".join(plain.translate(None, _NO_MARKS).split(b'"')[::2])
    marks = np.frombuffer(outside, np.uint8)
    steps = np.where((marks == ord("[")) | (marks == ord("{")), np.int8(1), np.int8(-1))
    return int(steps.cumsum(dtype=np.int32).max(initial=0))


def decode_base64(text: str, index: int) -> bytes:
    """The bytes of a base64 text, read as leniently as absl::Base64Unescape: white space, no padding.

    Raises:
        RequestError: it is not base64; the message names the instance.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    try:
        compact = text.encode("ascii").translate(None, _WHITE_SPACE)
        padding = b"=" * (-len(compact) % 4 if b"=" not in compact else 0)
        return base64.b64decode(compact + padding, validate=True)
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
