"""The positive label's threshold at a false-positive budget, on calibrated scores, as a new version of the model.

First the temperature (Guo et al., arXiv 1706.04599): one number that divides the logits so that scores become
probabilities. Dividing kernel and bias of the last layer by it is exactly that and leaves the graph as it is. Then the
threshold, on the scores of the engine and precision that will be used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnn_ray.artifact import OPENVINO_FILES, WEIGHTS, Artifact, EngineFigures, fetch_files, load_artifact
from cnn_ray.config import CalibrateConfig
from cnn_ray.errors import ConfigError, DataError
from cnn_ray.evaluate import predict_images, score_labelled
from cnn_ray.images import DecodedImage, ImageCaps
from cnn_ray.judged import LabelledScores
from cnn_ray.metrics import Estimate, Resamples, estimate, log_loss, share
from cnn_ray.predictor import Predictor, choose_engine, compile_openvino, freeze_tensorflow, rebuild_model
from cnn_ray.reader import ImageReader

SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.5, 20.0
"""Below, scores saturate at 0 and 1: what a handful of easy images asks for."""
EXPORT_IMAGES = 512


@dataclass(frozen=True)
class Calibration:
    """What was fitted, and on what."""

    from_reference: str
    positive_label: str
    temperature: float
    threshold: Estimate
    max_fpr: float
    supported: bool
    """Whether there are 1 / max_fpr negatives: below, not even one of them may be flagged."""
    positives: int
    negatives: int
    fpr: Estimate
    recall: Estimate
    log_loss_before: float
    log_loss_after: float
    engine: str
    precision: str
    split: str
    data_digest: str

    @property
    def sentence(self) -> str:
        """The plain word about the budget."""
        if self.supported:
            return f"{self.negatives:,} negatives support a false-positive rate of {self.max_fpr:.2%}."
        return (
            f"{self.negatives:,} negatives are too few for a false-positive rate of {self.max_fpr:.2%}, which needs "
            f"{math.ceil(1 / self.max_fpr - 1e-9):,}: the threshold lies above all of them, and all that is known is a "
            f"rate below {self.fpr.high or 1.0:.2%}."
        )


def fit_calibration(config: CalibrateConfig) -> Calibration:
    """Temperature and threshold on the images of the asked side; writes nothing.

    Raises:
        ConfigError: the model has no positive label.
        DataError: no positives or no negatives among the images, or as `score_labelled`.
    """
    artifact = load_artifact(config.models_uri, config.model)
    scored = _scored(config, artifact)
    temperature = _temperature(config, scored)
    return _calibration(config, scored, divided(scored.scores, temperature), temperature)


def run_calibration(config: CalibrateConfig) -> tuple[Calibration, Artifact]:
    """The calibration and the new version that holds it; the old version is not touched.

    Raises:
        ConfigError, DataError: as `fit_calibration`.
        ArtifactError: an engine in float32 does not agree with the scaled model.
    """
    from cnn_ray.export import publish_artifact

    artifact = load_artifact(config.models_uri, config.model)
    scored = _scored(config, artifact)
    temperature = _temperature(config, scored)
    model = _scaled_model(artifact, temperature)
    fitted: list[Calibration] = []

    def fit(folder: Path, figures: dict[str, dict[str, EngineFigures]]) -> tuple[float, dict[str, Any]]:
        predictor = _predictor(config, artifact, model, folder, figures)
        caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
        scores, kept, _ = predict_images(predictor, scored.root_uri, scored.uris, caps)
        again = replace(
            scored,
            scores=scores,
            truth=scored.truth[kept],
            uris=tuple(scored.uris[k] for k in kept),
            groups=None if scored.groups is None else tuple(scored.groups[k] for k in kept),
            engine=predictor.engine,
            precision=predictor.precision,
        )
        before = log_loss(scored.scores, scored.truth)
        fitted.append(replace(_calibration(config, again, scores, temperature), log_loss_before=before))
        return float(fitted[0].threshold.value or 0.0), asdict(fitted[0])

    pixels, truth = _pixels(config, scored)
    description = artifact.description
    published = publish_artifact(
        model,
        models_uri=config.models_uri,
        name=artifact.name,
        definition=description.definition,
        labels=artifact.labels,
        positive_label=artifact.positive_label,
        threshold=artifact.threshold,
        validation_pixels=pixels,
        validation_labels=truth,
        training=description.training,
        fit=fit,
    )
    return fitted[0], published


def divided(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of the logits behind the scores, divided by the temperature. scores: float [N, C]; so is the result."""
    logits = np.log(np.clip(scores.astype(np.float64), 1e-12, 1)) / temperature
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def fit_temperature(scores: np.ndarray, truth: np.ndarray) -> float:
    """The temperature with the lowest log loss; 1 where no answer is wrong: nothing then holds the scores back from
    certainty. scores: float [N, C]; truth: int [N]."""
    from scipy.optimize import minimize_scalar

    if (scores.argmax(1) == truth).all():
        return 1.0

    found: Any = minimize_scalar(
        lambda log_t: log_loss(divided(scores, math.exp(log_t)), truth),
        bounds=(math.log(SMALLEST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)),
        method="bounded",
    )
    return math.exp(float(found.x))


def threshold_at(score: np.ndarray, positive: np.ndarray, max_fpr: float, weights: np.ndarray | None = None) -> float:
    """The lowest threshold that flags (score >= threshold) at most max_fpr of the negatives.

    It lies half-way to the next higher score where float32 has room there, as scores are compared in float32; else it
    is that score. score: float [N]; positive: bool [N].
    """
    w = np.ones(len(score)) if weights is None else weights
    values, ids = np.unique(score, return_inverse=True)
    negatives = np.bincount(ids, w * ~positive, len(values))
    flagged = np.cumsum(negatives[::-1])[::-1]
    within = np.flatnonzero(flagged <= max_fpr * negatives.sum() + 1e-9)
    if len(within) == 0:
        return float(np.nextafter(np.float32(values[-1]), np.float32(2)))
    k = int(within[0])
    if k == 0:
        return float(values[0])
    middle = np.float32((float(values[k - 1]) + float(values[k])) / 2)
    return float(middle) if values[k - 1] < middle <= values[k] else float(values[k])


def _scored(config: CalibrateConfig, artifact: Artifact) -> LabelledScores:
    if artifact.positive_label is None:
        raise ConfigError(
            f"Expected a model with a positive label. Received: {artifact.reference} without one. "
            "Next: train with positive_label set to the class that is to be flagged."
        )
    scored = score_labelled(config, artifact)
    positive = scored.truth == scored.positive
    if positive.all() or not positive.any():
        raise DataError(
            f"Expected images of {artifact.positive_label!r} and others in {config.data.uri} ({scored.split}). "
            f"Received: {int(positive.sum())} and {int((~positive).sum())}. Next: give data with both."
        )
    return scored


def _temperature(config: CalibrateConfig, scored: LabelledScores) -> float:
    return fit_temperature(scored.scores, scored.truth) if config.temperature_scaling else 1.0


def _calibration(
    config: CalibrateConfig, scored: LabelledScores, scores: np.ndarray, temperature: float
) -> Calibration:
    index = scored.positive or 0
    score, positive = scores[:, index], scored.truth == index
    threshold = threshold_at(score, positive, config.max_fpr)
    drawn = Resamples(len(score), scored.groups, config.bootstrap_samples, config.seed)
    spread = estimate(lambda w: threshold_at(score, positive, config.max_fpr, w), drawn, config.confidence)
    flagged, negatives = score >= threshold, int((~positive).sum())
    return Calibration(
        from_reference=scored.artifact.reference,
        positive_label=scored.artifact.labels[index],
        temperature=temperature,
        threshold=Estimate(threshold, spread.low, spread.high),
        max_fpr=config.max_fpr,
        supported=negatives * config.max_fpr >= 1 - 1e-9,
        positives=int(positive.sum()),
        negatives=negatives,
        fpr=share(int((flagged & ~positive).sum()), negatives, config.confidence),
        recall=share(int((flagged & positive).sum()), int(positive.sum()), config.confidence),
        log_loss_before=log_loss(scored.scores, scored.truth),
        log_loss_after=log_loss(scores, scored.truth),
        engine=scored.engine,
        precision=scored.precision,
        split=scored.split,
        data_digest=scored.data_digest,
    )


def _scaled_model(artifact: Artifact, temperature: float) -> Any:
    folder = fetch_files(artifact, (WEIGHTS,))
    model: Any = rebuild_model(artifact.description.definition, len(artifact.labels), str(folder / WEIGHTS))
    last = model.get_layer("scores")
    last.set_weights([weights / temperature for weights in last.get_weights()])
    return model


def _predictor(
    config: CalibrateConfig,
    artifact: Artifact,
    model: Any,
    folder: Path,
    figures: dict[str, dict[str, EngineFigures]],
) -> Predictor:
    """The exported files as `auto` or the configuration will use them once they are published."""
    future = replace(artifact, description=artifact.description.model_copy(update={"engines": figures}))
    engine, precision = choose_engine(future, config.engine, config.precision)
    if engine == "openvino":
        compute = compile_openvino(str(folder / OPENVINO_FILES[0]), precision, config.num_threads)
    else:
        compute = freeze_tensorflow(model, precision)
    return Predictor(future, engine, precision, compute)


def _pixels(config: CalibrateConfig, scored: LabelledScores) -> tuple[np.ndarray, np.ndarray]:
    """Images for the comparison of engines at export, spread over all."""
    caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
    reader, size_px = ImageReader(scored.root_uri, caps), scored.artifact.size_px
    count = min(EXPORT_IMAGES, len(scored.uris))
    rows = np.unique(np.linspace(0, len(scored.uris) - 1, count).astype(int))
    images = [(row, image) for row in rows if isinstance(image := reader.read(scored.uris[row], size_px), DecodedImage)]
    return np.stack([image.pixels for _, image in images]), scored.truth[[row for row, _ in images]]
