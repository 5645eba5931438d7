# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""Values of a manifest as text that does not depend on the file's format, so that all nights read as one table.

Integers are decimal, booleans true or false, times ISO 8601 (in UTC where they have a zone, without trailing zeros),
bytes are hexadecimal, lists and structures JSON. What is missing stays missing.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


class JsonNumber(str):
    """A number of a JSON document, as it was written: no digit is lost, and it is not taken for a string."""

    __slots__ = ()


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def text_array(values: pa.Array) -> pa.Array:
    """Return the values of any Arrow type as strings."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return text_array(values.storage)
    if pa.types.is_dictionary(kind):
        return text_array(values.dictionary_decode())
    if pa.types.is_timestamp(kind):
        return _iso_times(values)
    if pa.types.is_float16(kind):
        return values.cast(pa.float32()).cast(pa.string())
    if pa.types.is_duration(kind):
        return values.cast(pa.int64()).cast(pa.string())
    if _is_bytes(kind):
        return pa.array([None if value is None else value.hex() for value in values.to_pylist()], pa.string())
    if pa.types.is_nested(kind) or pa.types.is_interval(kind):
        return pa.array([None if value is None else _json(value) for value in values.to_pylist()], pa.string())
    return values.cast(pa.string())


def json_text(value: Any) -> str | None:
    """Return a value of a JSON document, read with `JsonNumber`, as text; None for null."""
    if value is None or isinstance(value, str):
        return None if value is None else str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return _json_of_numbers(value)


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
            pa.types.is_binary_view,
        )
    )


def _iso_times(values: pa.Array) -> pa.Array:
    if values.type.tz is not None:
        values = values.cast(pa.timestamp(values.type.unit, "UTC"))
    text = pc.replace_substring(values.cast(pa.string()), " ", "T", max_replacements=1)
    text = pc.replace_substring_regex(text, r"(\.\d*?)0+(Z?)$", r"\1\2")
    return pc.replace_substring_regex(text, r"\.(Z?)$", r"\1")


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), default=str)


def _plain(value: Any) -> Any:
    """The value with all that JSON lacks as text; the pairs of a map are an object."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
            return {str(_plain(key)): _plain(inner) for key, inner in value}
        return [_plain(inner) for inner in value]
    return value


def _json_of_numbers(value: Any) -> str:
    """JSON of a value with `JsonNumber` in it."""
    if isinstance(value, JsonNumber):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quoted(key)}:{_json_of_numbers(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_json_of_numbers(inner) for inner in value) + "]"
    return _quoted(value)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
