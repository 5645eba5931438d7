"""Each mistake, committed by a configuration or by data, is seen; a sane training passes without a word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnn_ray.config import DataConfig, ModelDefinition, PhaseConfig, TrainConfig
from cnn_ray.dataset import SPLITS, LabelledSet
from cnn_ray.errors import GuardError
from cnn_ray.guards import Finding, check_config, check_model, raise_errors


def labelled(train=(2000, 2000), validation=(200, 200), test=(0, 0), **more: Any) -> LabelledSet:
    """Counts per class and side."""
    sides = [(side, counts) for side, counts in zip(SPLITS, (train, validation, test), strict=True)]
    ids = np.concatenate([np.repeat(np.arange(len(counts)), counts) for _, counts in sides]).astype(np.int32)
    splits = np.repeat(range(3), [sum(counts) for _, counts in sides]).astype(np.uint8)
    uris = tuple(f"{k:05}.png" for k in range(len(ids)))
    return LabelledSet("memory", uris, ids, tuple("abc"[: len(train)]), splits, **more)


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "name": "x",
        "data": DataConfig(uri="memory"),
        "model": ModelDefinition(input_size_px=32),
    }
    return TrainConfig(**settings | changes)


def pixels(count: int = 16, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def found(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(f.guard, f.severity) for f in findings]


TRANSFER = ModelDefinition(architecture="MobileNetV2", weights="w.weights.h5", input_size_px=32, augmentation="photo")
HEAD = PhaseConfig(epochs=5, learning_rate=1e-3)


def tune(rate: float, **more: Any) -> PhaseConfig:
    return PhaseConfig(epochs=5, learning_rate=rate, **more)


def twins_across(count: int, of: LabelledSet, split: str) -> np.ndarray:
    twins = np.arange(len(of.uris))
    twins[of.rows(split)[:count]] = of.rows("train")[:count]
    return twins


FEW = config(class_weight="balanced", model=ModelDefinition(augmentation="screenshot"))

BY_CONFIG = {
    "few in train": (FEW, labelled(train=(2000, 9)), [("too_few_per_class", "warning")]),
    "one in train": (FEW, labelled(train=(2000, 1)), [("too_few_per_class", "error")]),
    "few in validation": (config(), labelled(validation=(200, 4)), [("too_few_per_class", "warning")]),
    "imbalance": (config(), labelled(train=(20_000, 1500)), [("class_imbalance", "warning")]),
    "no augmentation": (config(), labelled(train=(500, 500)), [("no_augmentation", "warning")]),
    "fine-tuning without augmentation": (
        config(model=TRANSFER.model_copy(update={"augmentation": "none"}), train=HEAD, fine_tune=tune(1e-5)),
        labelled(train=(500, 500)),
        [("no_augmentation", "warning")],
    ),
    "no head phase": (
        config(model=TRANSFER, train=PhaseConfig(epochs=0, learning_rate=1e-3), fine_tune=tune(1e-5)),
        labelled(),
        [("unfrozen_too_early", "error")],
    ),
    "high rate": (config(model=TRANSFER, fine_tune=tune(5e-4)), labelled(), [("unfrozen_too_early", "warning")]),
    "very high rate": (config(model=TRANSFER, fine_tune=tune(1e-2)), labelled(), [("unfrozen_too_early", "error")]),
    "high rate of sgd": (
        config(model=TRANSFER, fine_tune=tune(1e-2, optimizer="sgd", momentum=0.9)),
        labelled(),
        [("unfrozen_too_early", "error")],
    ),
    "too small": (
        config(model=ModelDefinition(architecture="VGG16", input_size_px=16)),
        labelled(),
        [("wrong_input_shape", "error")],
    ),
}


@pytest.mark.parametrize("name", BY_CONFIG)
def test_a_mistake_in_configuration_or_data_is_seen(name):
    settings, data, expected = BY_CONFIG[name]
    findings = check_config(settings, data)
    assert found(findings) == expected
    assert all(len(f.saw) > 20 and len(f.why) > 20 and len(f.mend) > 10 for f in findings)


SANE = {
    "from scratch": config(),
    "few images, augmented": (config(model=ModelDefinition(augmentation="screenshot"))),
    "transfer": config(model=TRANSFER, train=HEAD, fine_tune=tune(1e-5)),
    "transfer with warm-up": config(model=TRANSFER, train=HEAD, fine_tune=tune(5e-4, warmup_epochs=2)),
    "imbalance mended": config(class_weight="balanced"),
    "imbalance by focal loss": config(loss="focal"),
}


@pytest.mark.parametrize("name", SANE)
def test_a_sane_training_passes_without_a_word(name):
    data = labelled(train=(30_000, 1500)) if "imbalance" in name else labelled()
    if name == "few images, augmented":
        data = labelled(train=(300, 300))
    assert check_config(SANE[name], data, [(640, 480)] * 3) == []


def test_a_head_alone_on_few_images_needs_no_augmentation():
    frozen = config(model=TRANSFER.model_copy(update={"augmentation": "none"}))
    assert check_config(frozen, labelled(train=(300, 300))) == []


def test_enlarged_images_are_seen():
    settings = config(model=ModelDefinition(architecture="ResNet50", augmentation="photo"))
    assert found(check_config(settings, labelled(), [(32, 32)] * 5)) == [("wrong_input_shape", "warning")]
    assert check_config(settings, labelled(), [(1366, 768)] * 5) == []


@pytest.mark.parametrize(("count", "severity"), [(3, "warning"), (60, "error")])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_twins_on_both_sides_are_leakage(split, count, severity):
    plain = labelled(test=(200, 200))
    data = labelled(test=(200, 200), twins=twins_across(count, plain, split))
    findings = check_config(config(), data)
    assert found(findings) == [("label_leakage", severity)]
    assert f"{count} of 400 images in {split}" in findings[0].saw


def test_twins_with_two_labels_are_seen():
    twins = np.arange(len(labelled().uris))
    twins[2000] = 0  # the first image of class b looks like the first of class a, both in train
    findings = check_config(config(), labelled(twins=twins))
    assert found(findings) == [("label_leakage", "warning")]
    assert "02000.png (b) like 00000.png (a)" in findings[0].saw


def test_errors_stop_unless_they_are_allowed():
    findings = check_config(*BY_CONFIG["no head phase"][:2])
    with pytest.raises(GuardError, match=r"train\.epochs.*--allow unfrozen_too_early") as refused:
        raise_errors(findings, ())
    assert refused.value.exit_code == 2
    raise_errors(findings, ("unfrozen_too_early",))
    raise_errors(check_config(*BY_CONFIG["imbalance"][:2]), ())


class TestWithAModel:
    def check(self, settings: TrainConfig, sample: np.ndarray, data: LabelledSet | None = None) -> list[Finding]:
        from cnn_ray.model import build_classifier

        plain = settings.model.model_copy(update={"weights": None})
        return check_model(settings, data or labelled(), build_classifier(plain, 2), sample)

    def test_sane(self):
        assert self.check(config(), pixels()) == []
        assert self.check(config(model=TRANSFER), pixels()) == []

    def test_unnormalised(self):
        raw = config(model=ModelDefinition(preprocessing="none"))
        findings = self.check(raw, pixels())
        assert found(findings) == [("unnormalised_pixels", "error")]
        assert "from 0 to 255" in findings[0].saw

    def test_normalised_twice(self):
        twice = config(
            model=ModelDefinition(architecture="EfficientNetB0", preprocessing="zero_to_one", input_size_px=32),
            data=DataConfig(uri="memory"),
        )
        findings = self.check(twice, pixels(), labelled(train=(20_000, 20_000)))
        assert found(findings) == [("unnormalised_pixels", "error")]
        assert "twice" in findings[0].why

    def test_images_that_were_normalised_before_they_were_saved(self):
        assert found(self.check(config(), pixels() // 128)) == [("unnormalised_pixels", "error")]

    def test_constant_input(self):
        white = np.full((16, 32, 32, 3), 255, np.uint8)
        assert found(self.check(config(), white)) == [("constant_input", "error")]
        some = pixels()
        some[:3] = 255
        assert found(self.check(config(), some)) == [("constant_input", "warning")]

    @pytest.mark.parametrize(("images", "severity"), [(500, "warning"), (20, "error")])
    def test_too_many_parameters(self, images, severity):
        settings = config(model=ModelDefinition(architecture="MobileNetV2", input_size_px=32, augmentation="photo"))
        data = labelled(train=(images, images))
        assert found(self.check(settings, pixels(), data)) == [("too_many_parameters", severity)]
        assert self.check(config(model=TRANSFER), pixels(), data) == [], "a pretrained base is not counted"
