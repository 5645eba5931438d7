"""Tallies add up like their rows, in any order; bounded sums stay bounded."""

import math
from functools import reduce

import numpy as np
import pyarrow as pa
import pytest

from cnn_ray.records import QUARANTINE_SCHEMA, SCORE_SCHEMA
from cnn_ray.tallies import (
    BAD_ROWS_PER_CODE,
    MOST_POINTS,
    SCORE_BINS,
    TOP_ROWS,
    Tally,
    Timeline,
    psi,
    score_bins,
    tally_of,
)

LABELS = ("legitimate", "phishing")


def scored(count: int, seed: int = 0, positive: int = 1) -> pa.Table:
    random = np.random.default_rng(seed).random(count, np.float32)
    scores = np.stack([1 - random, random], 1)
    best = scores.argmax(1)
    columns = {
        "uri": [f"/in/{seed}-{k:05d}.png" for k in range(count)],
        "etag": ["e"] * count,
        "size_bytes": [1] * count,
        "sha256": ["00"] * count,
        "phash": [0] * count,
        "width_px": [1] * count,
        "height_px": [1] * count,
        "label": [LABELS[k] for k in best],
        "score": scores.max(1) if count else [],
        "scores": list(scores),
        "flagged": scores[:, positive] >= 0.5,
        "model_name": ["m"] * count,
        "model_version": [1] * count,
        "run_date": [None] * count,
        "generation": [1] * count,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SCORE_SCHEMA], schema=SCORE_SCHEMA)


def bad(count: int, seed: int = 0) -> pa.Table:
    rows = [
        {"uri": f"/bad/{seed}-{k}", "etag": "e", "code": ["empty", "truncated"][k % 2], "detail": "d"}
        for k in range(count)
    ]
    return pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)


def test_a_tally_counts_its_rows():
    table = scored(100)
    tally = tally_of(table, bad(9), 1)
    positive = np.array(table["scores"].to_pylist(), np.float32)[:, 1]
    assert (tally.scored, tally.quarantined, tally.rows) == (100, 9, 109)
    assert tally.flagged == int((positive >= 0.5).sum())
    assert tally.labels == {label: table["label"].to_pylist().count(label) for label in LABELS}
    assert tally.codes == {"empty": 5, "truncated": 4}
    assert tally.score_bins == tuple(np.histogram(positive, SCORE_BINS, (0, 1))[0].tolist())
    best = np.argsort(-positive)[:TOP_ROWS]
    assert [row.uri for row in tally.top] == [table["uri"][int(k)].as_py() for k in best]
    assert tally.top[0].score == pytest.approx(positive.max())
    assert [row.code for row in tally.bad] == ["empty"] * BAD_ROWS_PER_CODE + ["truncated"] * BAD_ROWS_PER_CODE


def test_tallies_of_pieces_add_up_to_that_of_the_whole_in_any_order():
    pieces = [(scored(n, seed=n), bad(n % 4, seed=n)) for n in (0, 1, 17, 64, 300)]
    tallies = [tally_of(rows, failed, 1) for rows, failed in pieces]
    whole = tally_of(
        pa.concat_tables([rows for rows, _ in pieces]), pa.concat_tables([failed for _, failed in pieces]), 1
    )
    assert reduce(Tally.plus, tallies, Tally()) == whole
    assert reduce(Tally.plus, tallies[::-1], Tally()) == whole
    assert Tally.model_validate_json(whole.model_dump_json()) == whole


def test_without_takes_exactly_the_counts_away():
    kept, gone = tally_of(scored(50, seed=1), bad(3, seed=1), 1), tally_of(scored(40, seed=2), bad(5, seed=2), 1)
    both = kept.plus(gone)
    uris = set(scored(40, seed=2)["uri"].to_pylist()) | set(bad(5, seed=2)["uri"].to_pylist())
    left = both.without(gone, uris)
    for name in ("scored", "quarantined", "flagged", "labels", "codes", "score_bins"):
        assert getattr(left, name) == getattr(kept, name), name
    assert left.top == tuple(row for row in both.top if row.uri not in uris)
    assert {row.uri for row in left.bad} <= {row.uri for row in kept.bad}
    assert both.without(both, uris | set(scored(50, seed=1)["uri"].to_pylist())).labels == {}


def test_a_model_without_a_positive_label_is_told_by_its_best_score():
    table = scored(30)
    tally = tally_of(table, bad(0), None)
    assert tally.score_bins == tuple(score_bins(table["score"].to_numpy()).tolist())


def test_bins_hold_both_ends():
    assert score_bins(np.array([0, 1], np.float32)).tolist() == [1] + [0] * (SCORE_BINS - 2) + [1]


def test_psi_is_zero_for_equal_shapes_and_known_for_others():
    assert psi([10, 30], [100, 300]) == 0
    expected = (0.75 - 0.5) * math.log(0.75 / 0.5) + (0.25 - 0.5) * math.log(0.25 / 0.5)
    assert psi([50, 50], [75, 25]) == pytest.approx(expected)
    assert psi([75, 25], [50, 50]) == pytest.approx(expected)
    assert 0.25 < psi([100, 0], [0, 100]) < math.inf
    assert math.isnan(psi([0, 0], [1, 2]))


@pytest.mark.parametrize("count", [0, 1, 2, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 10_000])
def test_a_timeline_is_bounded_and_ends_with_the_newest_point(count):
    timeline = Timeline()
    for k in range(1, count + 1):
        timeline.add(float(k), 10 * k)
        assert len(timeline.points) <= MOST_POINTS
        assert timeline.points[-1] == (float(k), 10 * k)
    points = timeline.points
    assert list(points) == sorted(set(points))
    if count >= MOST_POINTS:
        assert len(points) >= MOST_POINTS // 2
        steps = np.diff([t for t, _ in points][:-1])
        assert steps.min() == steps.max()
