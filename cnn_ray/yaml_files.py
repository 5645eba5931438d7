"""YAML files that people write, read so that nothing in them is dropped or becomes another value in silence.

A key that stands twice is an error (YAML itself keeps the last one), and a date stays the text that it is: the
configuration judges it, with the same words for a file and a flag.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_ray.errors import ConfigError

if TYPE_CHECKING:
    import yaml

LARGEST_BYTES = 16 * 1024**2


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, read with the safe loader.

    Raises:
        ConfigError: the file is missing, is no YAML, is no mapping, or holds a key twice.
    """
    text = _text_of(path)
    loaded = parse_yaml(text, str(path))
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        kind = {"list": "a list", "str": "text"}.get(type(loaded).__name__, type(loaded).__name__)
        raise ConfigError(f"Expected keys and values in {path}. Received: {kind}. Next: see jobs/*.yaml.")
    return {str(key): value for key, value in loaded.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def parse_yaml(text: str, name: str) -> object:
    """Return what the YAML text holds; `name` is what messages call it.

    Raises:
        ConfigError: it is no YAML, or holds a key twice.
    """
    import yaml  # 40 ms that --help does not need

    try:
        return yaml.load(text, Loader=_loader())  # noqa: S506 - a safe loader
    except RecursionError:
        raise ConfigError(f"Expected YAML in {name}. Received: values nested too deep. Next: correct it.") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:  # `!!int x` is a ValueError
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"Expected YAML in {name}. Received: {reason}. Next: correct it.") from None


def _text_of(path: str | Path) -> str:
    try:
        file = Path(path)
        if file.exists() and not file.is_file() and not file.is_fifo():  # a pipe: --config <(...)
            raise ConfigError(f"Expected a YAML file. Received: {path}, which is none. Next: check the path.")
        with file.open("rb") as stream:
            data = stream.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(
            f"Expected a readable YAML file. Received: {path} ({reason}). Next: check the path."
        ) from None
    if len(data) > LARGEST_BYTES:
        raise ConfigError(
            f"Expected a YAML file of at most {LARGEST_BYTES} bytes. Received: {path}, which has more. Next: check it."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Expected UTF-8 text in {path}. Received: byte {data[error.start]:#04x} at offset {error.start}. "
            "Next: save the file as UTF-8."
        ) from None


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml
    from yaml.constructor import ConstructorError

    class Loader(yaml.SafeLoader):
        """The safe loader without dates, and with every key once."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            """See `yaml.SafeLoader.construct_mapping`."""
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise ConstructorError(None, None, f"the key {key.value!r} a second time", key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    timestamp = "tag:yaml.org,2002:timestamp"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != timestamp]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader
