"""The two charts of a report as inline SVG, made of numbers alone; colours and fonts come from report.css."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

MOST_INTERVALS = 60
WIDTH, HEIGHT = 400, 170
LEFT, RIGHT, TOP, BOTTOM = 34, 394, 8, 150


def histogram(bins: Sequence[int], before: Sequence[int], threshold: float | None) -> str:
    """Columns of the counts over equal bins of [0, 1], those of `before` as a line of steps. Logarithmic, because a
    night flags one screenshot in hundreds, and those are the ones that matter."""
    decades = max(1, math.ceil(math.log10(max(*bins, *before, 1) + 1)))
    wide = (RIGHT - LEFT) / len(bins)

    def y(count: int) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log10(count + 1) / math.log10(10**decades + 1)

    drawn = [
        f'<rect class="column" x="{LEFT + k * wide + 1:.1f}" y="{y(n):.1f}" width="{wide - 2:.1f}" '
        f'height="{BOTTOM - y(n):.1f}">'
        f"<title>{k / len(bins):.2f} to {(k + 1) / len(bins):.2f}: {n:,} rows</title></rect>"
        for k, n in enumerate(bins)
        if n
    ]
    if sum(before):
        steps = " ".join(
            f"{LEFT + k * wide:.1f},{y(n):.1f} {LEFT + (k + 1) * wide:.1f},{y(n):.1f}" for k, n in enumerate(before)
        )
        drawn.append(f'<polyline class="earlier" points="{steps}"/>')
    if threshold is not None:
        x = LEFT + (RIGHT - LEFT) * threshold
        drawn.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
    ticks = [(y(10**k), f"{10**k:,}" if k < 4 else f"1e{k}") for k in range(decades + 1)]
    marks = [(LEFT + (RIGHT - LEFT) * k / 5, f"{k / 5:g}") for k in range(6)]
    return _chart(f"Histogram of {sum(bins)} scores, rows on a logarithmic scale", ticks, marks, drawn)


def throughput(timeline: Sequence[tuple[float, int]]) -> str | None:
    """The rate between commits over time, from (seconds, rows committed by then); None where there are too few."""
    rates = commit_rates(timeline)
    if not rates:
        return None
    start_s, spent_s = timeline[0][0], timeline[-1][0] - timeline[0][0]
    most = _round_up(max(rate for _, _, rate in rates))

    def point(second: float, rate: float) -> str:
        x = LEFT + (RIGHT - LEFT) * (second - start_s) / spent_s
        return f"{x:.1f},{BOTTOM - (BOTTOM - TOP) * rate / most:.1f}"

    curve = " ".join(f"{point(a, rate)} {point(b, rate)}" for a, b, rate in rates)
    drawn = [
        f'<polygon class="area" points="{LEFT},{BOTTOM} {curve} {RIGHT},{BOTTOM}"/>',
        f'<polyline class="curve" points="{curve}"/>',
    ]
    ticks = [
        (BOTTOM - (BOTTOM - TOP) * k / 2, f"{most * k / 2:,.0f}" if most >= 20 else f"{most * k / 2:g}")
        for k in (0, 1, 2)
    ]
    middle = (LEFT + RIGHT) / 2
    marks = [(LEFT, duration(0)), (middle, duration(spent_s / 2)), (RIGHT - 12, duration(spent_s))]
    return _chart(f"Images per second over {duration(spent_s)}", ticks, marks, drawn)


def commit_rates(timeline: Sequence[tuple[float, int]]) -> list[tuple[float, float, float]]:
    """(from second, to second, images/s): neighbouring commits together, so that there are about MOST_INTERVALS."""
    if len(timeline) < 2:
        return []
    shortest = (timeline[-1][0] - timeline[0][0]) / MOST_INTERVALS
    rates: list[tuple[float, float, float]] = []
    at_s, rows = timeline[0]
    for k, (now_s, now_rows) in enumerate(timeline[1:], 2):
        if now_s > at_s and (now_s - at_s >= shortest or k == len(timeline)):
            rates.append((at_s, now_s, (now_rows - rows) / (now_s - at_s)))
            at_s, rows = now_s, now_rows
    return rates


def duration(seconds: float) -> str:
    """Seconds for people: 3.2 s, 41 min, 5.4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _round_up(value: float) -> float:
    """The next 1, 2, 4, 6 or 10 times a power of ten: its half is round too."""
    power = 10 ** math.floor(math.log10(max(value, 1e-3)))
    return next(step * power for step in (1, 2, 4, 6, 10, 20) if step * power >= value)


def _chart(
    spoken: str, ticks: Iterable[tuple[float, str]], marks: Iterable[tuple[float, str]], drawn: Iterable[str]
) -> str:
    """An inline SVG: lines with their texts at the heights `ticks`, texts below at `marks`, and what is drawn on it."""
    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        for y, text in ticks
    ]
    grid.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    below = [f'<text x="{x:.1f}" y="{BOTTOM + 14}" text-anchor="middle">{text}</text>' for x, text in marks]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">' + "".join(
        [*grid, *drawn, *below, "</svg>"]
    )
