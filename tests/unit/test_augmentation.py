"""Augmentation: what may change, what never may, and that nothing of it is left in inference."""

import subprocess
import sys

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


def test_pale_text_on_white_is_never_lost():
    page = np.full((32, 40, 40, 3), 255, np.uint8)
    page[:, 10:30, 10:30] = 225
    page[:, 39, 39] = 0
    tones = np.asarray(augmentation_layers("screenshot", 0)[2](page.astype(np.float32), training=True))
    between = tones[:, 0, 0, 0] - tones[:, 20, 20, 0]
    assert tones.max() <= 255
    assert between.min() > 20, "of 30 grey values"
    assert tones[:, 0, 0, 0].std() > 5, "the white of a page varies"
    assert tones[:, 39, 39, 0].std() > 5, "and its black"


def test_a_crop_can_lie_anywhere_and_shows_at_least_three_quarters_of_a_side():
    """A ramp from 0 to 200 from left to right tells by its ends which part of the page is shown."""
    ramp = np.tile(np.linspace(0, 200, 101, dtype=np.float32)[None, None, :, None], (200, 101, 1, 3))
    shown = np.asarray(augmentation_layers("screenshot", 0)[1](ramp, training=True))
    left, right = shown[:, 50, 0, 0], shown[:, 50, -1, 0]
    assert left.max() > 30, "cut off at the left"
    assert right.min() < 170, "cut off at the right"
    assert (right - left).min() > 0.72 * 200
    assert (np.abs(shown - shown[:, :1]) < 0.01).all(), "columns stay upright"


def test_a_resumed_training_draws_on_where_the_checkpoint_was(tmp_path):
    from cnn_ray.train_state import Position, restore_model, save_state

    def build():
        model = build_classifier(ModelDefinition(architecture="lenet5", augmentation="screenshot", dropout=0.3), 3)
        optimizer = keras.optimizers.SGD()
        optimizer.build(model.trainable_variables)
        return model, optimizer

    pixels = wedge(4)[:, :32, :32]
    (model, optimizer), (resumed, other_optimizer) = build(), build()
    model(pixels, training=True)
    save_state(tmp_path, model, optimizer, Position(), [])
    expected = np.asarray(model(pixels, training=True))
    drawn = [np.asarray(resumed(pixels, training=True)) for _ in range(3)]
    assert not np.array_equal(drawn[-1], expected), "it is elsewhere in its draws now"
    restore_model(tmp_path, resumed, other_optimizer)
    np.testing.assert_array_equal(np.asarray(resumed(pixels, training=True)), expected)


REPLICAS = """
import numpy as np, tensorflow as tf
from cnn_ray.augmentation import augmentation_layers
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    layers = augmentation_layers("screenshot", 0)
images = tf.constant(np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8))

@tf.function
def step():
    def change(pixels):
        for layer in layers:
            pixels = layer(pixels, training=True)
        return pixels
    return strategy.run(change, args=(images,))

first, second = (strategy.experimental_local_results(step()) for _ in range(2))
states = [strategy.experimental_local_results(layer.generator.state.value) for layer in layers[1:]]
print(np.array_equal(*first), np.array_equal(first[0], second[0]), all(np.array_equal(*state) for state in states))
"""


def test_replicas_of_a_strategy_draw_apart_and_keep_one_state():
    """In a process of its own: logical devices must be set before TensorFlow has started."""
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr[-2000:]


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


def test_a_stronger_photo_augmentation_changes_more():
    images = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 3), np.uint8)
    images = np.repeat(np.repeat(images[:, ::8, ::8], 8, axis=1), 8, axis=2)

    def change(strength: float) -> float:
        result = images.astype(np.float32)
        layers = [layer for layer in augmentation_layers("photo", 0, strength) if layer.name != "augment_flip"]
        for layer in layers:
            result = layer(result, training=True)
        return float(np.abs(np.asarray(result) - images).mean())

    assert change(0.2) < change(1.0) < change(2.0)
