"""Definition -> Keras classifier of uint8 pixels: preprocessing, augmentation, backbone and head in one model.

The same definition always gives the same graph, so weights saved from one build load into the next, and an artifact
needs to hold numbers only. `import keras`, never `tf.keras`: Ray's TensorFlow backend points the latter at Keras 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_ray.architectures import BACKBONE_NAME, Architecture, Preprocessing, build_backbone, find_architecture
from cnn_ray.architectures import preprocess as preprocess_pixels
from cnn_ray.augmentation import augmentation_layers
from cnn_ray.classic_nets import ORIGINAL_HEADS
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError
from cnn_ray.node_files import one_at_a_time
from cnn_ray.weights import IMAGENET, WEIGHTS_CHOICES, fetch_weights, imagenet_lock, missing_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import keras


SCRATCH_MOMENTUM = 0.9


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
        ConfigError: unknown architecture, weights or a top that it does not have, a digest without a file, or a local
            weights file that is missing.
    """
    architecture = find_architecture(definition.architecture)
    weights = definition.weights
    if weights == IMAGENET and architecture.classic:
        raise ConfigError(
            f"Expected an architecture with published weights for weights: imagenet. Received: {architecture.name}. "
            "Next: leave model.weights out, or take MobileNetV2."
        )
    if definition.weights_sha256 is not None and weights in (None, IMAGENET):
        raise ConfigError(
            f"Expected a file in model.weights for model.weights_sha256. Received: {weights or 'none'}. "
            "Next: name the file, or leave the digest out (Keras checks the files that it downloads)."
        )
    if definition.top == "original" and architecture.name not in ORIGINAL_HEADS and not architecture.classic:
        raise ConfigError(
            f"Expected top: original for VGG16, VGG19 or the classic nets. Received: {architecture.name}, whose paper "
            "has the pooled top. Next: leave model.top out."
        )
    if weights is not None and weights != IMAGENET and not weights.startswith("s3://") and not Path(weights).is_file():
        raise missing_weights(weights)


def used_preprocessing(definition: ModelDefinition) -> Preprocessing:
    """The preprocessing that the classifier applies: the definition's own, else the architecture's."""
    if definition.preprocessing != "auto":
        return definition.preprocessing
    return find_architecture(definition.architecture).preprocessing


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
    for layer in augmentation_layers(definition.augmentation, seed, definition.augmentation_strength):
        features = layer(features)
    features = preprocess_pixels(features, used_preprocessing(definition))
    features = _head(backbone(features), definition, architecture, seed)
    scores = keras.layers.Dense(num_classes, activation="softmax", dtype="float32", name="scores")(features)
    return keras.Model(pixels, scores, name="classifier")


def _head(features: Any, definition: ModelDefinition, architecture: Architecture, seed: int) -> Any:
    """What stands between backbone and output layer. Classic nets have their paper's dense layers with either top."""
    import keras

    original = architecture.name in ORIGINAL_HEADS and (architecture.classic or definition.top == "original")
    units, activation, dropout = ORIGINAL_HEADS[architecture.name] if original else ((), "relu", 0.0)
    if definition.hidden_units:
        units = (definition.hidden_units,)
    rate = definition.dropout or dropout
    pool = keras.layers.Flatten if original else keras.layers.GlobalAveragePooling2D
    features = pool(name="features")(features)
    for k, width in enumerate(units):
        features = keras.layers.Dense(width, activation=activation, name=f"hidden_{k + 1}" if k else "hidden")(features)
        if rate and k + 1 < len(units):
            features = keras.layers.Dropout(rate, seed=seed + 11 + k, name=f"dropout_{k + 1}")(features)
    return keras.layers.Dropout(rate, seed=seed + 10, name="dropout")(features) if rate else features


def _backbone_with_weights(
    definition: ModelDefinition, architecture: Architecture, side: int, weights_path: Path | None
) -> keras.Model:
    if definition.weights == IMAGENET and weights_path is None:
        check_definition(definition)
        return _download_backbone(architecture, side)
    backbone = build_backbone(architecture, side)
    path = weights_path or fetch_weights(definition)
    if path is not None:
        _load(backbone, path, architecture)
    return backbone


def _download_backbone(architecture: Architecture, side: int) -> keras.Model:
    """The backbone with Keras's ImageNet weights. Keras downloads in place, so one process per machine at a time."""
    with one_at_a_time(imagenet_lock()):
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
        raise missing_weights(str(path))
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


def train_from_scratch(model: keras.Model) -> None:
    """Afterwards everything trains, and the moving statistics of BatchNorm follow within tens of steps.

    keras.applications takes momenta from 0.99 to 0.999 (MobileNetV2), made for millions of steps: after a few hundred
    the statistics are still those of the first batches, and a net that has learnt answers at chance.
    """
    import keras

    for layer in walk_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(layer.momentum, SCRATCH_MOMENTUM)


def walk_layers(model: Any) -> Iterator[Any]:
    """Every layer of the model that is no model itself, depth first: public Keras attributes only."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from walk_layers(layer)
        else:
            yield layer
