"""A frozen backbone computed once per image: the head then trains on its features.

Exact while augmentation is off; with augmentation every image keeps what its first pass drew, an approximation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_ray.batches import Batches, HeldPixels

if TYPE_CHECKING:
    import keras

FEATURES_LAYER = "features"
ROWS_AT_ONCE = 64


def cut_at_features(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """(images -> pooled features, features -> scores): two models that share the classifier's layers and variables."""
    import keras

    features: Any = model.get_layer(FEATURES_LAYER).output
    below = keras.Model(model.input, features, name="backbone_and_pooling")
    names = [layer.name for layer in model.layers]
    inputs = keras.Input(features.shape[1:], dtype=features.dtype, name="cached_features")
    outputs: Any = inputs
    for name in names[names.index(FEATURES_LAYER) + 1 :]:
        outputs = model.get_layer(name)(outputs)
    return below, keras.Model(inputs, outputs, name="head")


def cached(batches: Batches, below: keras.Model, *, augment: bool) -> Batches:
    """The same batches with features float32 [K, D] in place of pixels; unreadable images keep zeros and weight 0.

    The backbone is frozen, so `training=True` draws the augmentation and leaves BatchNorm in inference mode.
    """
    import tensorflow as tf

    compute = tf.function(lambda pixels: below(pixels, training=augment), reduce_retracing=True)
    count = len(batches.label_ids)
    features = np.zeros((count, *below.output_shape[1:]), np.float32)
    readable = np.ones(count, bool)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, count))
        pixels, good = batches.source.take(rows)
        features[rows] = np.asarray(compute(tf.constant(pixels)), np.float32)
        readable[rows] = good
    return Batches(HeldPixels(features, readable), batches.label_ids, batches.strata, batches.rows_per_batch)
