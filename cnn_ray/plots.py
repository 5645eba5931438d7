"""Charts of an evaluation or comparison as inline SVG, made of numbers alone; colours come from report.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cnn_ray.page import text

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 390, 10, 208
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line, or one cloud of dots, with a name for the legend and optionally a text per point."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "dots"] = "line"
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """What runs along one side of the chart."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Only whole numbers have ticks."""

    def share(self, value: float) -> float:
        """Where the value lies between the ends, 0 to 1; values beyond stay at the end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = (math.log10(max(v, 1e-12)) for v in (low, high, value))
        return min(max((at - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if self.log:
            first, last = math.floor(math.log10(max(self.low, 1e-12))), math.ceil(math.log10(max(self.high, 1e-12)))
            inside = [10.0**k for k in range(first, last + 1)]
            return [v for v in inside if self.low * 0.999 <= v <= self.high * 1.001] or [self.low, self.high]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 5)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_of(label: str, values: Sequence[float], *, log: bool = False, floor: float | None = None) -> Axis:
    """An axis that holds the values, with a little room; `floor` is where it begins at the latest."""
    good = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(good), max(good)) if good else ((1.0, 10.0) if log else (0.0, 1.0))
    if log:
        return Axis(label, low / 1.5, high * 1.5, log=True)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
    return Axis(label, low - room if floor is None else min(floor, low), high + room)


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis, *, diagonal: bool = False) -> str:
    """The chart with its legend, as HTML. `diagonal` draws the line where x equals y."""

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * x.share(point[0]), BOTTOM - (BOTTOM - TOP) * y.share(point[1])

    drawn = [_grid(x, y)]
    if diagonal:
        (x1, y1), (x2, y2) = at((x.low, x.low)), at((x.high, x.high))
        drawn.append(f'<line class="threshold" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for number, one in enumerate(series):
        colour = f"series-{number % COLOURS}"
        finite = [k for k, point in enumerate(one.points) if all(map(math.isfinite, point))]
        places = [at(one.points[k]) for k in finite]
        if one.kind == "line":
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            drawn.append(f'<polyline class="series {colour}" points="{path}"/>')
            continue
        for k, (a, b) in zip(finite, places, strict=True):
            drawn.append(f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>')
            if k < len(one.labels):
                anchor = "end" if a > (LEFT + RIGHT) * 0.6 else "start"
                shift = -7 if anchor == "end" else 7
                drawn.append(
                    f'<text x="{a + shift:.1f}" y="{b - 5:.1f}" text-anchor="{anchor}">{text(one.labels[k], 40)}</text>'
                )
    named = [s for s in series if s.name]
    legend = "".join(
        f'<span><span class="key series-{k % COLOURS}"></span>{text(s.name, 60)}</span>'
        for k, s in enumerate(series)
        if s in named
    )
    spoken = text(f"{title}: {', '.join(s.name for s in named)}", 300)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{"".join(drawn)}</svg>'
        f'<p class="soft legend">{legend}</p>'
    )


def _grid(x: Axis, y: Axis) -> str:
    parts = [f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>']
    for value in y.ticks():
        height = BOTTOM - (BOTTOM - TOP) * y.share(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{LEFT - 5}" y="{height + 3.5:.1f}" text-anchor="end">{number_text(value)}</text>'
        )
    for value in x.ticks():
        place = LEFT + (RIGHT - LEFT) * x.share(value)
        parts.append(f'<text x="{place:.1f}" y="{BOTTOM + 14}" text-anchor="middle">{number_text(value)}</text>')
    parts.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 32}" text-anchor="middle">{text(x.label, 60)}</text>'
        f'<text x="12" y="{(TOP + BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(TOP + BOTTOM) / 2})">{text(y.label, 60)}</text>'
    )
    return "".join(parts)


def number_text(value: float) -> str:
    """A number for an axis: 0.25, 20, 3k, 25M."""
    for power, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:g}{suffix}"
    return f"{round(value, 6):g}"


def heat_table(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The confusion matrix: rows are true classes, columns answers; shade is the share of the row."""
    head = "".join(f'<th scope="col" class="number">{text(name, 24)}</th>' for name in names)
    rows: list[str] = []
    for name, line in zip(names, counts, strict=True):
        total = max(sum(line), 1)
        cells = "".join(f'<td class="number heat" style="--share:{count / total:.3f}">{count:,}</td>' for count in line)
        rows.append(f'<tr><th scope="row">{text(name, 24)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">true \\ answered</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
