# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""What a set of rows adds up to: counts, a histogram of scores, and the few rows worth showing. Sums are bounded.

A part's tally is taken from its own rows, so a resumed run adds up to the same as an undisturbed one, and the manifest
of a night holds what a report compares with the next: nobody reads ten million rows again for a histogram.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

SCORE_BINS = 20
"""Equal bins of [0, 1]; 1.0 falls into the last one."""
TOP_ROWS = 12
BAD_ROWS_PER_CODE = 3
PSI_MIN_SHARE = 1e-4
MOST_POINTS = 240


class TopRow(BaseModel):
    """One of the flagged rows with the highest score of the positive label."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uri: str
    etag: str
    label: str
    score: float


class BadRow(BaseModel):
    """One example of a quarantine code."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uri: str
    code: str
    detail: str


class Timeline:
    """At most MOST_POINTS points (seconds since the start, rows so far) of a run, however many shards it has."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int]] = []
        self._last: tuple[float, int] | None = None
        self._every = 1
        self._seen = 0

    def add(self, seconds: float, rows: int) -> None:
        """Afterwards this is the last point; when there are too many, every second of the older ones is dropped."""
        self._last = (round(seconds, 3), rows)
        self._seen += 1
        if self._seen % self._every == 0:
            self._kept.append(self._last)
            if len(self._kept) >= MOST_POINTS:
                self._kept = self._kept[1::2]
                self._every *= 2

    @property
    def points(self) -> tuple[tuple[float, int], ...]:
        """The points in order of time; the last one is the newest state."""
        if self._last is None or self._last in self._kept[-1:]:
            return tuple(self._kept)
        return (*self._kept, self._last)


class Tally(BaseModel):
    """Counts over rows, and examples. `score_bins` counts the positive label's score, or the best one without one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scored: int = 0
    quarantined: int = 0
    flagged: int = 0
    labels: dict[str, int] = {}
    codes: dict[str, int] = {}
    score_bins: tuple[int, ...] = (0,) * SCORE_BINS
    top: tuple[TopRow, ...] = ()
    bad: tuple[BadRow, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the plan that are accounted for."""
        return self.scored + self.quarantined

    def without(self, other: Tally, uris: set[str]) -> Tally:
        """The tally of what remains when the rows that `other` adds up are taken away; `uris` are theirs, as far as
        this tally shows them. All counts are exact; `top` and `bad` only get shorter, nobody reads all rows again."""
        return Tally(
            scored=self.scored - other.scored,
            quarantined=self.quarantined - other.quarantined,
            flagged=self.flagged - other.flagged,
            labels=_taken_away(self.labels, other.labels),
            codes=_taken_away(self.codes, other.codes),
            score_bins=tuple(a - b for a, b in zip(self.score_bins, other.score_bins, strict=True)),
            top=tuple(row for row in self.top if row.uri not in uris),
            bad=tuple(row for row in self.bad if row.uri not in uris),
        )

    def plus(self, other: Tally) -> Tally:
        """The tally of both sets of rows; the order of addition changes nothing."""
        return Tally(
            scored=self.scored + other.scored,
            quarantined=self.quarantined + other.quarantined,
            flagged=self.flagged + other.flagged,
            labels=_added(self.labels, other.labels),
            codes=_added(self.codes, other.codes),
            score_bins=tuple(a + b for a, b in zip(self.score_bins, other.score_bins, strict=True)),
            top=_best([*self.top, *other.top]),
            bad=_examples([*self.bad, *other.bad]),
        )


def tally_of(scored: pa.Table, quarantined: pa.Table, positive: int | None) -> Tally:
    """The tally of a part's rows (SCORE_SCHEMA) and its quarantined ones; `positive` is the index of the label that
    `flagged` is about, None where the model has none."""
    scores = _positive_scores(scored, positive)
    flagged = np.flatnonzero(scored["flagged"].to_numpy())
    best = flagged[np.argsort(-scores[flagged], kind="stable")[:TOP_ROWS]]
    top = scored.select(["uri", "etag", "label"]).take(pa.array(best)).to_pylist()
    return Tally(
        scored=scored.num_rows,
        quarantined=quarantined.num_rows,
        flagged=len(flagged),
        labels=dict(sorted(Counter(scored["label"].to_pylist()).items())),
        codes=dict(sorted(Counter(quarantined["code"].to_pylist()).items())),
        score_bins=tuple(score_bins(scores).tolist()),
        top=_best([TopRow(score=float(scores[k]), **row) for k, row in zip(best, top, strict=True)]),
        bad=_examples([BadRow(**row) for row in quarantined.select(["uri", "code", "detail"]).to_pylist()]),
    )


def score_bins(scores: np.ndarray) -> np.ndarray:
    """How many of the scores, float32 [N] in [0, 1], fall into each of the SCORE_BINS bins, int64 [SCORE_BINS]."""
    bins = np.minimum((scores * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
    return np.bincount(bins, minlength=SCORE_BINS)


def psi(bins_a: Sequence[int], bins_b: Sequence[int]) -> float:
    """Population stability index of two histograms over the same bins: sum of (b - a) ln(b / a) over their shares.

    0 for equal shapes; by the usual reading from 0.1 a shift worth a look, from 0.25 another population. A share below
    `PSI_MIN_SHARE` counts as that, so that one empty bin is no infinity; NaN where one side holds no rows at all.
    """
    a, b = np.asarray(bins_a, np.float64), np.asarray(bins_b, np.float64)
    if not a.sum() or not b.sum():
        return float("nan")
    a, b = np.maximum(a / a.sum(), PSI_MIN_SHARE), np.maximum(b / b.sum(), PSI_MIN_SHARE)
    return float(((b - a) * np.log(b / a)).sum())


def _positive_scores(scored: pa.Table, positive: int | None) -> np.ndarray:
    if positive is None or not scored.num_rows:
        return scored["score"].to_numpy()
    flat = scored["scores"].combine_chunks().flatten().to_numpy()
    return flat.reshape(scored.num_rows, -1)[:, positive]


def _added(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
    total = Counter(one)
    total.update(two)
    return dict(sorted(total.items()))


def _taken_away(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
    left = Counter(one)
    left.subtract(two)
    return {name: count for name, count in sorted(left.items()) if count}


def _best(rows: list[TopRow]) -> tuple[TopRow, ...]:
    return tuple(heapq.nsmallest(TOP_ROWS, rows, key=lambda row: (-row.score, row.uri)))


def _examples(rows: list[BadRow]) -> tuple[BadRow, ...]:
    kept: list[BadRow] = []
    count: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: (row.code, row.uri)):
        if count[row.code] < BAD_ROWS_PER_CODE:
            count[row.code] += 1
            kept.append(row)
    return tuple(kept)
