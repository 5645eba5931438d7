"""The loss of a training as a function of single images, and the weights of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cnn_ray.config import TrainConfig


def image_losses(config: TrainConfig, num_classes: int) -> Callable[[Any, Any], Any]:
    """A function (label_ids int32 [b], scores float32 [b, C]) -> float32 [b], the loss of every image.

    Cross-entropy, or focal loss (arXiv 1708.02002 without its class factor alpha: `class_weight` is that), both with
    label smoothing when it is configured. Keras computes them, from the logits where it still has them.
    """
    import keras

    losses: Any = keras.losses  # typed without reduction=None, which it documents
    if config.loss == "focal":
        loss: Any = losses.CategoricalFocalCrossentropy(
            alpha=1.0, gamma=config.focal_gamma, label_smoothing=config.label_smoothing, reduction=None
        )
    elif config.label_smoothing:
        loss = losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing, reduction=None)
    else:
        return losses.SparseCategoricalCrossentropy(reduction=None)
    return lambda label_ids, scores: loss(keras.ops.one_hot(label_ids, num_classes), scores)


def class_weights(config: TrainConfig, label_ids: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 [C]: what the loss of each class is multiplied with while training; label_ids are the training images'.

    balanced is N / (C x count), as in scikit-learn: over the training images the weights average to 1, so the learning
    rate keeps its meaning. A class without an image weighs 1.
    """
    if config.class_weight == "none":
        return np.ones(num_classes, np.float32)
    counts = np.bincount(label_ids, minlength=num_classes)
    return np.where(counts > 0, len(label_ids) / (num_classes * np.maximum(counts, 1)), 1.0).astype(np.float32)
