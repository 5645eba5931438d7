"""Table of architectures: name -> backbone, default input size and the preprocessing that its weights were made for.

Two kinds: the small nets of the tutorial, built here or in `classic_nets`, and every classifier of `keras.applications`
under its Keras name, looked up without regard to letter case. Preprocessing is expressed as plain Keras layers, so that
it travels inside the exported graph and no caller can forget it. Nothing here imports Keras before a builder runs: the
table answers `--help` and configuration checks as well.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cnn_ray import classic_nets
from cnn_ray.errors import ConfigError

if TYPE_CHECKING:
    import keras

Preprocessing = Literal["none", "zero_to_one", "minus_one_to_one", "imagenet_caffe", "imagenet_torch", "inside_model"]

SIMPLE_CNN = "simple_cnn"
BACKBONE_NAME = "backbone"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table."""

    name: str
    default_size_px: int
    preprocessing: Preprocessing

    @property
    def smallest_size_px(self) -> int:
        """The smallest side of an input that leaves something behind the pooling layers (Keras's own limits)."""
        return _SMALLEST_PX.get(self.name, 32)

    @property
    def classic(self) -> bool:
        """Built by `classic_nets`: no published weights."""
        return self.name in classic_nets.BACKBONES


_SMALLEST_PX = {
    **{"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71},
    **{"simple_cnn": 18, "augmented_cnn": 10, "lenet5": 16, "alexnet": 15, "small_resnet": 4},
}


def _family(preprocessing: Preprocessing, **sizes_px: int) -> dict[str, Architecture]:
    return {name: Architecture(name, size_px, preprocessing) for name, size_px in sizes_px.items()}


ARCHITECTURES: dict[str, Architecture] = {
    **_family("zero_to_one", simple_cnn=32, augmented_cnn=32),
    **_family("minus_one_to_one", lenet5=32, alexnet=227, small_resnet=32),
    **_family("imagenet_caffe", VGG16=224, VGG19=224, ResNet50=224, ResNet101=224, ResNet152=224),
    **_family("minus_one_to_one", ResNet50V2=224, ResNet101V2=224, ResNet152V2=224, MobileNet=224, MobileNetV2=224),
    **_family("minus_one_to_one", InceptionV3=299, InceptionResNetV2=299, Xception=299),
    **_family("minus_one_to_one", NASNetMobile=224, NASNetLarge=331),
    **_family("imagenet_torch", DenseNet121=224, DenseNet169=224, DenseNet201=224),
    **_family("inside_model", MobileNetV3Small=224, MobileNetV3Large=224),
    **_family("inside_model", EfficientNetB0=224, EfficientNetB1=240, EfficientNetB2=260, EfficientNetB3=300),
    **_family("inside_model", EfficientNetB4=380, EfficientNetB5=456, EfficientNetB6=528, EfficientNetB7=600),
    **_family("inside_model", EfficientNetV2B0=224, EfficientNetV2B1=240, EfficientNetV2B2=260, EfficientNetV2B3=300),
    **_family("inside_model", EfficientNetV2S=384, EfficientNetV2M=480, EfficientNetV2L=480),
    **_family("inside_model", ConvNeXtTiny=224, ConvNeXtSmall=224, ConvNeXtBase=224, ConvNeXtLarge=224),
    **_family("inside_model", ConvNeXtXLarge=224),
}
"""Sizes are those of the published weights; preprocessing is that of each module's `preprocess_input` in Keras 3.15."""


def find_architecture(name: str) -> Architecture:
    """The table's row for the name.

    Raises:
        ConfigError: no such architecture; the sentence names the nearest one.
    """
    found = ARCHITECTURES.get(name) or _BY_LOWER_NAME.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), _BY_LOWER_NAME, n=1, cutoff=0.5)
        hint = f"did you mean {_BY_LOWER_NAME[near[0]].name}?" if near else "take simple_cnn, MobileNetV2 or ResNet50."
        raise ConfigError(f"Expected a known architecture. Received: {name}. Next: {hint}")
    return found


_BY_LOWER_NAME = {name.lower(): row for name, row in ARCHITECTURES.items()}


def expected_range(preprocessing: Preprocessing) -> tuple[float, float]:
    """(lowest, highest) value, over all three channels, that a backbone gets for pixel values 0 to 255.

    Of a row's own `preprocessing` it is the range that its published weights were made for.
    """
    scale, offset = _SCALE_AND_OFFSET[preprocessing]
    scales = scale if isinstance(scale, list) else [scale] * 3
    offsets = offset if isinstance(offset, list) else [offset] * 3
    return min(offsets), max(255 * s + o for s, o in zip(scales, offsets, strict=True))


def preprocess(pixels: Any, preprocessing: Preprocessing) -> Any:
    """Float32 features [N, H, W, 3] in the range that the backbone was trained on, from uint8 pixels [N, H, W, 3].

    Always computed in float32: bfloat16 has 8 bits of mantissa, so under mixed precision neighbouring grey values
    would fall together.
    """
    import keras

    scale, offset = _SCALE_AND_OFFSET[preprocessing]
    if preprocessing == "imagenet_caffe":  # Caffe's weights read blue, green, red
        pixels = keras.ops.flip(keras.layers.Rescaling(1.0, dtype="float32", name="to_float")(pixels), axis=-1)
    return keras.layers.Rescaling(scale, offset, dtype="float32", name=preprocessing)(pixels)


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE_AND_OFFSET: dict[Preprocessing, tuple[Any, Any]] = {
    "none": (1.0, 0.0),
    "zero_to_one": (1 / 255, 0.0),
    "minus_one_to_one": (1 / 127.5, -1.0),
    "imagenet_caffe": ([1.0, 1.0, 1.0], [-103.939, -116.779, -123.68]),
    "imagenet_torch": (
        [1 / (255 * std) for std in _IMAGENET_STD],
        [-mean / std for mean, std in zip(_IMAGENET_MEAN, _IMAGENET_STD, strict=True)],
    ),
    "inside_model": (1.0, 0.0),
}


def build_backbone(architecture: Architecture, size_px: int, *, imagenet: bool = False) -> keras.Model:
    """The feature extractor [N, S, S, 3] -> [N, h, w, c] without its classification head, named "backbone".

    Raises:
        ConfigError: the input size is too small for the architecture, or the ImageNet weights cannot be had.
    """
    import keras

    try:
        if architecture.classic:
            return classic_nets.BACKBONES[architecture.name](size_px, BACKBONE_NAME)
        make = getattr(keras.applications, architecture.name)
        weights = "imagenet" if imagenet else None
        return make(include_top=False, weights=weights, input_shape=(size_px, size_px, 3), name=BACKBONE_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Expected an input size that {architecture.name} takes. Received: {size_px} px ({reason}). "
            f"Next: set model.input_size_px, for instance to {architecture.default_size_px}."
        ) from None
