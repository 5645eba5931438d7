"""The tutorial's nets and the classics that keras.applications lacks: convolutions, and the dense layers after them.

Every backbone takes float32 [N, S, S, 3] (preprocessed) and gives features [N, h, w, c]; its head turns the flattened
or pooled features into what the output layer reads. Parameter counts in the docstrings are for 10 classes unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

SMALL_RESNET_WIDTHS = (16, 32, 64)
SMALL_RESNET_BLOCKS = 3
ALEXNET_FULL_STEM_PX = 128


def simple_cnn(size_px: int, name: str) -> keras.Model:
    """Convolutions of TensorFlow's CNN tutorial: 32, 64, 64 filters of 3x3, valid padding, pooled twice.

    With Flatten, Dense(64) and Dense(10) on 32x32 inputs it has the tutorial's 122,570 parameters.
    """
    import keras

    inputs = keras.Input((size_px, size_px, 3), dtype="float32")
    features = inputs
    for filters, pooled in ((32, True), (64, True), (64, False)):
        features = keras.layers.Conv2D(filters, 3, activation="relu")(features)
        if pooled:
            features = keras.layers.MaxPooling2D()(features)
    return keras.Model(inputs, features, name=name)


def augmented_cnn(size_px: int, name: str) -> keras.Model:
    """Convolutions of the tutorial's second net: 32 and 64 filters of 3x3, valid padding, each pooled.

    Its augmentation layers are `model.augmentation: photo`. With Flatten, Dense(128), Dropout(0.5) and Dense(10) on
    32x32 inputs it has 315,722 parameters.
    """
    import keras

    inputs = keras.Input((size_px, size_px, 3), dtype="float32")
    features = inputs
    for filters in (32, 64):
        features = keras.layers.Conv2D(filters, 3, activation="relu")(features)
        features = keras.layers.MaxPooling2D()(features)
    return keras.Model(inputs, features, name=name)


def lenet5(size_px: int, name: str) -> keras.Model:
    """Convolutions of LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition").

    Grey values (no parameters), then 6 and 16 filters of 5x5, tanh, average pooling. With Flatten, Dense(120),
    Dense(84) and Dense(10) on 32x32 inputs it has 61,706 parameters: the paper's net with all maps connected.
    """
    import keras

    inputs = keras.Input((size_px, size_px, 3), dtype="float32")
    features = keras.ops.mean(inputs, axis=-1, keepdims=True)
    for filters in (6, 16):
        features = keras.layers.Conv2D(filters, 5, activation="tanh")(features)
        features = keras.layers.AveragePooling2D(2)(features)
    return keras.Model(inputs, features, name=name)


def alexnet(size_px: int, name: str) -> keras.Model:
    """Convolutions of AlexNet in one tower (Krizhevsky et al. 2012, without the split over two GPUs).

    96, 256, 384, 384 and 256 filters, overlapping max pooling, no local response normalisation. With Flatten and two
    Dense(4096) at 227 px and 1000 classes it has 62,378,344 parameters (the paper's two groups: 60,965,224). Below
    128 px the first convolution is 5x5 with stride 1 instead of 11x11 with stride 4: nothing would be left of 32 px.
    """
    import keras

    inputs = keras.Input((size_px, size_px, 3), dtype="float32")
    kernel, stride = (11, 4) if size_px >= ALEXNET_FULL_STEM_PX else (5, 1)
    padding = "valid" if size_px >= ALEXNET_FULL_STEM_PX else "same"
    features = keras.layers.Conv2D(96, kernel, stride, padding=padding, activation="relu")(inputs)
    features = keras.layers.MaxPooling2D(3, 2)(features)
    features = keras.layers.Conv2D(256, 5, padding="same", activation="relu")(features)
    features = keras.layers.MaxPooling2D(3, 2)(features)
    for filters in (384, 384, 256):
        features = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(features)
    return keras.Model(inputs, keras.layers.MaxPooling2D(3, 2)(features), name=name)


def small_resnet(size_px: int, name: str) -> keras.Model:
    """The 20-layer residual net for CIFAR-10 of He et al. (arXiv 1512.03385, section 4.2), with 1x1 projections.

    Three stages of three blocks with 16, 32 and 64 filters. With average pooling and Dense(10) it has 274,042
    parameters (1,376 of them BatchNorm's moving statistics).
    """
    import keras

    inputs = keras.Input((size_px, size_px, 3), dtype="float32")
    features = _convolution(inputs, SMALL_RESNET_WIDTHS[0], 3, 1, relu=True)
    for stage, filters in enumerate(SMALL_RESNET_WIDTHS):
        for block in range(SMALL_RESNET_BLOCKS):
            stride = 2 if block == 0 and stage > 0 else 1
            inner = _convolution(features, filters, 3, stride, relu=True)
            inner = _convolution(inner, filters, 3, 1, relu=False)
            if stride != 1:
                features = _convolution(features, filters, 1, stride, relu=False)
            features = keras.layers.ReLU()(keras.layers.Add()([inner, features]))
    return keras.Model(inputs, features, name=name)


def _convolution(features: Any, filters: int, kernel: int, stride: int, *, relu: bool) -> Any:
    """BatchNorm's momentum is 0.9: with Keras's 0.99 its statistics lag behind for the whole of a short training."""
    import keras

    features = keras.layers.Conv2D(
        filters, kernel, stride, padding="same", use_bias=False, kernel_initializer="he_normal"
    )(features)
    features = keras.layers.BatchNormalization(momentum=0.9)(features)
    return keras.layers.ReLU()(features) if relu else features


BACKBONES: dict[str, Callable[[int, str], Any]] = {
    "simple_cnn": simple_cnn,
    "augmented_cnn": augmented_cnn,
    "lenet5": lenet5,
    "alexnet": alexnet,
    "small_resnet": small_resnet,
}

ORIGINAL_HEADS: dict[str, tuple[tuple[int, ...], str, float]] = {
    "simple_cnn": ((64,), "relu", 0.0),
    "augmented_cnn": ((128,), "relu", 0.5),
    "lenet5": ((120, 84), "tanh", 0.0),
    "alexnet": ((4096, 4096), "relu", 0.5),
    "VGG16": ((4096, 4096), "relu", 0.5),
    "VGG19": ((4096, 4096), "relu", 0.5),
}
"""Architectures whose paper has dense layers after Flatten: (units, activation, dropout after each)."""
