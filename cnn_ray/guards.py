"""The mistakes that beginners' tutorials teach, as named checks: what was seen, why it matters, the line that mends it.

An error stops the training unless `allow` names its guard; a warning is told once and written into the artifact. Where
a threshold is a judgement, the constant says what it rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cnn_ray.architectures import expected_range, find_architecture
from cnn_ray.config import GuardName, PhaseConfig, TrainConfig
from cnn_ray.dataset import SPLITS, LabelledSet
from cnn_ray.errors import GuardError
from cnn_ray.model import used_preprocessing

ENLARGED_WARNING = 3.0
"""Times by which images may be enlarged: beyond, the network computes on pixels that carry nothing."""
RANGE_FACTOR = 3.0
"""Times by which the range of a backbone's input may differ from that of its preprocessing."""
SHIFT = 0.26
"""Share of that range by which its middle may lie elsewhere; 0..1 in place of -1..1 is 0.25."""
PARAMETERS_PER_IMAGE = (2_000, 20_000)
"""Trainable parameters from scratch per training image: warning, error. A small ResNet on CIFAR-10 has 7, the
tutorial's net on 480 drawings 255, an EfficientNetB0 on the 1,020 training images of 102 Flowers 4,100, and AlexNet
there 61,000."""
FEW_IMAGES_PER_CLASS = 1_000
"""Below this many training images of a class, CNNs gain from augmentation (CIFAR-10 has 5,000 and still does)."""
LEAST_IN_TRAIN, LEAST_IN_VALIDATION, LEAST_OF_ALL = 10, 5, 2
IMBALANCE = 10.0
"""Largest class over smallest: beyond, always answering the largest is nearly right."""
LEAKAGE_ERROR = 0.05
"""Share of validation or test images with a twin in train from which their figures mean little (CIFAR-10: 0.03)."""
DRAW_ANOTHER = (
    "have a split drawn: leave data.split_column out, or put the class folders of train and validation together"
)
CONSTANT_STD = 1.0
"""Grey levels of 255: an image that varies less is blank."""
CONSTANT_SHARES = (0.05, 0.5)
FINE_TUNE_RATES = {"adam": 1e-4, "adamw": 1e-4, "sgd": 1e-3}
"""Beyond these, fine-tuning forgets before it learns; a warm-up lets Adam go ten times as far (17 flowers: 0.89 at 5e-4
with warm-up; SGD at 1e-2 with momentum ended at chance)."""


@dataclass(frozen=True)
class Finding:
    """What one guard saw."""

    guard: GuardName
    severity: Literal["error", "warning"]
    saw: str
    why: str
    mend: str

    @property
    def sentence(self) -> str:
        """The finding for people."""
        return f"{self.guard}: {self.saw}. {self.why}. Next: {self.mend}."


def check_config(config: TrainConfig, labelled: LabelledSet, sizes_px: Sequence[tuple[int, int]] = ()) -> list[Finding]:
    """What configuration and data alone show; without TensorFlow. sizes_px: (width, height) of some original images."""
    return [
        *_few_per_class(labelled),
        *_imbalance(config, labelled),
        *_leakage(labelled),
        *_no_augmentation(config, labelled),
        *_unfrozen(config),
        *_enlarged(config, sizes_px),
    ]


def check_model(config: TrainConfig, labelled: LabelledSet, model: Any, pixels: np.ndarray) -> list[Finding]:
    """What the built model and a sample of training images show. pixels: uint8 [K, H, W, 3] of the model's size."""
    return [
        *_constant(pixels),
        *_normalisation(config, model, pixels),
        *_too_large(config, labelled, model),
    ]


def raise_errors(findings: Sequence[Finding], allow: Sequence[GuardName]) -> None:
    """Nothing, if no error is left that is not allowed.

    Raises:
        GuardError: names the first and the number of the others.
    """
    errors = [finding for finding in findings if finding.severity == "error" and finding.guard not in allow]
    if not errors:
        return
    first = errors[0]
    others = f" ({len(errors) - 1} more: {', '.join(e.guard for e in errors[1:])})" if len(errors) > 1 else ""
    raise GuardError(
        f"Expected a training without {first.guard}. Received: {first.saw}{others}. {first.why}. "
        f"Next: {first.mend}, or override it with --allow {','.join(e.guard for e in errors)}."
    )


def _counts(labelled: LabelledSet, split: str) -> np.ndarray:
    return np.bincount(labelled.label_ids[labelled.rows(split)], minlength=len(labelled.labels))


def _few_per_class(labelled: LabelledSet) -> list[Finding]:
    """One finding at most: of the two sides the one that is worse off."""
    found: list[Finding] = []
    for split, least in (("train", LEAST_IN_TRAIN), ("validation", LEAST_IN_VALIDATION)):
        counts = _counts(labelled, split)
        few = np.flatnonzero(counts < least)
        if len(few):
            k = int(few[np.argmin(counts[few])])
            others = ",".join(label for n, label in enumerate(labelled.labels) if n not in few)
            found.append(
                Finding(
                    "too_few_per_class",
                    "error" if counts[k] < LEAST_OF_ALL else "warning",
                    f"{len(few)} of {len(counts)} classes have fewer than {least} images in {split}; "
                    f"{labelled.labels[k]} has {counts[k]}",
                    "Nothing can be learnt or measured on so few: one image more or less is a different result",
                    "add images of these classes, or leave them out with data.labels"
                    + (f" (--data-labels {others})" if len(counts) - len(few) > 1 else ""),
                )
            )
    return sorted(found, key=lambda finding: finding.severity != "error")[:1]


def _imbalance(config: TrainConfig, labelled: LabelledSet) -> list[Finding]:
    counts = _counts(labelled, "train")
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    if config.class_weight != "none" or config.loss == "focal" or counts[most] <= IMBALANCE * max(counts[least], 1):
        return []
    share = counts[most] / counts.sum()
    return [
        Finding(
            "class_imbalance",
            "warning",
            f"{counts[most]} training images of {labelled.labels[most]} against {counts[least]} of "
            f"{labelled.labels[least]}",
            f"Always answering {labelled.labels[most]} would be right in {share:.0%}, and the rare class drowns",
            "set class_weight: balanced, or loss: focal",
        )
    ]


def _leakage(labelled: LabelledSet) -> list[Finding]:
    found = _shared_groups(labelled)
    twins = labelled.twins
    if twins is None:
        return found
    in_train = np.zeros(len(twins), bool)
    in_train[np.unique(twins[labelled.rows("train")])] = True
    for split in ("validation", "test"):
        rows = labelled.rows(split)
        leaked = rows[in_train[twins[rows]]]
        if len(leaked):
            example = int(leaked[0])
            other = next(int(row) for row in labelled.rows("train") if twins[row] == twins[example])
            found.append(
                Finding(
                    "label_leakage",
                    "error" if len(leaked) > LEAKAGE_ERROR * len(rows) else "warning",
                    f"{len(leaked)} of {len(rows)} images in {split} look like one in train, for instance "
                    f"{labelled.uris[example]} like {labelled.uris[other]}",
                    "A model that remembers its training images scores well on these and means nothing",
                    f"{DRAW_ANOTHER}, give data.group_column, or correct the split",
                )
            )
    return found + _contradicting_twins(labelled, twins)


def _shared_groups(labelled: LabelledSet) -> list[Finding]:
    if labelled.groups is None:
        return []
    names = np.asarray(labelled.groups)
    train, others = set(names[labelled.splits == 0].tolist()), set(names[labelled.splits != 0].tolist())
    shared = sorted(train & others)
    if not shared:
        return []
    return [
        Finding(
            "label_leakage",
            "error",
            f"{len(shared)} of {len(train | others)} groups stand in train and on another side, "
            f"for instance {shared[0]}",
            "A model that recognises the group knows the answer without looking at what was asked",
            f"{DRAW_ANOTHER}, or correct the split",
        )
    ]


def _contradicting_twins(labelled: LabelledSet, twins: np.ndarray) -> list[Finding]:
    odd = np.flatnonzero(labelled.label_ids != labelled.label_ids[twins])
    if len(odd) == 0:
        return []
    k = int(odd[0])
    return [
        Finding(
            "label_leakage",
            "warning",
            f"{len(odd)} images look like one with another label, for instance {labelled.uris[k]} "
            f"({labelled.labels[labelled.label_ids[k]]}) like {labelled.uris[int(twins[k])]} "
            f"({labelled.labels[labelled.label_ids[int(twins[k])]]})",
            "One of the two labels is wrong, or the picture alone does not decide",
            "look at them and correct the labels",
        )
    ]


def _no_augmentation(config: TrainConfig, labelled: LabelledSet) -> list[Finding]:
    trains_convolutions = config.model.weights is None or config.fine_tune is not None
    counts = _counts(labelled, "train")
    if config.model.augmentation != "none" or not trains_convolutions or counts.min() >= FEW_IMAGES_PER_CLASS:
        return []
    return [
        Finding(
            "no_augmentation",
            "warning",
            f"convolutions are trained on {counts.min()} to {counts.max()} images per class without augmentation",
            "They will learn these images by heart: training accuracy rises while validation stands still",
            "set model.augmentation: screenshot (or photo)",
        )
    ]


def _unfrozen(config: TrainConfig) -> list[Finding]:
    tune = config.fine_tune
    if config.model.weights is None or tune is None or tune.epochs == 0:
        return []
    if config.train.epochs == 0:
        return [
            Finding(
                "unfrozen_too_early",
                "error",
                "start weights are given, train.epochs is 0 and fine_tune trains everything at once",
                "The gradients of a random head destroy the features that were paid for",
                "train the head first: set train.epochs to 5 or more",
            )
        ]
    limit = _highest_rate(tune)
    if tune.learning_rate <= limit * (1 + 1e-6):
        return []
    return [
        Finding(
            "unfrozen_too_early",
            "error" if tune.learning_rate >= 10 * limit else "warning",
            f"fine_tune.learning_rate is {tune.learning_rate:g} with {tune.optimizer}, "
            f"{'with' if tune.warmup_epochs else 'without'} warm-up",
            "Steps of this size overwrite the pretrained features before they can be adapted",
            f"set fine_tune.learning_rate to {limit:g} or less"
            + (", or fine_tune.warmup_epochs: 2" if _may_warm_up(tune) else ""),
        )
    ]


def _may_warm_up(phase: PhaseConfig) -> bool:
    return not phase.warmup_epochs and phase.optimizer != "sgd" and phase.reduce_lr_on_plateau is None


def _highest_rate(phase: PhaseConfig) -> float:
    factor = 10 if phase.warmup_epochs and phase.optimizer != "sgd" else 1
    return factor * FINE_TUNE_RATES[phase.optimizer]


def _enlarged(config: TrainConfig, sizes_px: Sequence[tuple[int, int]]) -> list[Finding]:
    architecture = find_architecture(config.model.architecture)
    side = config.model.input_size_px or architecture.default_size_px
    if side < architecture.smallest_size_px:
        return [
            Finding(
                "wrong_input_shape",
                "error",
                f"model.input_size_px is {side}, and {architecture.name} takes {architecture.smallest_size_px} or more",
                "Nothing would be left after its pooling layers",
                f"set model.input_size_px, for instance to {architecture.default_size_px}",
            )
        ]
    if not sizes_px:
        return []
    times = side / float(np.median([max(size) for size in sizes_px]))
    if times <= ENLARGED_WARNING:
        return []
    return [
        Finding(
            "wrong_input_shape",
            "warning",
            f"images are enlarged {times:.1f} times to the model's {side} px",
            f"{architecture.name} then spends {times * times:.0f} times the computing on no more information",
            f"set model.input_size_px to {max(architecture.smallest_size_px, round(side / times))}",
        )
    ]


def _constant(pixels: np.ndarray) -> list[Finding]:
    if len(pixels) == 0 or 0 < int(pixels.max()) <= 1:  # the latter is a mistake of its own
        return []
    blank = pixels.reshape(len(pixels), -1).std(axis=1) < CONSTANT_STD
    equal = len(pixels) > 1 and bool((pixels == pixels[0]).all())
    if not equal and blank.mean() <= CONSTANT_SHARES[0]:
        return []
    return [
        Finding(
            "constant_input",
            "error" if equal or blank.mean() > CONSTANT_SHARES[1] else "warning",
            f"all {len(pixels)} sampled training images are equal"
            if equal
            else f"{blank.sum()} of {len(pixels)} sampled training images are blank",
            "A constant picture carries no class: usually a crawler that saved before the page had loaded",
            "look at the images, and leave blank ones out of the data",
        )
    ]


def _normalisation(config: TrainConfig, model: Any, pixels: np.ndarray) -> list[Finding]:
    """Measured behind the model's own preprocessing layer, on real images."""
    import keras

    if len(pixels) == 0:
        return []
    architecture = find_architecture(config.model.architecture)
    used = used_preprocessing(config.model)
    reach = keras.Model(model.input, model.get_layer(used).output)
    values = np.asarray(reach(pixels, training=False))
    low, high = expected_range(architecture.preprocessing)
    own_low, own_high = expected_range(used)
    seen = f"the backbone gets values from {values.min():.3g} to {values.max():.3g} (mean {values.mean():.3g})"
    wanted = f"{architecture.name} expects {low:.4g} to {high:.4g}"
    if int(pixels.max()) <= 1:
        return [
            Finding(
                "unnormalised_pixels",
                "error",
                f"no pixel of {len(pixels)} sampled images is above 1, so {seen}",
                "They were divided by 255 before they were saved; the model divides once more",
                "save images with values from 0 to 255: preprocessing is part of the model",
            )
        ]
    span, ratio = high - low, (own_high - own_low) / (high - low)
    shifted = abs(own_high + own_low - high - low) / 2 > SHIFT * span
    other = config.model.weights is not None and used != architecture.preprocessing
    if 1 / RANGE_FACTOR <= ratio <= RANGE_FACTOR and not shifted and not other:
        return []
    if architecture.preprocessing == "inside_model":
        why = "They are normalised twice: the network contains its own preprocessing"
    elif other:
        why = "The start weights were made for other values: their features mean nothing on these"
    else:
        why = "Inputs far from zero, or all close to it, stop or blow up the training"
    return [
        Finding(
            "unnormalised_pixels",
            "error",
            f"{seen}, and {wanted}",
            why,
            "leave model.preprocessing out",
        )
    ]


def _too_large(config: TrainConfig, labelled: LabelledSet, model: Any) -> list[Finding]:
    if config.model.weights is not None:
        return []
    images = len(labelled.rows(SPLITS[0]))
    parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    ratio = parameters / max(images, 1)
    if ratio <= PARAMETERS_PER_IMAGE[0]:
        return []
    return [
        Finding(
            "too_many_parameters",
            "error" if ratio > PARAMETERS_PER_IMAGE[1] else "warning",
            f"{parameters:,} parameters from scratch on {images:,} training images ({ratio:,.0f} for each)",
            "Such a network can store every image and need not learn anything",
            "give model.weights (transfer), or take a smaller model.architecture",
        )
    ]
