"""Command-line flags made from a configuration class: one field, one flag, its docstring as the help text."""

from __future__ import annotations

import csv
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from pydantic.fields import FieldInfo

from cnn_ray.config import Config, NightlyConfig, StorageConfig, build_config, fields_of, load_yaml
from cnn_ray.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console

ConfigT = TypeVar("ConfigT", bound=Config)
CommandT = TypeVar("CommandT", bound=Callable[..., Any])

SEPARATOR = "__"


def config_flags(kind: type[Config], *, positional: tuple[str, ...] = ()) -> Callable[[CommandT], CommandT]:
    """A decorator that gives a click command one flag per field, and an argument for each positional one
    (`data__uri` for a field of a nested class).

    Values stay text: the configuration class alone converts and checks them, with one wording for file and flag.
    Fields of a nested class are flags with its name in front (`--data-uri`).
    """

    def decorate(command: CommandT) -> CommandT:
        for path, field in reversed(list(_fields(kind))):
            if SEPARATOR.join(path) not in positional:
                command = _option(path, field)(command)
        for name in reversed(positional):
            metavar = name.removesuffix("uri").strip("_").upper()
            command = click.argument(name, required=False, metavar=metavar)(command)
        return command

    return decorate


def shared_flags(command: CommandT) -> CommandT:
    """The command with what every job has: `--config FILE.yaml`, `--print-config`, `--dry-run`."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, change nothing."),
        click.option("--print-config", is_flag=True, help="Print the resolved configuration as YAML and stop."),
        click.option(
            "--config", "config_file", metavar="FILE.yaml", help="Read these keys from a YAML file; flags win."
        ),
    ):
        command = option(command)
    return command


def print_config(config: Config) -> None:
    """Prints the resolved configuration as YAML, without the secrets in it."""
    import yaml

    click.echo(yaml.safe_dump(redacted(config.model_dump(mode="json")), sort_keys=False).rstrip())


def stdout_console() -> Console:
    """Where results go."""
    from rich.console import Console

    return Console()


def stderr_console() -> Console:
    """Where progress goes."""
    from rich.console import Console

    return Console(stderr=True)


def config_from_flags(kind: type[ConfigT], file: str | None, flags: Mapping[str, Any]) -> ConfigT:
    """The configuration of a YAML file with the given flags over it (default < YAML < flag). From now on this process
    asks storage as it says.

    Raises:
        ConfigError: the file or a value is wrong.
    """
    source = "the flags" if file is None else f"{file} and the flags"
    config = build_config(kind, {} if file is None else load_yaml(file), given_keys(flags), source=source)
    use_storage(config)
    return config


def use_storage(config: Config) -> None:
    """Let this process ask storage as the job is configured."""
    from cnn_ray.storage_options import use_storage_options

    if isinstance(config, NightlyConfig):
        use_storage_options(config.score)
    elif isinstance(config, StorageConfig):
        use_storage_options(config)


def given_keys(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What was given as flags, as the mapping that a YAML file would hold."""
    given: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None:
            continue
        *outer, last = name.split(SEPARATOR)
        level = given
        for step in outer:
            level = level.setdefault(step, {})
        level[last] = value
    return given


def list_option(flag: str, name: str, text: str) -> Callable[[CommandT], CommandT]:
    """Return a click option of several values: A,B,... in one flag, in several, or both."""
    text = f'{text} May be given more than once; a value with a comma stands in "double quotes".'
    return click.option(flag, name, metavar="A,B,...", multiple=True, callback=_values, help=text)


def _values(_context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the values of all occurrences of a list flag in their order, None where there is none: each occurrence is
    a line of CSV, so a value is quoted as there, and an empty one is an empty list."""
    values: list[str] = []
    for text in given:
        try:
            lines = list(csv.reader([text], skipinitialspace=True, strict=True)) if text.strip() else []
        except csv.Error:
            lines = [[""]]
        found = [value.strip() for line in lines for value in line]
        if not all(found):
            raise click.BadParameter(
                f"Expected values between commas, one with a comma in double quotes. Received: {text!r}.",
                param=parameter,
            )
        values += found
    return tuple(values) if given else None


def _fields(kind: type[Config], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], FieldInfo]]:
    found: list[tuple[tuple[str, ...], FieldInfo]] = []
    for name, field in fields_of(kind).items():
        nested = [a for a in _alternatives(field.annotation) if isinstance(a, type) and issubclass(a, Config)]
        if nested:
            found += _fields(nested[0], (*prefix, name))
        else:
            found.append(((*prefix, name), field))
    return found


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(a for a in typing.get_args(annotation) if a is not type(None))
    return (annotation,)


def _option(path: tuple[str, ...], field: FieldInfo) -> Callable[[CommandT], CommandT]:
    flag = "--" + "-".join(path).replace("_", "-")
    annotation = _alternatives(field.annotation)[0]
    text = " ".join((field.description or "").split()) + _default_text(field)
    name = SEPARATOR.join(path)
    if annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    if typing.get_origin(annotation) is Literal:
        return click.option(flag, name, type=click.Choice(typing.get_args(annotation)), help=text)
    if typing.get_origin(annotation) is tuple:
        return list_option(flag, name, text)
    return click.option(flag, name, metavar=_metavar(annotation), help=text)


def _metavar(annotation: Any) -> str:
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
    return {int: "N", float: "X", str: "TEXT"}.get(base, "YYYY-MM-DD")


def _default_text(field: FieldInfo) -> str:
    if field.is_required() or field.default is None:
        return ""
    return f" [default: {field.default}]"
