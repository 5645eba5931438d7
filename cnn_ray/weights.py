"""Start weights: `imagenet`, none, or a file (local or s3://), fetched once per node and checked by its digest."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cnn_ray.artifact import sha256_of
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError, NotFoundError
from cnn_ray.node_files import local_copy

IMAGENET = "imagenet"
WEIGHTS_CHOICES = "imagenet (with network), a .weights.h5 file (local or s3://), or leave it out for none"


def fetch_weights(definition: ModelDefinition) -> Path | None:
    """Local path of the start weights' file with the digest that the definition asks for, or None without a file.

    Raises:
        ConfigError: there is no such file, or it has another digest.
        StorageError: storage refused.
    """
    weights = definition.weights
    if weights is None or weights == IMAGENET:
        return None
    try:
        path = local_copy(weights)
    except NotFoundError:
        raise missing_weights(weights) from None
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


def imagenet_lock() -> Path:
    """The folder to lock while Keras downloads: it writes in place."""
    return Path(tempfile.gettempdir()) / "cnn_ray-imagenet"
