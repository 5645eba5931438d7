"""What this machine lacks, said as an error of ours whichever library met it first.

Libraries wrap the operating system's errors in their own: Arrow and Ray in OSError with other texts, TensorFlow in
ResourceExhaustedError, OpenVINO in RuntimeError, Ray once more in the errors of tasks. So the whole chain of causes is
looked at, the number first and the text where there is none.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cnn_ray.errors import CnnRayError, ConfigError, StorageError, UnavailableError

_FULL = re.compile(r"no space left on device|disk quota exceeded|errno ?[:=]? ?28\b|local disk is full", re.IGNORECASE)
_READ_ONLY = re.compile(r"(permission denied|read-only file system)[^'\"]*['\"]?(/[^'\":,\s]*)?", re.IGNORECASE)
_MANY_FILES = re.compile(r"too many open files", re.IGNORECASE)
_NO_HOME = re.compile(r"could not determine home directory", re.IGNORECASE)
_NO_TEMPORARY = re.compile(r"no usable temporary directory", re.IGNORECASE)
_LONG_SOCKET = re.compile(r"AF_UNIX path", re.IGNORECASE)
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_DENIED_NUMBERS = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST_CHAIN = 20


def explain_machine_error(error: BaseException) -> CnnRayError | None:
    """Return the error of ours for a full disk, a folder that cannot be written, too many open files, a missing home
    folder or too little memory anywhere in the chain of causes; None for anything else."""
    for seen in chain_of(error):
        number = seen.errno if isinstance(seen, OSError) else None
        text = " ".join(str(seen).split())
        if number in _FULL_NUMBERS or _FULL.search(text):
            return _full_disk(seen)
        if number in (errno.EMFILE, errno.ENFILE) or (number is None and _MANY_FILES.search(text)):
            return UnavailableError(
                "Expected to open one more file. Received: too many open files. Next: raise the limit (`ulimit -n`)."
            )
        if number in _DENIED_NUMBERS or (number is None and isinstance(seen, OSError) and _READ_ONLY.search(text)):
            return unwritable(_path_of(seen), os.strerror(number) if number else text[:200])
        if _LONG_SOCKET.search(text):
            return unwritable(None, text[:200], "set TMPDIR to a folder with a shorter path")
        if _NO_TEMPORARY.search(text):
            return unwritable(None, "no temporary folder that can be written", "set TMPDIR to a folder that can")
        if _NO_HOME.search(text):
            return ConfigError("Expected a home folder. Received: none. Next: set HOME to a folder of yours.")
        if isinstance(seen, MemoryError):
            return UnavailableError(
                "Expected enough memory. Received: none left. Next: give this machine more, or ask for less at once."
            )
    return None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what caused it, Ray's own `cause` included, each once."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen and len(seen) < _LONGEST_CHAIN:
        seen.append(current)
        yield current
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__ or current.__context__


def unwritable(path: str | None, reason: str, advice: str | None = None) -> ConfigError:
    """Return the error for a place that cannot be written, which names the variable that moves it, if one does."""
    shown = path or "a folder"
    return ConfigError(f"Expected to write {shown}. Received: {reason}. Next: {advice or _advice(path)}.")


def _advice(path: str | None) -> str:
    if path is not None:
        for variable, folder in (
            ("RAY_TMPDIR", os.environ.get("RAY_TMPDIR")),
            ("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME")),
            ("HOME", os.environ.get("HOME")),
            ("TMPDIR", _temporary_folder()),
            ("TMPDIR", "/tmp"),  # noqa: S108 - where Ray goes without it
        ):
            if folder and _is_below(path, folder):
                return f"set {variable} to a folder that can be written"
    return "check owner, mode and mount options, or set HOME and TMPDIR to folders that can be written"


def _is_below(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder) or Path(path).is_relative_to(Path(folder).resolve())


def _temporary_folder() -> str | None:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none of the usual ones can be written
        return None


def _full_disk(error: BaseException) -> StorageError:
    path = _path_of(error)
    where = f" on the disk of {path}" if path else ""
    return StorageError(
        f"Expected free space{where}. Received: No space left on device. "
        f"Next: free or add space there, in the output and in {_temporary_folder() or 'the temporary folder'}."
    )


def _path_of(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        for name in (error.filename, error.filename2):
            if isinstance(name, str | bytes) and name:
                return os.fsdecode(name)
    found = _READ_ONLY.search(str(error))
    return found.group(2) if found else None
