"""How good scores are against the truth, with intervals: numpy in, plain dataclasses out. No I/O.

Intervals come from the bootstrap (Efron 1979) by percentiles. Where images have groups (domains), whole groups are
resampled: images of one site are not independent, and intervals over images would be too narrow. What cannot be
computed (no positives, no negatives) is None and never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BUDGETS = (0.001, 0.01, 0.05)
"""False-positive rates at which recall is reported."""
BINS = 15
"""Equal bins of confidence for the calibration error (arXiv 1706.04599)."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; None where it cannot be computed, or has no interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ClassFigures:
    """One class against the rest, by the label that was answered."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    average_precision: float | None


@dataclass(frozen=True)
class Bin:
    """Answers of one range of confidence: what they claimed and what was right."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class RecallAtFpr:
    """Recall at the lowest threshold that flags at most max_fpr of the negatives. supported: there are enough
    negatives (1 / max_fpr) for a single one of them to be within the budget."""

    max_fpr: float
    recall: Estimate
    supported: bool


@dataclass(frozen=True)
class BinaryFigures:
    """The positive class against all others, by its score."""

    positive_label: str
    positives: int
    negatives: int
    roc_auc: Estimate
    pr_auc: Estimate
    recall_at_fpr: tuple[RecallAtFpr, ...]
    threshold: float
    recall_at_threshold: Estimate
    fpr_at_threshold: Estimate
    precision_at_threshold: float | None


@dataclass(frozen=True)
class Figures:
    """Everything about one set of scores."""

    images: int
    accuracy: Estimate
    top_k: dict[int, float]
    log_loss: float
    macro_roc_auc: Estimate
    calibration_error: Estimate
    bins: tuple[Bin, ...]
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]
    binary: BinaryFigures | None


class Resamples:
    """Bootstrap samples of rows, or of whole groups: row weights float64 [N], the same ones at every iteration."""

    def __init__(self, count: int, groups: Sequence[str] | None, samples: int, seed: int) -> None:
        """Nothing is drawn before it is iterated: a thousand samples of a million rows would not fit into memory."""
        self.count, self.samples, self._seed = count, samples, seed
        self.units, self._ids = count, np.arange(count)
        if groups is not None:
            names, self._ids = np.unique(np.asarray(groups), return_inverse=True)
            self.units = len(names)

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(self._seed)
        for _ in range(self.samples):
            drawn = np.bincount(rng.integers(0, self.units, self.units), minlength=self.units)
            yield drawn[self._ids].astype(np.float64)


def estimate(measure: Callable[[np.ndarray], float | None], resamples: Resamples, confidence: float) -> Estimate:
    """The measure over all rows with its percentile interval; `measure` takes row weights float64 [N].

    Resamples in which it cannot be computed are left out; below half of them there is no interval, nor where all rows
    are of one group: every resample is then the same, which would look like certainty.
    """
    value = measure(np.ones(resamples.count))
    if value is None:
        return Estimate(None)
    if resamples.units < 2:
        return Estimate(value)
    drawn = [v for v in map(measure, resamples) if v is not None]
    if len(drawn) < len(resamples) / 2:
        return Estimate(value)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def figures(
    scores: np.ndarray,
    truth: np.ndarray,
    labels: Sequence[str],
    *,
    positive: int | None = None,
    threshold: float = 0.5,
    groups: Sequence[str] | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Figures:
    """All figures of scores float [N, C] against truth int [N], N >= 1; positive: index of the positive label."""
    drawn = Resamples(len(truth), groups, samples, seed)
    hit = scores.argmax(1) == truth
    ranks = _ranks(scores, truth)
    binary = None
    if positive is not None:
        binary = binary_figures(scores[:, positive], truth == positive, labels[positive], threshold, drawn, confidence)
    return Figures(
        images=len(truth),
        accuracy=estimate(lambda w: _mean(hit, w), drawn, confidence),
        top_k={k: float((ranks < k).mean()) for k in (1, 3, 5) if k < len(labels) or k == 1},
        log_loss=log_loss(scores, truth),
        macro_roc_auc=estimate(_macro_auc(scores, truth), drawn, confidence),
        calibration_error=estimate(_calibration_error(scores, hit), drawn, confidence),
        bins=_bins(scores, hit),
        classes=tuple(_class_figures(scores, truth, labels, k) for k in range(len(labels))),
        confusion=_confusion(scores, truth, len(labels)),
        binary=binary,
    )


def binary_figures(
    score: np.ndarray, positive: np.ndarray, label: str, threshold: float, drawn: Resamples, confidence: float
) -> BinaryFigures:
    """Figures of the positive class. score: float [N]; positive: bool [N]; drawn: the bootstrap samples of the rows."""
    ranked = Ranked(score, positive)
    flagged = score >= threshold
    negatives = int((~positive).sum())
    return BinaryFigures(
        positive_label=label,
        positives=int(positive.sum()),
        negatives=negatives,
        roc_auc=estimate(ranked.roc_auc, drawn, confidence),
        pr_auc=estimate(ranked.average_precision, drawn, confidence),
        recall_at_fpr=tuple(
            RecallAtFpr(
                budget,
                estimate(lambda w, b=budget: ranked.recall_at(b, w), drawn, confidence),
                negatives >= 1 / budget,
            )
            for budget in BUDGETS
        ),
        threshold=threshold,
        recall_at_threshold=share(int((flagged & positive).sum()), int(positive.sum()), confidence),
        fpr_at_threshold=share(int((flagged & ~positive).sum()), negatives, confidence),
        precision_at_threshold=float(positive[flagged].mean()) if flagged.any() else None,
    )


class Ranked:
    """Scores of a binary question, sorted once, so that a thousand resamples cost little."""

    def __init__(self, score: np.ndarray, positive: np.ndarray) -> None:
        """score: float [N], higher is more positive; positive: bool [N]."""
        self.thresholds, self._ids = np.unique(-score, return_inverse=True)
        self.thresholds = -self.thresholds
        self._positive = positive.astype(np.float64)

    def curve(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(true, false) positives, cumulated from the highest threshold down: float64 [T] each."""
        w = np.ones(len(self._ids)) if weights is None else weights
        count = len(self.thresholds)
        true = np.bincount(self._ids, w * self._positive, count)
        false = np.bincount(self._ids, w * (1 - self._positive), count)
        return np.cumsum(true), np.cumsum(false)

    def roc_auc(self, weights: np.ndarray | None = None) -> float | None:
        """Area under the ROC curve, ties counted half; None without positives or negatives."""
        true, false = self.curve(weights)
        if true[-1] == 0 or false[-1] == 0:
            return None
        x, y = np.append(0, false), np.append(0, true)
        return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (true[-1] * false[-1]))

    def average_precision(self, weights: np.ndarray | None = None) -> float | None:
        """Sum of precision over the steps of recall (scikit-learn's average_precision_score); None of no positives."""
        true, false = self.curve(weights)
        if true[-1] == 0:
            return None
        flagged = np.maximum(true + false, 1e-300)
        return float(np.sum(np.diff(np.append(0, true)) * true / flagged) / true[-1])

    def recall_at(self, max_fpr: float, weights: np.ndarray | None = None) -> float | None:
        """The highest recall whose false-positive rate is at most max_fpr; None without positives or negatives."""
        true, false = self.curve(weights)
        if true[-1] == 0 or false[-1] == 0:
            return None
        within = false <= max_fpr * false[-1] + 1e-9
        return float(true[within].max(initial=0.0) / true[-1])


def share(count: int, total: int, confidence: float) -> Estimate:
    """count / total with its exact interval (Clopper and Pearson 1934); None of none."""
    from scipy.stats import binomtest

    if total == 0:
        return Estimate(None)
    interval = binomtest(count, total).proportion_ci(confidence, "exact")
    return Estimate(count / total, float(interval.low), float(interval.high))


def topk_accuracy(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of rows whose true class is among the k highest scores."""
    return float((_ranks(scores, truth) < k).mean())


def log_loss(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean negative log of the true class's score, in nats; scores below 1e-7 count as that."""
    return float(-np.log(np.clip(scores[np.arange(len(truth)), truth], 1e-7, 1)).mean())


def _ranks(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many classes stand before the true one; of equal scores the lower index stands first, as argmax has it."""
    own = scores[np.arange(len(truth)), truth][:, None]
    earlier = np.arange(scores.shape[1])[None] < truth[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def _mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else None


def _macro_auc(scores: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], float | None]:
    """The mean of one-against-rest areas over the classes that have both sides."""
    ranked = [Ranked(scores[:, k], truth == k) for k in range(scores.shape[1])]

    def measure(weights: np.ndarray) -> float | None:
        areas = [area for one in ranked if (area := one.roc_auc(weights)) is not None]
        return float(np.mean(areas)) if areas else None

    return measure


def _bin_ids(scores: np.ndarray) -> np.ndarray:
    return np.minimum((scores.max(1) * BINS).astype(int), BINS - 1)


def _calibration_error(scores: np.ndarray, hit: np.ndarray) -> Callable[[np.ndarray], float | None]:
    ids, gap = _bin_ids(scores), hit - scores.max(1)

    def measure(weights: np.ndarray) -> float | None:
        total = weights.sum()
        return float(np.abs(np.bincount(ids, weights * gap, BINS)).sum() / total) if total else None

    return measure


def _bins(scores: np.ndarray, hit: np.ndarray) -> tuple[Bin, ...]:
    ids, top = _bin_ids(scores), scores.max(1)
    return tuple(
        Bin(float(top[ids == k].mean()), float(hit[ids == k].mean()), int((ids == k).sum()))
        for k in range(BINS)
        if (ids == k).any()
    )


def _class_figures(scores: np.ndarray, truth: np.ndarray, labels: Sequence[str], k: int) -> ClassFigures:
    answered, true = scores.argmax(1) == k, truth == k
    both = int((answered & true).sum())
    precision = both / int(answered.sum()) if answered.any() else None
    recall = both / int(true.sum()) if true.any() else None
    f1 = None if precision is None or recall is None else (2 * both) / int(answered.sum() + true.sum())
    area = Ranked(scores[:, k], true).average_precision()
    return ClassFigures(labels[k], precision, recall, f1, int(true.sum()), area)


def _confusion(scores: np.ndarray, truth: np.ndarray, classes: int) -> tuple[tuple[int, ...], ...]:
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (truth, scores.argmax(1)), 1)
    return tuple(tuple(int(n) for n in line) for line in counts)
