"""Parameter counts to the last one, and that every net of the tutorial runs on small images."""

import numpy as np
import pytest

from cnn_ray import classic_nets
from cnn_ray.architectures import expected_range, find_architecture
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError
from cnn_ray.model import build_classifier, check_definition, freeze_backbone, unfreeze_backbone

keras = pytest.importorskip("keras")

COUNTS = [
    ("simple_cnn", 32, "pooled", 10, 122_570),
    ("augmented_cnn", 32, "pooled", 10, 315_722),
    ("lenet5", 32, "pooled", 10, 61_706),
    ("small_resnet", 32, "pooled", 10, 274_042),
    ("alexnet", 227, "pooled", 1000, 62_378_344),
    ("vgg16", 224, "original", 1000, 138_357_544),
    ("resnet50", 224, "pooled", 1000, 25_636_712),
    ("efficientnetb0", 224, "pooled", 1000, 5_330_571),
    ("mobilenetv2", 224, "pooled", 1000, 3_538_984),
]


def zeros(_self, shape, dtype=None):
    return keras.ops.zeros(shape, dtype or "float32")


@pytest.mark.parametrize(("name", "side", "top", "classes", "count"), COUNTS, ids=[c[0] for c in COUNTS])
def test_parameters_are_those_of_the_paper(monkeypatch, name, side, top, classes, count):
    """Zeros instead of random start weights: VGG16 takes 0.8 s and 1.5 GiB in place of 3 to 13 s and 2.6 GiB."""
    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", zeros)
    assert find_architecture(name).default_size_px == side
    definition = ModelDefinition(architecture=name, top=top)
    assert build_classifier(definition, classes).count_params() == count


def test_the_resnet50_transfer_head_has_the_true_counts():
    definition = ModelDefinition(architecture="ResNet50", hidden_units=128, dropout=0.5, input_size_px=32)
    model = build_classifier(definition, 10)
    freeze_backbone(model)
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert (trainable, model.count_params() - trainable) == (263_562, 23_587_712)


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "efficientnetb0"])
def test_the_tutorials_large_nets_answer_at_32_px(name):
    model = build_classifier(ModelDefinition(architecture=name, input_size_px=32), 10)
    scores = np.asarray(model(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)))
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    whole = len(model.trainable_weights)
    freeze_backbone(model)
    assert len(model.trainable_weights) == 2
    unfreeze_backbone(model)
    assert 2 < len(model.trainable_weights) <= whole


@pytest.mark.parametrize("name", ["simple_cnn", "augmented_cnn", "lenet5", "alexnet"])
def test_the_smallest_size_is_the_smallest_that_can_be_built(name):
    smallest = find_architecture(name).smallest_size_px
    build_classifier(ModelDefinition(architecture=name, input_size_px=smallest), 3)
    with pytest.raises(ConfigError, match=f"Received: {smallest - 1} px"):
        build_classifier(ModelDefinition(architecture=name, input_size_px=smallest - 1), 3)


def test_alexnet_has_the_papers_stem_from_128_px_on():
    stems = {
        side: build_classifier(ModelDefinition(architecture="alexnet", input_size_px=side), 10)
        .get_layer("backbone")
        .layers[1]
        for side in (32, 128)
    }
    assert (stems[32].kernel_size, stems[32].strides) == ((5, 5), (1, 1))
    assert (stems[128].kernel_size, stems[128].strides) == ((11, 11), (4, 4))


def test_small_resnet_stays_within_300k_parameters_and_can_be_widened(monkeypatch):
    assert build_classifier(ModelDefinition(architecture="small_resnet"), 10).count_params() <= 300_000
    monkeypatch.setattr(classic_nets, "SMALL_RESNET_WIDTHS", (8, 16, 32))
    monkeypatch.setattr(classic_nets, "SMALL_RESNET_BLOCKS", 1)
    assert build_classifier(ModelDefinition(architecture="small_resnet"), 10).count_params() < 30_000


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "augmented_cnn", "small_resnet"])
def test_classic_nets_answer_at_32_px_and_freeze(name):
    model = build_classifier(ModelDefinition(architecture=name, input_size_px=32), 10)
    scores = np.asarray(model(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)))
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    whole = len(model.trainable_weights)
    freeze_backbone(model)
    assert 0 < len(model.trainable_weights) < whole
    unfreeze_backbone(model)
    normalised = name == "small_resnet"
    assert (len(model.trainable_weights) < whole) == normalised, "BatchNorm stays in inference mode, all else trains"


def test_augmented_cnn_drops_half_of_its_features_unless_told_otherwise():
    assert build_classifier(ModelDefinition(architecture="augmented_cnn"), 10).get_layer("dropout").rate == 0.5
    gentle = ModelDefinition(architecture="augmented_cnn", dropout=0.1)
    assert build_classifier(gentle, 10).get_layer("dropout").rate == 0.1


def test_names_are_found_in_any_case_and_the_nearest_is_proposed():
    assert find_architecture("VGG16") is find_architecture("vgg16")
    with pytest.raises(ConfigError, match="did you mean EfficientNetB0"):
        find_architecture("efficientnet_b0")


def test_the_original_top_is_refused_where_the_paper_has_none():
    with pytest.raises(ConfigError, match="whose paper"):
        check_definition(ModelDefinition(architecture="ResNet50", top="original"))


def test_expected_ranges_follow_the_preprocessing():
    assert expected_range("minus_one_to_one") == pytest.approx((-1, 1))
    assert expected_range("none") == expected_range("inside_model") == (0, 255)
    low, high = expected_range("imagenet_caffe")
    assert (low, high) == pytest.approx((-123.68, 255 - 103.939))


def test_a_preprocessing_of_ones_own_is_what_the_backbone_gets():
    model = build_classifier(ModelDefinition(preprocessing="minus_one_to_one"), 3)
    assert model.get_layer("minus_one_to_one")
