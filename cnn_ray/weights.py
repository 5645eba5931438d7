"""Start weights: `imagenet`, none, or a file (local or s3://), fetched once per node and checked by its digest."""

from __future__ import annotations

import fcntl
import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_ray.artifact import cache_folder, sha256_of
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError, NotFoundError

IMAGENET = "imagenet"
WEIGHTS_CHOICES = "imagenet (with network), a .weights.h5 file (local or s3://), or leave it out for none"


def fetch_weights(definition: ModelDefinition) -> Path | None:
    """Local path of the start weights' file with the digest that the definition asks for, or None without a file.

    An s3:// file is kept in the user's cache folder under its location and etag, behind a lock: the workers of one
    node download it once, and a file that was replaced is fetched anew.

    Raises:
        ConfigError: there is no such file, or it has another digest.
        StorageError: storage refused.
    """
    weights = definition.weights
    if weights is None or weights == IMAGENET:
        return None
    path = _download(weights) if weights.startswith("s3://") else Path(weights)
    if not path.is_file():
        raise missing_weights(weights)
    if definition.weights_sha256 is not None and (digest := sha256_of(path)) != definition.weights_sha256:
        raise ConfigError(
            f"Expected start weights with SHA-256 {definition.weights_sha256}. Received: {weights} with {digest}. "
            "Next: restore the file, or correct model.weights_sha256."
        )
    return path


def missing_weights(weights: str) -> ConfigError:
    """The sentence for a file that is not there."""
    return ConfigError(
        f"Expected a file of start weights. Received: {weights}, which does not exist. "
        f"Next: correct model.weights: {WEIGHTS_CHOICES}."
    )


def _download(uri: str) -> Path:
    from cnn_ray.storage import open_store, split_uri

    parent, key = split_uri(uri)
    store = open_store(parent)
    try:
        etag = store.head(key).etag
    except NotFoundError:
        raise missing_weights(uri) from None
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(key).name)
    folder = cache_folder() / "weights" / hashlib.sha256(f"{uri}\n{etag}".encode()).hexdigest()[:32]
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


def imagenet_lock() -> Path:
    """The folder to lock while Keras downloads: it writes in place."""
    return Path(tempfile.gettempdir()) / "cnn_ray-imagenet"
