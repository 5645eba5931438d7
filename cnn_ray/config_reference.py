"""The configuration reference as Markdown, made from the configuration classes: `python -m cnn_ray.config_reference`.

CONFIGURATION.md is its output; a test holds the two equal, so a field and its row cannot part.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from datetime import date as Date
from typing import Any, Literal

from pydantic.fields import FieldInfo

from cnn_ray import config
from cnn_ray.config import Config, fields_of

JOBS: tuple[tuple[str, type[Config]], ...] = (
    ("cnn-ray score", config.ScoreConfig),
    ("cnn-ray nightly", config.NightlyConfig),
    ("cnn-ray serve", config.ServeConfig),
    ("cnn-ray train", config.TrainConfig),
    ("cnn-ray compare", config.CompareConfig),
    ("cnn-ray evaluate", config.EvaluateConfig),
    ("cnn-ray model calibrate", config.CalibrateConfig),
    ("cnn-ray model promote", config.PromoteConfig),
)
_HEAD = """# Configuration

Made from the classes in `cnn_ray/config.py` by `python -m cnn_ray.config_reference > CONFIGURATION.md`; do not edit.

Each field is a YAML key (`--config FILE.yaml`) and a flag (`--input-uri` for `input_uri`, `--data-uri` for `uri` in
`data`); a flag wins over the file, the file over the default. An unknown key is an error. Dates are UTC, `_s` are
seconds, `_px` pixels, `_bytes` bytes; `_uri` is a folder or `s3://bucket/prefix`.
"""
_NAMES = {str: "text", int: "integer", float: "number", bool: "true, false", Date: "YYYY-MM-DD", Any: "any"}
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def reference() -> str:
    """The whole reference as Markdown: a section for each job, then one for each section of its file."""
    parts = [_HEAD]
    nested: dict[type[Config], None] = {}
    for command, kind in JOBS:
        parts.append("\n".join(_section(f"`{command}`", kind)))
        nested |= dict.fromkeys(_nested_kinds(kind))
    parts.append("# Sections\n")
    parts += ["\n".join(_section(kind.__name__, kind)) for kind in nested]
    return "\n".join(parts)


def type_name(annotation: Any) -> str:
    """What a person calls the type of a field, its bounds included."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"{type_name(arguments[0])} -> {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _NAMES[annotation]


def _section(title: str, kind: type[Config]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{_one_line(kind.__doc__ or '')}\n"
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for name, field in fields_of(kind).items():
        cells = (f"`{name}`", type_name(field.annotation) + _bounds(field.metadata), _default(field))
        yield f"| {' | '.join(cells)} | {_one_line(field.description or '')} |"
    yield ""


def _nested_kinds(kind: type[Config]) -> Iterator[type[Config]]:
    for field in kind.model_fields.values():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Config):
                yield inner
                yield from _nested_kinds(inner)


def _bounds(metadata: typing.Iterable[Any]) -> str:
    found: list[str] = []
    for item in metadata:
        inner = item.metadata if isinstance(item, FieldInfo) else (item,)
        for bound in inner:
            values = vars(bound) if hasattr(bound, "__dict__") else {n: getattr(bound, n, None) for n, _ in _BOUNDS}
            found += [f" {sign} {values[name]}" for name, sign in _BOUNDS if values.get(name) is not None]
    return ",".join(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return ""
    if isinstance(value, Config):
        return ", ".join(f"{name}: {getattr(value, name)}" for name in sorted(value.model_fields_set)) or "its defaults"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return f"`{value}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
