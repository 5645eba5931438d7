"""CONFIGURATION.md is what the classes say, and names every key with type, default and meaning."""

import inspect
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cnn_ray import config, config_reference

ROOT = Path(__file__).parents[2]


def test_the_file_is_what_the_classes_say():
    written = (ROOT / "CONFIGURATION.md").read_text(encoding="utf-8")
    assert written == config_reference.reference(), "python -m cnn_ray.config_reference > CONFIGURATION.md"


def test_every_field_of_every_job_has_a_row_with_its_meaning():
    text = config_reference.reference()
    documented = {kind for _, kind in config_reference.JOBS}
    for kind in list(documented):
        documented |= set(config_reference._nested_kinds(kind))
    bases = {config.Config, config.StorageConfig, config.ModelConfig, config.LabelledScoresConfig}
    classes = {k for _, k in inspect.getmembers(config, inspect.isclass) if issubclass(k, config.Config)}
    assert classes - bases == documented
    for kind in documented:
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name} has no docstring"
            assert f"| `{name}` | " in text
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == sum(len(kind.model_fields) for kind in documented)
    assert all(line.count(" | ") == 3 for line in text.splitlines() if line.startswith("| `"))


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (str, "text"),
        (str | None, "text"),
        (Annotated[int, Field(ge=1, le=9)], "integer >= 1, <= 9"),
        (Literal["a", "b"], "a, b"),
        (tuple[str, ...], "list of text"),
        (dict[str, int], "text -> integer"),
        (config.DataConfig, "[DataConfig](#dataconfig)"),
        (bool, "true, false"),
    ],
)
def test_types_in_words(annotation, name):
    assert config_reference.type_name(annotation) == name


def test_an_unknown_kind_of_type_is_not_passed_over():
    with pytest.raises(KeyError):
        config_reference.type_name(bytes)
