"""The release gate: an alias moves only to a version that is not worse than the one it means now, beyond noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np

from cnn_ray.artifact import Artifact, load_artifact, read_aliases, set_alias
from cnn_ray.config import PromoteConfig
from cnn_ray.errors import ArtifactError, ConfigError, PromotionRefusedError
from cnn_ray.evaluate import score_again, score_labelled
from cnn_ray.judged import LabelledScores
from cnn_ray.metrics import Estimate, Ranked, Resamples, estimate
from cnn_ray.storage import open_store

PROMOTIONS = "_promotions"


@dataclass(frozen=True)
class Verdict:
    """What the comparison says. difference: candidate minus champion with its paired bootstrap interval."""

    reference: str
    alias: str
    champion: str | None
    metric: str
    candidate_value: float | None
    champion_value: float | None
    difference: Estimate
    worse: bool
    images: int
    data_uri: str
    data_digest: str
    split: str
    threshold: float
    champion_threshold: float | None
    note: str = ""
    """What the metric does not see."""

    @property
    def sentence(self) -> str:
        """The verdict for people."""
        if self.champion is None:
            return (
                f"{self.alias} means no version yet: {self.reference} ({self.metric} {self.candidate_value}) takes it."
            )
        if self.champion == self.reference:
            return f"{self.alias} already means {self.reference}."
        gap = self.difference
        if gap.low is None:
            return (
                f"{self.metric} of {self.reference} minus that of {self.champion} is {gap.value:+.4f} on "
                f"{self.images:,} images, too few or of too few groups to tell it from noise."
            )
        between = f" ({gap.low:+.4f} to {gap.high:+.4f})"
        return (
            f"{self.metric} of {self.reference} minus that of {self.champion} is {gap.value:+.4f}{between} on "
            f"{self.images:,} images: {'worse beyond noise' if self.worse else 'not worse beyond noise'}."
        )


def judge(config: PromoteConfig) -> Verdict:
    """The candidate against the version that the alias means now, on the same images with a paired bootstrap.

    Each resample draws the same images (whole groups, where there are any) for both. Worse beyond noise means that the
    whole interval of the difference is below zero. Where no interval can be had, any worse figure counts as worse.

    Raises:
        ArtifactError: no such version, or the two have other labels or another positive label.
        ConfigError: the metric needs a positive label, or the images cannot tell (one class only).
        DataError: as `score_labelled`.
    """
    candidate = load_artifact(config.models_uri, config.model)
    version = read_aliases(config.models_uri, candidate.name).get(config.alias)
    new = score_labelled(config, candidate)
    metric = _metric(config, new)
    champion, old = None, None
    if version is not None:
        champion = load_artifact(config.models_uri, f"{candidate.name}@{version}")
        _check_comparable(candidate, champion, metric)
        old = new if version == candidate.version else score_again(config, new, champion)
    measure_new = _measure(config, metric, new)
    ones = np.ones(len(new.truth))
    value, other, gap = measure_new(ones), None, Estimate(None)
    if value is None:
        raise ConfigError(
            f"Expected images with which {metric} can be computed. Received: {len(new.truth)} of one class in "
            f"{config.data.uri}. Next: name another evaluation set, or --metric accuracy."
        )
    if old is not None:
        measure_old = _measure(config, metric, old)
        other = measure_old(ones)

        def difference(weights: np.ndarray) -> float | None:
            a, b = measure_new(weights), measure_old(weights)
            return None if a is None or b is None else a - b

        gap = estimate(
            difference, Resamples(len(new.truth), new.groups, config.bootstrap_samples, config.seed), config.confidence
        )
    return Verdict(
        reference=candidate.reference,
        alias=config.alias,
        champion=None if champion is None else champion.reference,
        metric=metric,
        candidate_value=value,
        champion_value=other,
        difference=gap,
        worse=gap.value is not None and (gap.value if gap.high is None else gap.high) < 0,
        images=len(new.truth),
        data_uri=config.data.uri,
        data_digest=new.data_digest,
        split=new.split,
        threshold=candidate.threshold,
        champion_threshold=None if champion is None else champion.threshold,
        note=_note(candidate, champion),
    )


def _check_comparable(candidate: Artifact, champion: Artifact, metric: str) -> None:
    if sorted(champion.labels) != sorted(candidate.labels):
        raise ArtifactError(
            f"Expected {candidate.reference} to have the labels of {champion.reference}: "
            f"{', '.join(champion.labels)}. Received: {', '.join(candidate.labels)}. Next: use another alias."
        )
    if metric != "accuracy" and champion.positive_label != candidate.positive_label:
        raise ArtifactError(
            f"Expected {candidate.reference} to have the positive label of {champion.reference}: "
            f"{champion.positive_label}. Received: {candidate.positive_label}. Next: --metric accuracy."
        )


def _note(candidate: Artifact, champion: Artifact | None) -> str:
    if champion is None or champion.description.calibration is None or candidate.description.calibration is not None:
        return ""
    return (
        f"{champion.reference} has a calibrated threshold ({champion.threshold:.4g}), {candidate.reference} has none "
        f"({candidate.threshold:.4g}): it may flag far more. Next: cnn-ray model calibrate {candidate.reference}."
    )


def refuse_worse(config: PromoteConfig, verdict: Verdict) -> None:
    """Nothing, unless the version is worse beyond noise and not forced.

    Raises:
        PromotionRefusedError: it is.
    """
    if verdict.worse and not config.force:
        raise PromotionRefusedError(
            f"Expected a version that is not worse than {verdict.champion}. Received: {verdict.sentence} "
            "Next: train a better one, or --force --reason TEXT."
        )


def promote(config: PromoteConfig, verdict: Verdict) -> None:
    """Afterwards the alias means the candidate, and `_promotions/` beside the versions says why.

    Raises:
        PromotionRefusedError: it is worse and not forced, or the alias was moved by somebody else meanwhile.
    """
    if verdict.champion == verdict.reference:
        return
    refuse_worse(config, verdict)
    name, _, version = verdict.reference.partition("@")
    store = open_store(f"{config.models_uri.rstrip('/')}/{name}")
    record = {
        **asdict(verdict),
        "forced": config.force,
        "reason": config.reason,
        "at": datetime.now(UTC).isoformat("T", "seconds"),
    }
    number = len(store.keys(f"{PROMOTIONS}/")) + 1
    while not store.put_if_absent(f"{PROMOTIONS}/{number:05}.json", json.dumps(record, indent=2).encode()):
        number += 1
    before = None if verdict.champion is None else int(verdict.champion.partition("@")[2])
    if not set_alias(config.models_uri, name, config.alias, int(version), expected=before):
        store.put(f"{PROMOTIONS}/{number:05}.json", json.dumps({**record, "abandoned": True}, indent=2).encode())
        raise PromotionRefusedError(
            f"Expected {config.alias} to mean {verdict.champion or 'nothing'} still. Received: another promotion came "
            "first. Next: run the command again; it compares with the new one."
        )


def _metric(config: PromoteConfig, scored: LabelledScores) -> str:
    metric = config.metric
    if metric == "auto":
        return "accuracy" if scored.positive is None else "roc_auc"
    if metric != "accuracy" and scored.positive is None:
        raise ConfigError(
            f"Expected a model with a positive label for {metric}. Received: {scored.artifact.reference} without one. "
            "Next: --metric accuracy."
        )
    return metric


def _measure(config: PromoteConfig, metric: str, scored: LabelledScores) -> Callable[[np.ndarray], float | None]:
    if metric == "accuracy":
        hits = scored.scores.argmax(1) == scored.truth

        def accuracy(weights: np.ndarray) -> float | None:
            return float((hits * weights).sum() / weights.sum()) if weights.any() else None

        return accuracy
    index = scored.positive or 0
    ranked = Ranked(scored.scores[:, index], scored.truth == index)
    if metric == "roc_auc":
        return ranked.roc_auc
    if metric == "pr_auc":
        return ranked.average_precision
    return lambda weights: ranked.recall_at(config.max_fpr, weights)
