"""The storage options that hold now: each job sets its configuration's once, in every process that works for it.

They are a setting of the process and no argument, because every module that opens a location would have to hand them
on. A store keeps the options that it was opened with, also when it travels to another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cnn_ray.config import StorageConfig

_here: ContextVar[StorageConfig | None] = ContextVar("storage_options", default=None)
_process = [StorageConfig()]


def storage_options() -> StorageConfig:
    """Return the options for a store that is opened now."""
    return _here.get() or _process[0]


def use_storage_options(config: StorageConfig) -> None:
    """Let every store that this process opens from now on have the storage options of a job's configuration."""
    _process[0] = _options_of(config)


@contextmanager
def these_storage_options(config: StorageConfig) -> Iterator[None]:
    """Let the stores that this thread opens inside have the storage options of a configuration."""
    token = _here.set(_options_of(config))
    try:
        yield
    finally:
        _here.reset(token)


def _options_of(config: StorageConfig) -> StorageConfig:
    return StorageConfig(**{name: getattr(config, name) for name in StorageConfig.model_fields})
