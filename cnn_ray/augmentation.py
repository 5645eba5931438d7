"""Augmentation as Keras layers on pixel values 0..255: part of the model, active in training only.

`photo` is the tutorial's (flip, rotation, zoom, contrast) with a shift and wider ranges (on 17 flowers a fine-tuned
MobileNetV2 went from 0.865 to 0.89). `screenshot` changes what differs between two captures of one
page (crop and rescale, page zoom, a few pixels of scrolling, brightness, contrast, JPEG recompression) and never what
would make another page of it: text does not come mirrored or tilted, and light grey on white stays apart from white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Augmentation = Literal["none", "photo", "screenshot"]
Draw = Callable[[float, float], Any]
"""(low, high) -> float32 [N], one uniform number for each image of the batch."""

SHOWN_SHARE = (0.8, 1.05)
"""Share of the page's sides that is shown: below 1 a crop, above 1 the browser's page zoom made smaller."""
ASPECT = (0.95, 1.05)
SCROLL = (-0.03, 0.03)
BLACK = (0.0, 25.0)
WHITE = (215.0, 255.0)
JPEG_QUALITY = (50.0, 100.0)


def augmentation_layers(kind: Augmentation, seed: int, strength: float = 1.0) -> list[Any]:
    """Keras layers, float32 [N, S, S, 3] to the same shape in 0..255; every image of a batch draws for itself.

    Their generators are variables, so a checkpoint holds them and a resumed training draws on where it stopped.
    """
    import keras

    if kind == "none":
        return []
    layers = keras.layers
    to_float = layers.Rescaling(1.0, dtype="float32", name="augment_float")
    if kind == "photo":
        contrast = min(0.25 * strength, 0.9)
        return [
            to_float,
            layers.RandomFlip("horizontal", seed=seed + 1, dtype="float32", name="augment_flip"),
            layers.RandomRotation(0.08 * strength, seed=seed + 2, dtype="float32", name="augment_rotation"),
            layers.RandomZoom((-0.4 * strength, 0.1), seed=seed + 3, dtype="float32", name="augment_zoom"),
            layers.RandomTranslation(
                0.1 * strength, 0.1 * strength, seed=seed + 4, dtype="float32", name="augment_translation"
            ),
            layers.RandomContrast(
                contrast, value_range=(0, 255), seed=seed + 5, dtype="float32", name="augment_contrast"
            ),
        ]
    return [
        to_float,
        _random_layer("augment_crop", crop_and_zoom, seed + 1),
        _random_layer("augment_tones", shift_tones, seed + 2),
        _random_layer("augment_jpeg", recompress, seed + 3),
    ]


def crop_and_zoom(images: Any, draw: Draw) -> Any:
    """Each image cropped anywhere, zoomed and moved by a few pixels in a single resampling: two would blur text.

    Only scales and offsets are drawn (no shear, no rotation, no negative scale), so lines of text stay level and read
    from left to right. Beyond the page its border goes on.
    """
    import keras

    height, width = images.shape[1:3]
    share, aspect = draw(*SHOWN_SHARE), draw(*ASPECT)
    rows = _scale_and_offset(share, height, draw)
    columns = _scale_and_offset(share * aspect, width, draw)
    zero = keras.ops.zeros_like(share)
    transform = [columns[0], zero, columns[1], zero, rows[0], rows[1], zero, zero]
    return keras.ops.image.affine_transform(
        images, keras.ops.stack(transform, axis=1), interpolation="bilinear", fill_mode="nearest"
    )


def _scale_and_offset(share: Any, side_px: int, draw: Draw) -> tuple[Any, Any]:
    """(scale, offset in pixels) of output index -> input index, which count from the middle of the first pixel."""
    start = draw(0.0, 1.0) * (1.0 - share) + draw(*SCROLL)
    return share, start * side_px + 0.5 * share - 0.5


def shift_tones(images: Any, draw: Draw) -> Any:
    """Each image with other brightness and contrast: black and white move inwards and what is between moves along.

    Nothing is clipped, as adding brightness does: the pale texts of a form would be lost on its white.
    """
    black, white = draw(*BLACK)[:, None, None, None], draw(*WHITE)[:, None, None, None]
    return images * ((white - black) / 255.0) + black


def recompress(images: Any, draw: Draw) -> Any:
    """Each image written as JPEG and read again; no gradient passes, and none need to: nothing trains before it."""
    import tensorflow as tf

    qualities = tf.cast(draw(*JPEG_QUALITY), tf.int32)
    recoded = tf.map_fn(
        lambda pair: tf.image.adjust_jpeg_quality(pair[0], pair[1]),
        (tf.cast(tf.round(tf.clip_by_value(images, 0.0, 255.0)), tf.uint8), qualities),
        fn_output_signature=tf.TensorSpec(images.shape[1:], tf.uint8),
    )
    return tf.cast(recoded, tf.float32)


def _random_layer(name: str, change: Callable[[Any, Draw], Any], seed: int) -> Any:
    """A float32 layer that changes images in training only, with a generator of its own.

    All replicas of a strategy hold the same generator state, so that one checkpoint fits them all; the number of the
    replica goes into each draw, or the images of two workers would be changed alike.
    """
    import keras
    import tensorflow as tf

    class RandomChange(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__(dtype="float32", name=name, trainable=False)
            self.generator = keras.random.SeedGenerator(seed)

        def call(self, images: Any, training: bool = False) -> Any:
            return change(images, lambda low, high: self._draw(tf.shape(images)[:1], low, high)) if training else images

        def _draw(self, shape: Any, low: float, high: float) -> Any:
            replica = tf.distribute.get_replica_context()
            number: Any = replica.replica_id_in_sync_group if replica else 0
            state: Any = tf.random.fold_in(tf.cast(self.generator.next(), tf.int32), number)
            return tf.random.stateless_uniform(shape, state, low, high)

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

    return RandomChange()
