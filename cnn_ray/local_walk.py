"""A local folder as sorted rows of key, etag and size; links are followed as far as the caller says.

A link to a file below the folder is a file. Other links are left out and counted, unless they are followed: then a link
that leads outside of the folder is a file or folder like any other. Each real folder is walked once, so that no loop of
links is entered and nothing below the folder is listed twice.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

from cnn_ray.input_filters import BROKEN_LINK, LINK_OUTSIDE, LINK_TO_FOLDER, REPEATED_FOLDER, SPECIAL_FILE
from cnn_ray.storage_base import OWN_PREFIX

Row = tuple[str, str, int]
"""Key, etag and size in bytes of one listed file."""


def etag_of(status: os.stat_result) -> str:
    """Return the etag of a file: `mtime_ns-size`."""
    return f"{status.st_mtime_ns}-{status.st_size}"


def encoded(name: bytes) -> str:
    """Return `name` as text: itself where it is UTF-8, percent-encoded where it is not (Arrow strings are UTF-8)."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return quote(name)


class Walk:
    """The files below a folder whose key begins with `prefix`. What is left out is counted by reason.

    Raises:
        OSError: a folder cannot be read.
    """

    def __init__(self, root: bytes, prefix: str, *, follow_symlinks: bool, left_out: Counter[str]) -> None:
        self._root = os.path.realpath(root)
        self._prefix = prefix
        self._follow = follow_symlinks
        self._left_out = left_out
        self._walked: set[tuple[int, int]] = set()
        """Device and inode of the real folders, where links are followed."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows in byte order of the key.

        Raises:
            NotFoundError: there is no such folder.
        """
        os.stat(self._root)  # noqa: PTH116 - bytes: names need not be UTF-8
        yield from self._rows(self._root, "")

    def _rows(self, folder: bytes, at: str) -> Iterator[Row]:
        """Yield the rows below `folder`, whose key is `at`.

        A folder sorts as its name with "/" behind it, which is what puts `a-b` before `a/b` as S3 does.
        """
        if self._follow and not self._is_new(folder):
            self._left_out[REPEATED_FOLDER] += 1
            return
        found: list[tuple[str, os.DirEntry[bytes]]] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                key = at + encoded(entry.name)
                if entry.name.startswith(OWN_PREFIX.encode()):
                    continue
                if self._is_folder(entry):
                    key += "/"
                if key.startswith(self._prefix) or (key.endswith("/") and self._prefix.startswith(key)):
                    found.append((key, entry))
        found.sort(key=lambda pair: pair[0].encode())
        for key, entry in found:
            if key.endswith("/"):
                yield from self._rows(entry.path, key)
            elif (status := self._status(entry)) is not None:
                yield key, etag_of(status), status.st_size

    def _is_new(self, folder: bytes) -> bool:
        status = os.stat(folder)  # noqa: PTH116 - bytes
        identity = (status.st_dev, status.st_ino)
        if identity in self._walked:
            return False
        self._walked.add(identity)
        return True

    def _is_folder(self, entry: os.DirEntry[bytes]) -> bool:
        """Whether the entry is a folder that is entered: a real one, or a link that is followed to one outside."""
        if entry.is_dir(follow_symlinks=False):
            return True
        if not (self._follow and entry.is_symlink()):
            return False
        try:
            return entry.is_dir() and not self._is_below(os.path.realpath(entry.path))
        except OSError:  # a loop of links, or a target that may not be looked at
            return False

    def _status(self, entry: os.DirEntry[bytes]) -> os.stat_result | None:
        """The status of a file; None, counted, for what is none, and for a file that is gone by now."""
        if entry.is_symlink() and (reason := self._why_not_followed(entry.path)) is not None:
            self._left_out[reason] += 1
            return None
        try:
            status = entry.stat()
        except FileNotFoundError:
            return None
        if stat.S_ISREG(status.st_mode):
            return status
        self._left_out[LINK_TO_FOLDER if stat.S_ISDIR(status.st_mode) else SPECIAL_FILE] += 1
        return None

    def _why_not_followed(self, link: bytes) -> str | None:
        try:
            target = os.path.realpath(link, strict=True)
            os.stat(target)  # noqa: PTH116 - bytes
        except PermissionError:
            return BROKEN_LINK if self._follow else LINK_OUTSIDE
        except OSError:
            return BROKEN_LINK
        return None if self._follow or self._is_below(target) else LINK_OUTSIDE

    def _is_below(self, target: bytes) -> bool:
        return target == self._root or target.startswith(self._root.rstrip(b"/") + b"/")
