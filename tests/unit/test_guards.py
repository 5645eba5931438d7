"""Each guard against a configuration and data that commit its mistake, and against sane ones that do not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cnn_ray.config import CompareConfig, DataConfig, ModelDefinition, PhaseConfig, TrainConfig, build_config, load_yaml
from cnn_ray.dataset import LabelledSet
from cnn_ray.errors import GuardError
from cnn_ray.guards import Finding, _constant, check_config, check_model, raise_errors

JOBS = Path(__file__).parents[2] / "jobs"
NO_PIXELS = np.empty((0, 32, 32, 3), np.uint8)
HEAD = PhaseConfig(epochs=5, learning_rate=1e-3)


def labelled_set(
    train: tuple[int, ...] = (100, 100), validation: tuple[int, ...] = (20, 20), **own: Any
) -> LabelledSet:
    """`train[k]` and `validation[k]` images of class k, all different."""
    counts = [*train, *validation]
    ids = np.repeat([*range(len(train)), *range(len(validation))], counts).astype(np.int32)
    splits = np.repeat([0] * len(train) + [1] * len(validation), counts).astype(np.uint8)
    uris = tuple(f"{k:05}.png" for k in range(len(ids)))
    labels = tuple(f"class{k}" for k in range(len(train)))
    return LabelledSet("images", uris, ids, labels, splits, **{"twins": np.arange(len(ids)), **own})


def configuration(model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    definition = ModelDefinition(**{"augmentation": "screenshot", **(model or {})})
    return TrainConfig(name="small", data=DataConfig(uri="images"), model=definition, **changes)


def noise(count: int = 16, side: int = 32, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, (count, side, side, 3)).astype(np.uint8)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_sane_configuration_and_data_pass_without_findings():
    from cnn_ray.model import build_classifier

    config = configuration(train=HEAD)
    assert check_config(config, labelled_set(), [(1280, 800), (32, 32)]) == []
    assert check_model(config, labelled_set(), build_classifier(config.model, 2), noise()) == []


def test_every_finding_says_what_why_and_how_to_mend_it():
    config = configuration({"augmentation": "none"})
    found = only(check_config(config, labelled_set()))
    assert found.sentence == f"{found.guard}: {found.saw}. {found.why}. Next: {found.mend}."


def test_input_smaller_than_the_architecture_takes():
    found = only(check_config(configuration({"architecture": "MobileNetV2", "input_size_px": 16}), labelled_set()))
    assert (found.guard, found.severity) == ("wrong_input_shape", "error")
    assert "16" in found.saw
    assert "model.input_size_px" in found.mend


def test_images_enlarged_seven_times():
    config = configuration({"architecture": "MobileNetV2", "input_size_px": 224})
    found = only(check_config(config, labelled_set(), [(32, 32)] * 10))
    assert (found.guard, found.severity) == ("wrong_input_shape", "warning")
    assert "7.0 times" in found.saw


def test_wide_images_pressed_into_a_square_are_no_mistake():
    config = configuration({"architecture": "MobileNetV2", "input_size_px": 224})
    assert check_config(config, labelled_set(), [(1920, 200)] * 10) == []


@pytest.mark.parametrize(
    ("model", "pixels", "why"),
    [
        ({"architecture": "lenet5", "preprocessing": "none"}, noise(), "far from zero"),
        ({"architecture": "EfficientNetB0", "input_size_px": 32, "preprocessing": "zero_to_one"}, noise(), "twice"),
        ({"architecture": "simple_cnn"}, noise(high=2), "divided by 255"),
        ({"architecture": "VGG16", "input_size_px": 32, "preprocessing": "none"}, noise(), "far from zero"),
        ({"architecture": "MobileNetV2", "input_size_px": 32, "preprocessing": "none"}, noise(), "far from zero"),
    ],
    ids=["not at all", "twice", "before saving", "raw for Caffe's weights", "raw"],
)
def test_pixels_not_normalised_or_twice(model, pixels, why):
    from cnn_ray.model import build_classifier

    config = configuration({**model, "weights": None})
    findings = check_model(config, labelled_set(), build_classifier(config.model, 2), pixels)
    found = only([f for f in findings if f.guard != "too_many_parameters"])
    assert (found.guard, found.severity) == ("unnormalised_pixels", "error")
    assert why in found.why


@pytest.mark.parametrize(("weights", "seen"), [("w.weights.h5", True), (None, False)])
def test_another_preprocessing_is_a_mistake_with_start_weights_alone(weights, seen):
    from cnn_ray.model import build_classifier

    model = {"architecture": "MobileNetV2", "input_size_px": 32, "preprocessing": "zero_to_one"}
    built = build_classifier(configuration({**model, "weights": None}).model, 2)
    findings = check_model(configuration({**model, "weights": weights}), labelled_set((4000, 4000)), built, noise())
    found = [f for f in findings if f.guard == "unnormalised_pixels"]
    assert bool(found) == seen
    assert not seen or "made for other values" in found[0].why


@pytest.mark.parametrize(
    ("parameters", "images", "severity"),
    [(62_000_000, 600, "error"), (4_000_000, 1_020, "warning"), (274_042, 10_000, None), (122_570, 480, None)],
    ids=["AlexNet on 600", "EfficientNetB0 on 102 Flowers", "small ResNet on CIFAR-10", "demo"],
)
def test_parameters_for_the_number_of_samples(parameters, images, severity):
    labelled = labelled_set((images // 2, images // 2))
    model = SimpleNamespace(trainable_weights=[np.empty((parameters // 2, 2), np.bool_)])
    findings = check_model(configuration(), labelled, model, NO_PIXELS)
    assert [(f.guard, f.severity) for f in findings] == ([("too_many_parameters", severity)] if severity else [])
    start = configuration({"architecture": "ResNet50", "weights": "imagenet"})
    assert check_model(start, labelled, model, NO_PIXELS) == []


def test_convolutions_trained_on_few_images_without_augmentation():
    bare = {"augmentation": "none"}
    assert only(check_config(configuration(bare), labelled_set())).guard == "no_augmentation"
    frozen = {"architecture": "ResNet50", "weights": "imagenet", **bare}
    assert check_config(configuration(frozen, train=HEAD), labelled_set()) == []
    tuned = configuration(frozen, train=HEAD, fine_tune=PhaseConfig(epochs=2, learning_rate=1e-5))
    assert only(check_config(tuned, labelled_set())).guard == "no_augmentation"
    assert check_config(configuration(bare), labelled_set((1000, 1000))) == []


@pytest.mark.parametrize(
    ("head_epochs", "tune", "severity"),
    [
        (0, {"learning_rate": 1e-5}, "error"),
        (5, {"learning_rate": 1e-3}, "error"),
        (5, {"learning_rate": 3e-4}, "warning"),
        (5, {"learning_rate": 1e-4}, None),
        (5, {"learning_rate": 5e-4, "warmup_epochs": 2}, None),
        (5, {"learning_rate": 1e-2, "optimizer": "sgd", "warmup_epochs": 2}, "error"),
    ],
)
def test_unfrozen_too_early_or_too_fast(head_epochs, tune, severity):
    config = configuration(
        {"architecture": "ResNet50", "weights": "imagenet"},
        train=PhaseConfig(epochs=head_epochs, learning_rate=1e-3),
        fine_tune=PhaseConfig(epochs=2, **tune),
    )
    found = [(f.guard, f.severity) for f in check_config(config, labelled_set())]
    assert found == ([("unfrozen_too_early", severity)] if severity else [])


@pytest.mark.parametrize(("leaked", "severity"), [(1, "warning"), (4, "error")])
def test_twins_on_both_sides(leaked, severity):
    twins = np.arange(240)
    twins[200 : 200 + leaked] = np.arange(leaked)
    found = only(check_config(configuration(), labelled_set(twins=twins)))
    assert (found.guard, found.severity) == ("label_leakage", severity)
    assert f"{leaked} of 40" in found.saw
    assert "00200.png like 00000.png" in found.saw


def test_one_group_on_both_sides():
    groups = tuple("shared.example" if k in (7, 210) else f"{k}.example" for k in range(240))
    found = only(check_config(configuration(), labelled_set(groups=groups)))
    assert (found.guard, found.severity) == ("label_leakage", "error")
    assert "shared.example" in found.saw
    assert "1 of 239" in found.saw


def test_twins_with_different_labels():
    twins = np.arange(240)
    twins[150] = 3
    found = only(check_config(configuration(), labelled_set(twins=twins)))
    assert (found.guard, found.severity) == ("label_leakage", "warning")
    assert "00150.png (class1) like 00003.png (class0)" in found.saw


def test_one_class_far_larger_than_another():
    labelled = labelled_set((1000, 50))
    found = only(check_config(configuration(), labelled))
    assert (found.guard, found.severity) == ("class_imbalance", "warning")
    assert "1000 training images of class0 against 50" in found.saw
    assert check_config(configuration(class_weight="balanced"), labelled) == []
    assert check_config(configuration(loss="focal"), labelled) == []
    assert check_config(configuration(), labelled_set((500, 50))) == []


def test_constant_and_blank_images():
    blank, mixed = np.full((16, 32, 32, 3), 255, np.uint8), noise()
    mixed[:3] = 128
    assert only(_constant(blank)).severity == "error"
    assert only(_constant(np.repeat(noise(1), 8, axis=0))).severity == "error"
    assert only(_constant(mixed)).severity == "warning"
    assert _constant(noise()) == []


@pytest.mark.parametrize(
    ("train", "validation", "severity"),
    [
        ((9, 50), (20, 20), "warning"),
        ((50, 50), (4, 20), "warning"),
        ((1, 5), (20, 20), "error"),
        ((10, 20), (5, 5), None),
    ],
)
def test_too_few_images_of_a_class(train, validation, severity):
    found = [(f.guard, f.severity) for f in check_config(configuration(), labelled_set(train, validation))]
    assert found == ([("too_few_per_class", severity)] if severity else [])


def test_a_class_with_one_validation_image_is_an_error_even_if_train_only_warns():
    findings = check_config(configuration(), labelled_set((9, 50), (1, 20)))
    assert [f.severity for f in findings if f.guard == "too_few_per_class"] == ["error"]


def test_allow_overrides_errors_and_the_sentence_says_so():
    findings = check_config(configuration({"architecture": "MobileNetV2", "input_size_px": 16}), labelled_set((1, 5)))
    with pytest.raises(GuardError, match=r"--allow too_few_per_class,wrong_input_shape"):
        raise_errors(findings, ())
    with pytest.raises(GuardError, match="without wrong_input_shape"):
        raise_errors(findings, ("too_few_per_class",))
    raise_errors(findings, ("too_few_per_class", "wrong_input_shape"))


def job_configurations() -> list[tuple[str, TrainConfig]]:
    found: list[tuple[str, TrainConfig]] = []
    for path in sorted(JOBS.glob("*.yaml")):
        if path.stem.partition("_")[0] in ("score", "serve", "nightly", "kubernetes"):
            continue
        keys = load_yaml(path)
        if "variants" in keys:
            compare = build_config(CompareConfig, keys, source=path.name)
            found += [(f"{path.name} {v}", compare.training(v, 0)) for v in compare.variants]
        else:
            found.append((path.name, build_config(TrainConfig, keys, source=path.name)))
    return found


@pytest.mark.parametrize("config", [c for _, c in job_configurations()], ids=[n for n, _ in job_configurations()])
def test_ready_configurations_make_no_error_on_sane_data(config):
    findings = check_config(config, labelled_set((500, 500), (100, 100)), [(500, 400)])
    assert [f for f in findings if f.severity == "error"] == []
    assert len([f for f in findings if f.guard not in config.allow]) <= 1
