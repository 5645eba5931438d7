"""Augmentation as Keras layers on pixel values 0..255: part of the model, active in training only.

`photo` is the tutorial's: flip, rotation, zoom, contrast, with wider ranges (zooming in by up to 0.4 brought a
fine-tuned MobileNetV2 from 0.865 to 0.888 on 17 flowers). `screenshot` changes what differs between two captures of one
page (crop and rescale, page zoom, a few pixels of scrolling, brightness, contrast, JPEG recompression) and never what
would make another page of it: text does not come mirrored or tilted.
"""

from __future__ import annotations

from typing import Any, Literal

Augmentation = Literal["none", "photo", "screenshot"]


def augmentation_layers(kind: Augmentation, seed: int) -> list[Any]:
    """Keras layers, float32 [N, S, S, 3] to the same shape in 0..255; every image of a batch draws for itself.

    Their generators are variables, so a checkpoint holds them and a resumed training draws on where it stopped.
    """
    import keras

    if kind == "none":
        return []
    layers = keras.layers
    to_float = layers.Rescaling(1.0, dtype="float32", name="augment_float")
    if kind == "photo":
        return [
            to_float,
            layers.RandomFlip("horizontal", seed=seed + 1, dtype="float32", name="augment_flip"),
            layers.RandomRotation(0.08, seed=seed + 2, dtype="float32", name="augment_rotation"),
            layers.RandomZoom((-0.4, 0.1), seed=seed + 3, dtype="float32", name="augment_zoom"),
            layers.RandomContrast(0.2, value_range=(0, 255), seed=seed + 4, dtype="float32", name="augment_contrast"),
        ]
    return [
        to_float,
        # Zooming in is a crop that is scaled up again; height and width apart, as windows have other proportions.
        layers.RandomZoom((-0.2, 0.05), (-0.2, 0.05), "nearest", seed=seed + 1, dtype="float32", name="augment_zoom"),
        layers.RandomTranslation(0.05, 0.05, "nearest", seed=seed + 2, dtype="float32", name="augment_translation"),
        layers.RandomBrightness(0.1, value_range=(0, 255), seed=seed + 3, dtype="float32", name="augment_brightness"),
        layers.RandomContrast(0.15, value_range=(0, 255), seed=seed + 4, dtype="float32", name="augment_contrast"),
        _jpeg_recompression(seed + 5),
    ]


def _jpeg_recompression(seed: int) -> Any:
    """Each image compressed as JPEG with a quality drawn from [40, 100); the gradient does not pass, and need not."""
    import keras
    import tensorflow as tf

    tf_image: Any = tf.image

    class RandomJpegQuality(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__(dtype="float32", name="augment_jpeg", trainable=False)
            self.generator = keras.random.SeedGenerator(seed)

        def call(self, images: Any, training: bool = False) -> Any:
            if not training:
                return images
            count = keras.ops.shape(images)[0]
            qualities = keras.random.randint((count,), 40, 100, seed=self.generator)
            pixels = tf.cast(tf.round(tf.clip_by_value(images, 0.0, 255.0)), tf.uint8)
            recoded = tf.map_fn(
                lambda pair: tf_image.adjust_jpeg_quality(pair[0], pair[1]),
                (pixels, qualities),
                fn_output_signature=tf.TensorSpec(tuple(images.shape)[1:], tf.uint8),
            )
            return tf.cast(recoded, tf.float32)

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

    return RandomJpegQuality()
