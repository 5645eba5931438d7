"""Definition -> Keras classifier of uint8 pixels: preprocessing, augmentation, backbone and head in one model.

The same definition always gives the same graph, so weights saved from one build load into the next, and an artifact
needs to hold numbers only. `import keras`, never `tf.keras`: Ray's TensorFlow backend points the latter at Keras 2.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_ray.architectures import BACKBONE_NAME, SIMPLE_CNN, Architecture, build_backbone, find_architecture, preprocess
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import keras

IMAGENET = "imagenet"
SIMPLE_CNN_UNITS = 64
WEIGHTS_CHOICES = "imagenet (with network), a .weights.h5 file (local or s3://), or leave it out for none"


def input_size_px(definition: ModelDefinition) -> tuple[int, int]:
    """(height, width) of the model input: the definition's own, else the architecture's.

    Raises:
        ConfigError: unknown architecture.
    """
    side = definition.input_size_px or find_architecture(definition.architecture).default_size_px
    return side, side


def check_definition(definition: ModelDefinition) -> None:
    """Nothing, when the definition can be built as far as can be seen without Keras; run before anything is started.

    Raises:
        ConfigError: unknown architecture, weights that it does not have, or a local weights file that is missing.
    """
    architecture = find_architecture(definition.architecture)
    weights = definition.weights
    if weights == IMAGENET and architecture.name == SIMPLE_CNN:
        raise ConfigError(
            "Expected an architecture with published weights for weights: imagenet. Received: simple_cnn. "
            "Next: leave model.weights out, or take MobileNetV2."
        )
    if weights is not None and weights != IMAGENET and not weights.startswith("s3://") and not Path(weights).is_file():
        raise _missing_weights(weights)


def fetch_weights(definition: ModelDefinition, folder: Path) -> Path | None:
    """Local path of the start weights' file (an s3:// one is downloaded into the folder), or None without a file.

    Raises:
        ConfigError: there is no such file.
        StorageError: storage refused.
    """
    weights = definition.weights
    if weights is None or weights == IMAGENET:
        return None
    if not weights.startswith("s3://"):
        if not Path(weights).is_file():
            raise _missing_weights(weights)
        return Path(weights)
    from cnn_ray.storage import open_store, split_uri

    parent, key = split_uri(weights)
    path = folder / key
    try:
        open_store(parent).get_to_file(key, path)
    except NotFoundError:
        raise _missing_weights(weights) from None
    return path


def _missing_weights(weights: str) -> ConfigError:
    return ConfigError(
        f"Expected a file of start weights. Received: {weights}, which does not exist. "
        f"Next: correct model.weights: {WEIGHTS_CHOICES}."
    )


def build_classifier(
    definition: ModelDefinition, num_classes: int, *, seed: int = 0, weights_path: Path | None = None
) -> keras.Model:
    """A classifier: uint8 pixels [N, S, S, 3] named "pixels" -> float32 softmax scores [N, num_classes].

    Start weights are drawn from the seed (Keras's global seed is set to it), then the backbone's are replaced: by those
    of `weights_path`, of the definition's file, or of ImageNet.

    Raises:
        ConfigError: unknown architecture, unfit input size, or start weights that cannot be had or do not fit.
    """
    import keras

    keras.utils.set_random_seed(seed)
    architecture = find_architecture(definition.architecture)
    side, _ = input_size_px(definition)
    backbone = _backbone_with_weights(definition, architecture, side, weights_path)

    pixels = keras.Input((side, side, 3), dtype="uint8", name="pixels")
    features = pixels
    for layer in _augmentation(definition, seed):
        features = layer(features)
    features = preprocess(features, architecture.preprocessing)
    features = backbone(features)
    pool = keras.layers.Flatten if architecture.name == SIMPLE_CNN else keras.layers.GlobalAveragePooling2D
    features = pool(name="features")(features)
    units = definition.hidden_units or (SIMPLE_CNN_UNITS if architecture.name == SIMPLE_CNN else 0)
    if units:
        features = keras.layers.Dense(units, activation="relu", name="hidden")(features)
    if definition.dropout:
        features = keras.layers.Dropout(definition.dropout, seed=seed + 10, name="dropout")(features)
    scores = keras.layers.Dense(num_classes, activation="softmax", dtype="float32", name="scores")(features)
    return keras.Model(pixels, scores, name="classifier")


def _augmentation(definition: ModelDefinition, seed: int) -> list[Any]:
    """Layers that change images in training only. They see pixel values 0..255, before any preprocessing."""
    import keras

    if definition.augmentation == "none":
        return []
    return [
        keras.layers.Rescaling(1.0, dtype="float32", name="augment_float"),
        keras.layers.RandomFlip("horizontal", seed=seed + 1, dtype="float32", name="augment_flip"),
        keras.layers.RandomRotation(0.05, seed=seed + 2, dtype="float32", name="augment_rotation"),
        keras.layers.RandomZoom(0.1, seed=seed + 3, dtype="float32", name="augment_zoom"),
        keras.layers.RandomContrast(0.1, value_range=(0, 255), seed=seed + 4, dtype="float32", name="augment_contrast"),
    ]


def _backbone_with_weights(
    definition: ModelDefinition, architecture: Architecture, side: int, weights_path: Path | None
) -> keras.Model:
    if definition.weights == IMAGENET and weights_path is None:
        check_definition(definition)
        return _download_backbone(architecture, side)
    backbone = build_backbone(architecture, side)
    if weights_path is None:
        with tempfile.TemporaryDirectory(prefix="cnn_ray-weights-") as folder:
            path = fetch_weights(definition, Path(folder))
            if path is not None:
                _load(backbone, path, architecture)
    else:
        _load(backbone, weights_path, architecture)
    return backbone


def _download_backbone(architecture: Architecture, side: int) -> keras.Model:
    """The backbone with Keras's ImageNet weights. Keras downloads in place, so one process per machine at a time."""
    import fcntl

    lock = Path(tempfile.gettempdir()) / "cnn_ray-imagenet.lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            return build_backbone(architecture, side, imagenet=True)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - Keras wraps every download failure in a bare Exception
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"Expected to download the ImageNet weights of {architecture.name}. Received: {reason}. "
                f"Next: set model.weights to one of: {WEIGHTS_CHOICES}."
            ) from None


def _load(backbone: keras.Model, path: Path, architecture: Architecture) -> None:
    if not path.is_file():
        raise _missing_weights(str(path))
    try:
        backbone.load_weights(path)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Expected weights of {architecture.name} without its top. Received: {path} ({reason}). "
            "Next: correct model.weights or model.architecture."
        ) from None


def freeze_backbone(model: keras.Model) -> None:
    """Afterwards only the head of the classifier trains, and the backbone's BatchNorm layers are in inference mode."""
    model.get_layer(BACKBONE_NAME).trainable = False


def unfreeze_backbone(model: keras.Model) -> None:
    """Afterwards the whole classifier trains, except that BatchNorm normalises with the statistics it has.

    With small data anything else destroys what was learnt (Keras guide "Transfer learning & fine-tuning"). The guide's
    way, `backbone(features, training=False)`, does nothing in Keras 3.15: the `training=True` of the outer call
    replaces it (`operation_fn` in keras/src/models/functional.py). BatchNorm with `trainable = False` does infer.
    """
    import keras

    model.get_layer(BACKBONE_NAME).trainable = True
    for layer in walk_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def walk_layers(model: Any) -> Iterator[Any]:
    """Every layer of the model that is no model itself, depth first: public Keras attributes only."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from walk_layers(layer)
        else:
            yield layer
