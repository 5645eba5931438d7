# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""What every store has in common: the interface, the key rule, listings in batches, and files that appear whole.

Use it through `cnn_ray.storage`; this module only keeps the two implementations from importing each other.
"""

from __future__ import annotations

import errno
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from cnn_ray.errors import (
    AccessDeniedError,
    ChangedError,
    ConfigError,
    NotFoundError,
    ServerLacksError,
    StorageError,
    TooLargeError,
    UnavailableError,
)

PROBE_PREFIX = "_probe-"
OWN_PREFIX = ".cnn_ray-"
"""Names of our temporary and lock files begin with this; no listing shows them."""

CONDITIONS_ADVICE = (
    "use a server with strong ETags and conditional writes (If-None-Match, If-Match), such as AWS S3 or a current "
    "MinIO or Ceph, or a folder; `cnn-ray doctor` tries them."
)
LIST_BATCH_ROWS = 16_384
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of an object without its bytes."""

    etag: str
    size_bytes: int


class Store(ABC):
    """One folder or bucket prefix; keys are relative to it and use "/".

    Every method raises `NotFoundError`, `AccessDeniedError`, `CredentialsError`, `UnavailableError` or another
    `StorageError`, and `ConfigError` for a key that would leave the root. Stores are thread-safe, and picklable
    because no open client is part of their state: Ray ships them to workers.
    """

    uri: str

    def uri_of(self, key: str) -> str:
        """Location of `key`, as listings and score files name it."""
        return f"{self.uri.rstrip('/')}/{key}"

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[pa.Table]:
        """Everything whose key begins with `prefix`, as tables of `records.LISTING_SCHEMA` in byte order of the key.

        The order is a promise, because shards are cut from it. At most `LIST_BATCH_ROWS` rows are Python objects at a
        time, so ten million keys fit. Zero-byte keys that end with "/" are folder markers, not objects.

        Raises:
            NotFoundError: the folder or bucket does not exist. A prefix without objects yields nothing.
        """

    @abstractmethod
    def keys(self, prefix: str = "") -> list[str]:
        """Sorted keys that begin with `prefix`, relative to the root; [] where the local folder is missing."""

    @abstractmethod
    def newest_s(self, prefix: str = "") -> float | None:
        """When the newest object whose key begins with `prefix` was written, in seconds since 1970; None without any.

        Lists everything, page after page: for a million objects on S3 that is a thousand requests.
        """

    @abstractmethod
    def get(self, key: str, *, if_match: str | None = None, max_bytes: int | None = None) -> bytes:
        """The object's bytes, of exactly the version that `if_match` names.

        Raises:
            ChangedError: the etag is no longer `if_match`.
            TooLargeError: it has more than `max_bytes`; the body is not read.
        """

    @abstractmethod
    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """The bytes and an opaque token of this version for `put_if_match`."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Etag and size, without the bytes."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """The object holds `data`, whatever was there before; readers see all of it or nothing."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """True if this call created the object, False if it was there (and stays untouched).

        Where an attempt's answer was lost, equal bytes count as ours; so put something unique into `data` if only one
        caller may win (a lease), and nothing where a repeat is the same work (a part).
        """

    @abstractmethod
    def put_if_match(self, key: str, data: bytes, version: str) -> str | None:
        """Token of the new version, or None when somebody was faster (or removed it): nothing changed then."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.head(key)
        except NotFoundError:
            return False
        return True

    @abstractmethod
    def get_to_file(self, key: str, path: Path) -> None:
        """The object is at `path`, whole; for models too big for memory."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """The object holds the bytes of the file at `path`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """The object is gone; one that was not there is no error. Only probes and the retention ask for this."""

    @abstractmethod
    def check_writable(self) -> None:
        """Nothing: the output can be written. Checked before hours of work, and leaves nothing behind.

        Raises:
            StorageError: it cannot; the message says why.
        """

    def check_etag(self, key: str) -> None:  # noqa: B027 - true of every local folder
        """Return where the storage tells one etag of an object that has not changed.

        Raises:
            ServerLacksError: a listing and an answer tell different ones.
        """

    def check_conditional_writes(self) -> None:
        """Return where put-if-absent and put-if-match hold here; four small writes, and nothing is left behind.

        A server that ignores the conditions would let two runs overwrite each other without an error, and one that
        refuses what matches would stop all of them.

        Raises:
            ServerLacksError: they do not; the message says which.
            StorageError: the storage cannot be written.
        """
        key = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
        try:
            _try_conditions(self, key)
        finally:
            with suppress(StorageError):
                self.delete(key)


def _try_conditions(store: Store, key: str) -> None:
    first, second, third = (secrets.token_bytes(16) for _ in range(3))

    def lacks(received: str) -> ServerLacksError:
        return ServerLacksError(
            f"Expected conditional writes that hold at {store.uri}. Received: {received}. Next: {CONDITIONS_ADVICE}"
        )

    if not store.put_if_absent(key, first):
        raise lacks("If-None-Match of a new object was refused")
    if store.put_if_absent(key, second) or store.get(key) != first:
        raise lacks("a server that ignores If-None-Match: a second write took the place of the first")
    _, version = store.get_versioned(key)
    if store.put_if_match(key, third, version) is None:
        raise lacks("a PUT whose If-Match names the right ETag was refused")
    if store.put_if_match(key, second, version) is not None or store.get(key) != third:
        raise lacks("a server that ignores If-Match: a write over another version was taken")


def check_key(key: str) -> str:
    """`key`, if it stays below the root.

    Raises:
        ConfigError: it is empty, absolute, has a ".." segment or a NUL byte.
    """
    if not key or key.startswith("/") or "\0" in key or ".." in key.split("/"):
        raise ConfigError(
            f"Expected a key below the folder, without '..', leading '/' or NUL. Received: {key!r}. "
            "Next: correct the manifest or configuration that names it."
        )
    return key


def changed(uri: str) -> ChangedError:
    """The error for an object that is no longer the one that was planned."""
    return ChangedError(f"Expected the version of {uri} that was listed. Received: another one. Next: list again.")


def check_size(uri: str, size_bytes: int, max_bytes: int | None) -> None:
    """Nothing: the object is small enough to read.

    Raises:
        TooLargeError: it has more than `max_bytes`.
    """
    if max_bytes is not None and size_bytes > max_bytes:
        raise TooLargeError(
            f"Expected at most {max_bytes} bytes in {uri}. Received: {size_bytes}. Next: raise the limit."
        )


def error_of_os(error: OSError, uri: str) -> StorageError:
    """The error that a user meets for what the operating system said about `uri`."""
    said = f"Received: {os.strerror(error.errno) if error.errno else type(error).__name__}."
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ENAMETOOLONG | errno.ELOOP:
            return NotFoundError(f"Expected a file or folder at {uri}. {said} Next: check the path.")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AccessDeniedError(f"Expected access to {uri}. {said} Next: check owner, mode and mount options.")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(f"Expected free space on the disk of {uri}. {said} Next: free or add space there.")
        case errno.EINTR | errno.EAGAIN | errno.ETIMEDOUT | errno.ESTALE | errno.ENFILE | errno.EMFILE:
            return UnavailableError(f"Expected {uri} to answer. {said} Next: try again later.")
        case _:
            return StorageError(f"Expected to read or write {uri}. {said} Next: check the disk and the path.")


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, replace: bool = True) -> bool:
    """True and `path` holds what `write` wrote, on disk; False if it existed and `replace` is false.

    The final name appears in one step after fsync: a kill at any moment leaves at most one of our dot-files, never
    half a file. `link` refuses to replace, which makes it the put-if-absent of file systems.

    Raises:
        OSError: as the operating system says it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{OWN_PREFIX}tmp-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True
