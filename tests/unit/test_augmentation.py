"""Augmentation: what may change, what never may, and that nothing of it is left in inference."""

import numpy as np
import pytest

from cnn_ray.augmentation import augmentation_layers
from cnn_ray.config import ModelDefinition
from cnn_ray.model import build_classifier

keras = pytest.importorskip("keras")


def augmented(kind, images, seed=0, times=1):
    layers = augmentation_layers(kind, seed)
    for _ in range(times):
        result = images
        for layer in layers:
            result = layer(result, training=True)
    return np.asarray(result)


def wedge(count: int) -> np.ndarray:
    """Dark at the left and at the top, bright at the right and at the bottom."""
    ramp = np.linspace(20, 120, 48)
    return np.tile((ramp[:, None] + ramp[None])[None, :, :, None], (count, 1, 1, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["photo", "screenshot"])
def test_images_keep_shape_and_range_and_each_draws_for_itself(kind):
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), np.uint8)
    images[:] = images[0]
    result = augmented(kind, images)
    assert result.shape == images.shape
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.max() <= 255
    assert not np.allclose(result[0], result[1])


def test_a_screenshot_is_never_mirrored_or_turned():
    result = augmented("screenshot", wedge(64))
    assert (result[:, :, -8:].mean((1, 2, 3)) > result[:, :, :8].mean((1, 2, 3)) + 20).all()
    assert (result[:, -8:].mean((1, 2, 3)) > result[:, :8].mean((1, 2, 3)) + 20).all()
    rows = result.mean(axis=3)
    tilt = np.abs(rows[:, 10] - rows[:, 11]).mean()
    assert tilt < 8, "lines of equal height stay lines"


def test_a_photo_is_mirrored_half_of_the_time():
    result = augmented("photo", wedge(64))
    mirrored = result[:, :, -8:].mean((1, 2, 3)) < result[:, :, :8].mean((1, 2, 3))
    assert 12 < mirrored.sum() < 52


def test_jpeg_recompression_leaves_its_traces():
    page = np.full((1, 64, 64, 3), 255, np.uint8)
    page[:, 20:24, 8:56] = 0
    layers = augmentation_layers("screenshot", 0)
    recoded = np.asarray(layers[-1](page.astype(np.float32), training=True))
    assert 0 < np.abs(recoded - page).mean() < 6


def test_the_seed_decides_and_the_generators_go_on():
    images = wedge(3)
    np.testing.assert_array_equal(augmented("screenshot", images, 3), augmented("screenshot", images, 3))
    assert not np.array_equal(augmented("screenshot", images, 3), augmented("screenshot", images, 4))
    assert not np.array_equal(augmented("screenshot", images, 3), augmented("screenshot", images, 3, times=2))


@pytest.mark.parametrize("kind", ["photo", "screenshot"])
def test_inference_is_untouched_and_training_works_in_a_graph_with_mixed_precision(kind):
    import tensorflow as tf

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        plain, other = (
            build_classifier(ModelDefinition(augmentation=augmentation), 3) for augmentation in ("none", kind)
        )
    finally:
        keras.config.set_dtype_policy("float32")
    other.set_weights(plain.get_weights())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(plain(pixels, training=False)), np.asarray(other(pixels, training=False)))
    train = tf.function(lambda p: other(p, training=True))
    assert not np.array_equal(np.asarray(train(pixels)), np.asarray(train(pixels)))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(other(pixels, training=True)[:, 0])
    assert all(g is not None for g in tape.gradient(loss, other.trainable_variables))
