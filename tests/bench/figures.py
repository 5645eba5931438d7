"""Marks of a run -> rates, the table of all contestants and the bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from material import Material, read_times
from processes import Run

Mark = tuple[float, int]
Results = dict[str, list["Result"]]

RATE_BARS = (
    ("local", "floor", 0.95),
    ("ray", "floor", 0.95),
    ("local", "daft", 2.0),
    ("local", "tf_data", 2.4),
    ("local", "ray_recipe", 4.0),
)
"""(contestant, against, at least): ratios of the median steady rates."""
CPU_BAR = 1.25
"""opencv_floor's CPU time per image over floor's, at least."""


@dataclass(frozen=True)
class Result:
    """One contestant in one round.

    `steady`: images/s from a tenth of the images on; flatters who decoded a lot before. `from_read`: all images, from
    the first read on, with the rest of the model's loading in it, None on a noatime mount. decode_ms and predict_ms:
    CPU of the two floors.
    """

    steady: float
    from_read: float | None
    wall_s: float
    cpu_ms: float
    decode_ms: float | None
    predict_ms: float | None

    @property
    def core_ms(self) -> float | None:
        """CPU ms of an image without start-up, where a floor measured it."""
        return None if self.decode_ms is None or self.predict_ms is None else self.decode_ms + self.predict_ms


def result_of(marks: list[Mark], material: Material, run: Run, found: dict[str, Any]) -> Result:
    """The figures of one run.

    Raises:
        RuntimeError: images are missing, or all results came at once.
    """
    if not marks or marks[-1][1] != material.count:
        raise RuntimeError(f"Expected {material.count} scored images. Received: {marks[-1][1] if marks else 0}.")
    first, last = next(mark for mark in marks if mark[1] >= material.settled), marks[-1]
    if first == last:
        raise RuntimeError(f"Expected results in several steps. Received: all {last[1]} at once. Raise --count.")
    reads = read_times(material)
    return Result(
        steady=(last[1] - first[1]) / max(last[0] - first[0], 1e-3),
        from_read=material.count / (last[0] - reads[0]) if reads else None,
        wall_s=run.wall_s,
        cpu_ms=1000 * run.cpu_s / material.count,
        decode_ms=found.get("decode_ms"),
        predict_ms=found.get("predict_ms"),
    )


def table(results: Results, count: int) -> list[str]:
    """One line a contestant, and what the floors' CPU time is made of."""
    head = f"{'':13} {'steady images/s':22} {'of floor':>8}  {'from first read':22} {'of floor':>8}  "
    rows = [f"{head}{'command to exit':>15} {'CPU ms/image':>13}"]
    for name, runs in results.items():
        cells = f"{name:13}"
        for rate in (_steady, _from_read):
            ratio = _ratio(results, name, "floor", rate)
            cells += f" {_spread(runs, rate):22} {'-' if ratio is None else f'{ratio:.2f}':>8} "
        wall, cpu = (statistics.median(figures) for figures in zip(*((r.wall_s, r.cpu_ms) for r in runs), strict=True))
        rows.append(f"{cells} {f'{wall:.1f} s':>15} {cpu:>13.1f}")
    for name, runs in results.items():
        if any(run.core_ms is not None for run in runs):
            decode, predict = _spread(runs, lambda r: r.decode_ms), _spread(runs, lambda r: r.predict_ms)
            rows.append(f"{name}'s CPU ms per image without start-up: decode {decode} + predict {predict}")
    return rows


def bars(results: Results) -> list[str]:
    """Each bar: reached or not, with the figure."""
    lines = []
    for name, other, least in RATE_BARS:
        ratio = _ratio(results, name, other, _steady)
        if ratio is not None:
            slow = _ratio(results, name, other, _from_read)
            also = "" if slow is None else f" ({slow:.2f} from the first read)"
            lines.append(f"bar: {name} at least {least:g} x {other}: {_verdict(ratio, least)}{also}")
    ratio = _ratio(results, "opencv_floor", "floor", lambda result: result.core_ms)
    if ratio is not None:
        lines.append(f"bar: CPU of opencv_floor at least {CPU_BAR:g} x floor's: {_verdict(ratio, CPU_BAR)}")
    return lines


def _verdict(ratio: float, least: float) -> str:
    return f"{'reached' if ratio >= least else 'NOT reached'}, {ratio:.2f}"


def _steady(result: Result) -> float | None:
    return result.steady


def _from_read(result: Result) -> float | None:
    return result.from_read


def _known(runs: list[Result], rate: Callable[[Result], float | None]) -> list[float]:
    return [figure for run in runs if (figure := rate(run)) is not None]


def _spread(runs: list[Result], rate: Callable[[Result], float | None]) -> str:
    figures = _known(runs, rate)
    return f"{statistics.median(figures):.1f} ({min(figures):.1f}-{max(figures):.1f})" if figures else "-"


def _ratio(results: Results, name: str, other: str, rate: Callable[[Result], float | None]) -> float | None:
    """Of the medians; None where one of the two did not run."""
    one, two = _known(results.get(name, []), rate), _known(results.get(other, []), rate)
    return statistics.median(one) / statistics.median(two) if one and two else None
