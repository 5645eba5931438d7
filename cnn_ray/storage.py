# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""Bytes in, bytes out: one `Store` over local folders and S3, with the conditional writes that commits are built on.

    store = open_store("s3://bucket/screens")       # or "folder", "/abs", "~/x", "file:///abs"; no I/O yet
    for table in store.list("date=2025-01-01/"):    # uri, etag, size_bytes, in byte order of the key
        ...

Local folders keep the promises of S3: writes appear whole or not at all, put-if-absent has one winner.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa

from cnn_ray.errors import AccessDeniedError, ConfigError, NotFoundError, StorageError
from cnn_ray.local_walk import Row, Walk, encoded, etag_of
from cnn_ray.records import LISTING_SCHEMA
from cnn_ray.storage_base import (
    COPY_BYTES,
    LIST_BATCH_ROWS,
    OWN_PREFIX,
    ObjectInfo,
    Store,
    changed,
    check_key,
    check_size,
    error_of_os,
    write_whole,
)
from cnn_ray.storage_options import storage_options
from cnn_ray.storage_s3 import S3Store

__all__ = ["LocalStore", "ObjectInfo", "S3Store", "Store", "open_store", "split_uri"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # non-blocking: opening a FIFO must not hang


def open_store(uri: str, *, follow_symlinks: bool = False) -> Store:
    """Store over a local folder or `s3://bucket[/prefix]`. Does no I/O, so nothing is known to exist yet.

    With `follow_symlinks` a local folder is read through its links, wherever they lead. A bucket is asked with
    the storage options that hold now (`cnn_ray.storage_options`).

    Raises:
        ConfigError: another scheme, an empty or malformed location. The message repeats no more than the scheme,
            because locations of other kinds carry passwords and signatures.
    """
    scheme = _SCHEME.match(uri)
    if scheme is None:
        if not uri or "\0" in uri:
            raise ConfigError("Expected a folder or s3://bucket/prefix. Received: nothing. Next: name a location.")
        return LocalStore(uri, follow_symlinks=follow_symlinks)
    match scheme[1].lower():
        case "s3" | "s3a" | "s3n":  # the last two are Hadoop's names of the same
            return S3Store(f"s3://{uri[scheme.end() :]}", storage_options())
        case "file" if uri[scheme.end() :].startswith("/"):
            folder = unquote(uri[scheme.end() :], errors="surrogateescape")
            return LocalStore(folder, follow_symlinks=follow_symlinks)
        case other:
            raise ConfigError(
                f"Expected a folder, file:///folder or s3://bucket/prefix. Received: a {other}:// location. "
                "Next: copy the data to one of these."
            )


def split_uri(uri: str) -> tuple[str, str]:
    """Location of the parent store and the last key, for single files such as `s3://bucket/p/manifest.csv`.

    Raises:
        ConfigError: there is no key in it.
    """
    root = open_store(uri).uri
    parent, _, key = root.rpartition("/")
    if not key or parent in ("s3:/", "s3:"):
        raise ConfigError(f"Expected the location of one file. Received: {root}. Next: add the file's name.")
    return parent or "/", key


class LocalStore(Store):
    """A folder. Etag is `mtime_ns-size`; the token of `put_if_match` is the content's SHA-256.

    Links to files are followed where they stay below the folder, and with `follow_symlinks` all of them are (see
    `cnn_ray.local_walk`). A name that is not UTF-8 is listed percent-encoded, and `get` finds it by that key.
    """

    def __init__(self, folder: str, *, follow_symlinks: bool = False) -> None:
        """Keeps the absolute form of `folder`, "~" expanded; touches no disk.

        Raises:
            ConfigError: the name is not UTF-8, which no column of uris can hold, or "~x" is nobody.
        """
        self.follow_symlinks = follow_symlinks
        try:
            self.uri = os.path.abspath(Path(folder).expanduser())  # noqa: PTH100 - Path.absolute keeps ".."
            self.uri.encode()
        except (RuntimeError, UnicodeEncodeError) as error:
            raise ConfigError(
                f"Expected a folder with a UTF-8 name. Received: {folder!r}. Next: rename it or link to it."
            ) from error

    def list(self, prefix: str = "", left_out: Counter[str] | None = None) -> Iterator[pa.Table]:
        """See `Store.list`. `left_out` counts the links and special files that are not listed, by reason."""
        rows = self._rows(prefix, left_out)
        while batch := list(islice(rows, LIST_BATCH_ROWS)):
            keys, etags, sizes = zip(*batch, strict=True)
            uris = [f"{self.uri.rstrip('/')}/{key}" for key in keys]
            yield pa.Table.from_arrays([pa.array(uris), pa.array(etags), pa.array(sizes)], schema=LISTING_SCHEMA)

    def _rows(self, prefix: str, left_out: Counter[str] | None = None) -> Iterator[Row]:
        if prefix:
            check_key(prefix)
        counts = Counter[str]() if left_out is None else left_out
        with _explained(self.uri):
            root = os.fsencode(self.uri)
            yield from Walk(root, prefix, follow_symlinks=self.follow_symlinks, left_out=counts).rows()

    def keys(self, prefix: str = "") -> list[str]:
        """See `Store.keys`."""
        try:
            return [key for key, _, _ in self._rows(prefix)]
        except NotFoundError:
            return []

    def newest_s(self, prefix: str = "") -> float | None:
        """See `Store.newest_s`."""
        try:
            return max((int(etag.partition("-")[0]) for _, etag, _ in self._rows(prefix)), default=0) / 1e9 or None
        except NotFoundError:
            return None

    def _path(self, key: str) -> Path:
        parts = check_key(key).split("/")
        if any(part in ("", ".") for part in parts):  # Path would drop these: two keys for one file
            raise ConfigError(f"Expected a key without empty or '.' segments. Received: {key!r}. Next: correct it.")
        root = path = Path(self.uri)
        with _explained(self.uri_of(key)):
            for part in parts:
                path = path / part
                if "%" in part and not os.path.lexists(path):
                    raw = path.with_name(os.fsdecode(unquote_to_bytes(part)))
                    path = raw if os.path.lexists(raw) and encoded(os.fsencode(raw.name)) == part else path
            if not self.follow_symlinks and not path.resolve().is_relative_to(root.resolve()):
                raise AccessDeniedError(
                    f"Expected a file below {self.uri}. Received: {key!r}, a link that leads outside. "
                    "Next: copy the file into the folder, or read an input with --follow-symlinks."
                )
        return path

    @contextmanager
    def _open(self, key: str) -> Generator[tuple[BinaryIO, os.stat_result], None, None]:
        path = self._path(key)
        with _explained(self.uri_of(key)):
            descriptor = os.open(path, _READ_FLAGS)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise NotFoundError(
                    f"Expected a file at {self.uri_of(key)}. Received: a folder or a device. Next: check the path."
                )
            with os.fdopen(descriptor, "rb") as file:
                yield file, status

    def get(self, key: str, *, if_match: str | None = None, max_bytes: int | None = None) -> bytes:
        """See `Store.get`. The etag is taken from the open file after reading, so it belongs to these very bytes."""
        with self._open(key) as (file, status):
            check_size(self.uri_of(key), status.st_size, max_bytes)
            data = file.read() if max_bytes is None else file.read(max_bytes + 1)
            check_size(self.uri_of(key), len(data), max_bytes)
            if if_match is not None and if_match != etag_of(os.fstat(file.fileno())):
                raise changed(self.uri_of(key))
            return data

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See `Store.get_versioned`."""
        data = self.get(key)
        return data, hashlib.sha256(data).hexdigest()

    def head(self, key: str) -> ObjectInfo:
        """See `Store.head`."""
        with self._open(key) as (_, status):
            return ObjectInfo(etag_of(status), status.st_size)

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`. Unlike on S3, a `put_if_match` at the same moment does not see it: use one of the two."""
        path = self._path(key)
        with _explained(self.uri_of(key)):
            write_whole(path, lambda file: file.write(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`."""
        path = self._path(key)
        with _explained(self.uri_of(key)):
            return write_whole(path, lambda file: file.write(data), replace=False)

    def put_if_match(self, key: str, data: bytes, version: str) -> str | None:
        """See `Store.put_if_match`. Writers take turns through a lock file beside the file, which stays there."""
        path = self._path(key)
        name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        with _explained(self.uri_of(key)):
            if not path.parent.is_dir():
                return None
            with (path.parent / f"{OWN_PREFIX}lock-{name}").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    current = hashlib.sha256(path.read_bytes()).hexdigest()
                except FileNotFoundError:
                    return None
                if current != version:
                    return None
                write_whole(path, lambda file: file.write(data))
        return hashlib.sha256(data).hexdigest()

    def get_to_file(self, key: str, path: Path) -> None:
        """See `Store.get_to_file`."""
        with self._open(key) as (file, _):
            source = file
            with _explained(str(path)):
                write_whole(path, lambda target: shutil.copyfileobj(source, target, COPY_BYTES))

    def put_file(self, key: str, path: Path) -> None:
        """See `Store.put_file`."""
        target_path = self._path(key)
        with _explained(str(path)), path.open("rb") as source, _explained(self.uri_of(key)):
            write_whole(target_path, lambda target: shutil.copyfileobj(source, target, COPY_BYTES))

    def delete(self, key: str) -> None:
        """See `Store.delete`. Folders stay, also empty ones."""
        path = self._path(key)
        with _explained(self.uri_of(key)):
            path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """See `Store.check_writable`. Creates the folder; the probe file never has a name where Linux allows that."""
        with _explained(self.uri):
            Path(self.uri).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.uri, prefix=OWN_PREFIX):
                pass


@contextmanager
def _explained(uri: str) -> Generator[None, None, None]:
    """Whatever the operating system refuses inside becomes one of our errors about `uri`."""
    try:
        yield
    except OSError as error:
        raise error_of_os(error, uri) from error
    except (ValueError, RuntimeError) as error:  # a name no file can have, or a loop of links
        raise StorageError(f"Expected a usable path. Received: {uri!r}. Next: check the name and its links.") from error
