"""Files that a node needs once: fetched from S3 into the user's cache folder by one process while the others wait."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_ray.storage import open_store, split_uri
from cnn_ray.user_folders import cache_folder


def local_copy(uri: str) -> Path:
    """A local path with the bytes of the file as it is now: the file itself, or a copy of the S3 object.

    The copy is kept under its location and etag, behind a lock: the workers of one node download it once, and an object
    that was replaced is fetched anew.

    Raises:
        NotFoundError: there is no such file.
        StorageError: storage refused.
    """
    parent, key = split_uri(uri)
    store = open_store(parent)
    etag = store.head(key).etag
    if not uri.startswith("s3://"):
        return Path(store.uri) / key
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(key).name)
    folder = cache_folder() / "files" / hashlib.sha256(f"{uri}\n{etag}".encode()).hexdigest()[:32]
    path = folder / name
    with one_at_a_time(folder):
        if not path.is_file():
            partial = path.with_name(f".{name}.partial")
            store.get_to_file(key, partial)
            partial.replace(path)
    return path


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """One process of this machine at a time inside, for each folder (which is made)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
