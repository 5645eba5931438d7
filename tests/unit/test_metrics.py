"""Figures against scikit-learn and by hand, degenerate cases, and the coverage of the intervals."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from cnn_ray.metrics import Ranked, Resamples, estimate, figures, log_loss, share, topk_accuracy

RNG = np.random.default_rng(5)


def scored(count: int = 300, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    truth = RNG.integers(0, classes, count)
    logits = RNG.normal(size=(count, classes))
    logits[np.arange(count), truth] += 1.2
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return scores.astype(np.float32), truth


def test_areas_are_scikit_learns_with_ties_and_weights():
    from sklearn.metrics import average_precision_score, roc_auc_score

    score = np.round(RNG.random(400), 1)
    positive = RNG.random(400) < 0.3
    weights = RNG.integers(0, 4, 400).astype(float)
    ranked = Ranked(score, positive)
    for w in (None, weights):
        assert ranked.roc_auc(w) == pytest.approx(roc_auc_score(positive, score, sample_weight=w))
        assert ranked.average_precision(w) == pytest.approx(average_precision_score(positive, score, sample_weight=w))


def test_class_figures_and_log_loss_are_scikit_learns():
    from sklearn.metrics import log_loss as sklearn_log_loss
    from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

    scores, truth = scored()
    found = figures(scores, truth, "abcd", samples=100)
    answers = scores.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(truth, answers)
    assert [c.precision for c in found.classes] == pytest.approx(precision.tolist())
    assert [c.recall for c in found.classes] == pytest.approx(recall.tolist())
    assert [c.f1 for c in found.classes] == pytest.approx(f1.tolist())
    assert [c.support for c in found.classes] == support.tolist()
    assert found.log_loss == pytest.approx(sklearn_log_loss(truth, scores.astype(float)), rel=1e-5)
    assert found.top_k[3] == pytest.approx(top_k_accuracy_score(truth, scores, k=3))
    assert found.accuracy.value == (answers == truth).mean()
    assert np.sum(found.confusion) == len(truth)
    assert np.trace(np.array(found.confusion)) == (answers == truth).sum()


def test_equal_scores_are_ranked_as_argmax_does():
    scores = np.full((3, 4), 0.25)
    truth = np.array([0, 1, 3])
    assert topk_accuracy(scores, truth, 1) == pytest.approx(1 / 3)
    assert topk_accuracy(scores, truth, 2) == pytest.approx(2 / 3)


def test_calibration_error_by_hand():
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    found = figures(scores, np.array([0, 1, 0, 0]), "ab", samples=100)
    assert found.calibration_error.value == pytest.approx((abs(0.5 - 0.9) * 2 + abs(1 - 0.6) * 2) / 4)
    assert [(one.count, one.accuracy) for one in found.bins] == [(2, 1.0), (2, 0.5)]


def test_recall_at_a_false_positive_rate_by_hand():
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    positive = np.array([1, 0, 1, 1, 0, 0], bool)
    ranked = Ranked(score, positive)
    assert [ranked.recall_at(f) for f in (0, 0.33, 0.34, 1)] == pytest.approx([1 / 3, 1 / 3, 1, 1])
    found = figures(np.stack([1 - score, score], 1), positive.astype(int), "ab", positive=1, samples=100).binary
    assert found is not None
    assert [r.supported for r in found.recall_at_fpr] == [False, False, False]
    assert (found.positives, found.negatives) == (3, 3)


@pytest.mark.parametrize("truth", [np.zeros(5, int), np.ones(5, int)])
def test_one_kind_alone_gives_no_areas_and_no_nan(truth):
    scores = np.stack([np.linspace(0, 1, 5), 1 - np.linspace(0, 1, 5)], 1)
    found = figures(scores, truth, "ab", positive=1, samples=100)
    assert found.binary is not None
    assert found.binary.roc_auc.value is None
    assert found.binary.recall_at_fpr[0].recall.value is None
    text = json.dumps(asdict(found), allow_nan=False)
    assert "accuracy" in text


def test_a_perfect_and_a_constant_score():
    truth = np.array([0, 0, 1, 1])
    assert Ranked(np.array([0.1, 0.2, 0.8, 0.9]), truth == 1).roc_auc() == 1
    assert Ranked(np.full(4, 0.5), truth == 1).roc_auc() == 0.5
    assert log_loss(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-np.log(1e-7))


def test_whole_groups_are_resampled():
    drawn = list(Resamples(6, ["a", "a", "a", "b", "b", "c"], 50, seed=1))
    assert all(w[0] == w[1] == w[2] and w[3] == w[4] for w in drawn)
    assert len({tuple(w) for w in drawn}) > 5
    assert all(np.array_equal(a, b) for a, b in zip(drawn, Resamples(6, list("aaabbc"), 50, seed=1), strict=True))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for trial in range(120):
        hits = np.random.default_rng(trial).random(150) < 0.8
        found = estimate(lambda w, h=hits: float((h * w).sum() / w.sum()), Resamples(150, None, 200, trial), 0.9)
        covered += found.low <= 0.8 <= found.high
    assert 0.82 < covered / 120 < 0.97


def test_intervals_over_groups_are_wider_where_groups_are_alike():
    hits = np.repeat(np.random.default_rng(0).random(20) < 0.7, 20)
    groups = [str(k) for k in np.repeat(np.arange(20), 20)]

    def width(by):
        found = estimate(lambda w: float((hits * w).sum() / w.sum()), Resamples(400, by, 300, 0), 0.95)
        return found.high - found.low

    assert width(groups) > 2.5 * width(None)


def test_shares_have_exact_intervals():
    assert share(0, 0, 0.95).value is None
    none = share(0, 300, 0.95)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 300), rel=1e-6)


def test_one_group_alone_gives_no_interval():
    hits = np.array([1.0, 0.0, 1.0])

    def mean(weights):
        return float((hits * weights).sum() / weights.sum())

    assert estimate(mean, Resamples(3, ["a"] * 3, 100, 0), 0.95).high is None
    assert estimate(mean, Resamples(3, ["a", "b", "b"], 100, 0), 0.95).high is not None
