"""The stores of a job: one for its root, and one for each other bucket that its uris name."""

from __future__ import annotations

import functools
import threading

from cnn_ray.storage import Store, open_store, split_uri
from cnn_ray.storage_options import storage_options


class Stores:
    """Find the store of any uri of a job. Safe for threads.

    Each bucket is opened once: an S3 client costs 100 ms of CPU, and its connections are what makes GETs fast.
    """

    def __init__(self, root: Store, *, follow_symlinks: bool = False) -> None:
        self.root = root
        self._follow_symlinks = follow_symlinks
        self._buckets: dict[str, Store] = {}
        self._lock = threading.Lock()

    def locate(self, uri: str) -> tuple[Store, str]:
        """Return the store that holds `uri` and the key of `uri` in it.

        Raises:
            ConfigError: the uri is no absolute location.
        """
        if uri.startswith(self.root.uri + "/"):
            return self.root, uri[len(self.root.uri) + 1 :]
        if uri.startswith("s3://"):
            bucket, _, key = uri[len("s3://") :].partition("/")
            return self.bucket(bucket), key
        folder, name = split_uri(uri)  # opening a folder costs nothing, and there may be any number of them
        return open_store(folder, follow_symlinks=self._follow_symlinks), name

    def bucket(self, bucket: str) -> Store:
        """Return the store of the whole bucket."""
        with self._lock:
            if bucket not in self._buckets:
                self._buckets[bucket] = open_store(f"s3://{bucket}")
            return self._buckets[bucket]


def stores_of(root_uri: str, *, follow_symlinks: bool = False) -> Stores:
    """Return the stores of a job whose uris start at `root_uri`: the same ones at every call in this process."""
    return _stores_of(root_uri, follow_symlinks, storage_options().model_dump_json())


@functools.lru_cache(maxsize=8)
def _stores_of(root_uri: str, follow_symlinks: bool, _options: str) -> Stores:
    return Stores(open_store(root_uri, follow_symlinks=follow_symlinks), follow_symlinks=follow_symlinks)
