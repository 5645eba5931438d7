import sys

import numpy as np
import pytest

from cnn_ray.architectures import ARCHITECTURES, preprocess
from cnn_ray.classic_nets import BACKBONES
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError
from cnn_ray.model import (
    build_classifier,
    check_definition,
    freeze_backbone,
    input_size_px,
    train_from_scratch,
    unfreeze_backbone,
    walk_layers,
)

keras = pytest.importorskip("keras")
pytestmark = pytest.mark.filterwarnings("ignore:Skipping nested container")

MOBILENET = ModelDefinition(architecture="MobileNetV2", input_size_px=32)


@pytest.fixture(scope="module")
def mobilenet():
    return build_classifier(MOBILENET.model_copy(update={"dropout": 0.5, "hidden_units": 4}), 3, seed=1)


def noise(side: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def test_simple_cnn_is_the_tutorial_network():
    model = build_classifier(ModelDefinition(), 10)
    assert model.count_params() == 122_570
    assert model.input_shape == (None, 32, 32, 3)
    assert model.inputs[0].name == "pixels"
    assert model.inputs[0].dtype == "uint8"


def test_scores_are_float32_and_sum_to_one(mobilenet):
    scores = np.asarray(mobilenet(noise(32)))
    assert scores.dtype == np.float32
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-6)


def test_scores_are_float32_under_mixed_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_classifier(ModelDefinition(), 3)
    finally:
        keras.config.set_dtype_policy(before)
    assert model.get_layer("features").compute_dtype == "bfloat16"
    assert model.get_layer("zero_to_one").compute_dtype == "float32"
    assert np.asarray(model(noise(32))).dtype == np.float32


def test_the_seed_decides_the_start_weights():
    first, again, other = (build_classifier(ModelDefinition(), 3, seed=seed).get_weights() for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_weights_load_into_a_second_build(mobilenet, tmp_path):
    mobilenet.save_weights(tmp_path / "m.weights.h5")
    again = build_classifier(MOBILENET.model_copy(update={"dropout": 0.5, "hidden_units": 4}), 3, seed=2)
    again.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(np.asarray(again(noise(32))), np.asarray(mobilenet(noise(32))))


def test_start_weights_of_a_local_file_go_into_the_backbone(mobilenet, tmp_path):
    path = tmp_path / "backbone.weights.h5"
    mobilenet.get_layer("backbone").save_weights(path)
    for definition, weights_path in ((MOBILENET.model_copy(update={"weights": str(path)}), None), (MOBILENET, path)):
        model = build_classifier(definition, 5, seed=9, weights_path=weights_path)
        pairs = zip(model.get_layer("backbone").weights, mobilenet.get_layer("backbone").weights, strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_freeze_leaves_the_head_and_unfreeze_leaves_out_batchnorm(mobilenet):
    """In both phases a training step must not move the statistics that BatchNorm came with."""
    norms = [layer for layer in walk_layers(mobilenet) if isinstance(layer, keras.layers.BatchNormalization)]
    before = [np.asarray(norm.moving_mean) for norm in norms]

    freeze_backbone(mobilenet)
    mobilenet(noise(32), training=True)
    head = ["hidden/kernel", "hidden/bias", "scores/kernel", "scores/bias"]
    assert [v.path for v in mobilenet.trainable_variables] == head

    unfreeze_backbone(mobilenet)
    mobilenet(noise(32), training=True)
    assert len(norms) == 52
    assert len(mobilenet.trainable_variables) == 52 + len(head), "52 kernels, no gamma or beta"
    for norm, mean in zip(norms, before, strict=True):
        np.testing.assert_array_equal(np.asarray(norm.moving_mean), mean)


def test_augmentation_and_dropout_act_in_training_only():
    model = build_classifier(ModelDefinition(augmentation="photo", dropout=0.5), 3)
    pixels = noise(32)
    first, again = (np.asarray(model(pixels, training=False)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    plain = build_classifier(ModelDefinition(), 3)
    plain.set_weights(model.get_weights())
    np.testing.assert_array_equal(first, np.asarray(plain(pixels)))
    one, two = (np.asarray(model(pixels, training=True)) for _ in range(2))
    assert not np.array_equal(one, two)


REFERENCE = {
    "MobileNetV2": "mobilenet_v2",
    "ResNet50": "resnet50",
    "ResNet50V2": "resnet_v2",
    "VGG16": "vgg16",
    "DenseNet121": "densenet",
    "Xception": "xception",
    "InceptionV3": "inception_v3",
    "InceptionResNetV2": "inception_resnet_v2",
    "NASNetMobile": "nasnet",
    "MobileNet": "mobilenet",
    "EfficientNetB0": "efficientnet",
    "EfficientNetV2B0": "efficientnet_v2",
    "MobileNetV3Large": "mobilenet_v3",
    "ConvNeXtTiny": "convnext",
}


@pytest.mark.parametrize("name", REFERENCE)
def test_preprocessing_is_the_one_of_keras(name):
    pixels = noise(8)
    expected = getattr(keras.applications, REFERENCE[name]).preprocess_input(pixels.astype(np.float32))
    ours = np.asarray(preprocess(pixels, ARCHITECTURES[name].preprocessing))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_table_names_every_classifier_of_keras_applications():
    published = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(ARCHITECTURES) - set(BACKBONES) == published


def test_input_size_is_the_definitions_or_the_architectures():
    assert input_size_px(ModelDefinition(architecture="InceptionV3")) == (299, 299)
    assert input_size_px(ModelDefinition(architecture="InceptionV3", input_size_px=150)) == (150, 150)


FAILURES = {
    "unknown": (ModelDefinition(architecture="MobileNetv22"), "did you mean MobileNetV2"),
    "missing file": (ModelDefinition(architecture="MobileNetV2", weights="/no/such.weights.h5"), "does not exist"),
    "nothing published": (ModelDefinition(weights="imagenet"), "simple_cnn"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_can_be_seen_without_keras_is_refused_before(name):
    definition, sentence = FAILURES[name]
    for check in (check_definition, lambda d: build_classifier(d, 2)):
        with pytest.raises(ConfigError, match=sentence) as refused:
            check(definition)
        assert "Next: " in str(refused.value)


def test_an_input_too_small_is_refused():
    with pytest.raises(ConfigError, match=r"Received: 8 px.*Next: set model.input_size_px, for instance to 299"):
        build_classifier(ModelDefinition(architecture="InceptionV3", input_size_px=8), 2)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.weights.h5"
    build_classifier(ModelDefinition(), 2).save_weights(path)
    with pytest.raises(ConfigError, match="Expected weights of MobileNetV2 without its top"):
        build_classifier(MOBILENET, 2, weights_path=path)


@pytest.mark.parametrize("lost", ["layers/conv2d_3", "layers"])
def test_weights_with_missing_layers_are_refused(mobilenet, tmp_path, lost):
    import h5py

    path = tmp_path / "backbone.weights.h5"
    mobilenet.get_layer("backbone").save_weights(path)
    with h5py.File(path, "a") as stored:
        del stored[lost]
    with pytest.raises(ConfigError, match="Expected weights of MobileNetV2 without its top"):
        build_classifier(MOBILENET, 2, weights_path=path)


def test_imagenet_weights_without_a_network_name_the_three_choices(monkeypatch):
    def offline(**_kwargs):
        raise Exception("URL fetch failure on https://storage.googleapis.com/x: None -- [Errno -3]")

    monkeypatch.setattr(sys.modules["keras"].applications, "MobileNetV2", offline)
    with pytest.raises(ConfigError, match=r"URL fetch failure.*Next: .*imagenet.*\.weights\.h5 file.*none"):
        build_classifier(MOBILENET.model_copy(update={"weights": "imagenet"}), 2)


def test_from_scratch_the_statistics_of_batchnorm_follow_within_tens_of_steps():
    """MobileNetV2 has momentum 0.999 in Keras: after 60 steps its statistics would still be those it was born with."""
    model = build_classifier(MOBILENET, 3, seed=1)
    train_from_scratch(model)
    layer = next(layer for layer in walk_layers(model) if isinstance(layer, keras.layers.BatchNormalization))
    for _ in range(60):
        model(noise(32, 8), training=True)
    assert layer.moving_variance.numpy().max() < 0.5, "born with 1, and images in -1..1 vary by less behind this layer"
