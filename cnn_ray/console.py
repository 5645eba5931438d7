"""What a person sees in the terminal: progress and tables; plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from cnn_ray.input_filters import describe_left_out

if TYPE_CHECKING:
    from rich.progress import TaskID

    from cnn_ray.generations import Changes
    from cnn_ray.manifests import Manifest
    from cnn_ray.runs import RunDiff, RunSummary
    from cnn_ray.score import ScoreResult

LIST_WIDTH = 200
LOG_EVERY_S = 5.0
RATE_WINDOW_S = 30.0


class RecentRate:
    """Rows per second of late. It begins with the first count that it is told of: rows that an earlier attempt
    committed are not work of this one, and neither is what ran faster or slower half an hour ago."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, done: int) -> None:
        """`done` rows are done at this second of a monotonic clock."""
        self._points.append((now_s, done))
        while len(self._points) > 2 and self._points[1][0] <= now_s - RATE_WINDOW_S:
            self._points.popleft()

    def per_s(self, now_s: float) -> float | None:
        """Rows per second now, None before it can be known. Shards come in bursts, so a silence as long as the longest
        between two of them says nothing; a longer one lowers the rate."""
        if len(self._points) < 2:
            return None
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        times = [second for second, _ in self._points]
        pause = max(b - a for a, b in pairwise(times))
        spent = max(last_s, now_s - pause) - first_s
        return (last - first) / spent if spent > 0 else None


class RowProgress:
    """A progress bar on a terminal; elsewhere (cron mails, job logs) a line every few seconds and a last one."""

    def __init__(self, what: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._console = console
        self._clock = clock
        self._rate = RecentRate()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_s = -math.inf
        self._state: tuple[int, int, int | None] = (0, 0, None)
        self._unsaid = False

    def __enter__(self) -> RowProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                _NoteColumn(self._note),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._unsaid:
            self._say()

    def update(self, done: int, total: int, quarantined: int | None = None) -> None:
        """Shows that `done` of `total` rows are done, those of an earlier attempt included: the first call may tell of
        them alone, and rate and time left come from what follows."""
        now_s = self._clock()
        self._state = (done, total, quarantined)
        self._rate.add(now_s, done)
        self._unsaid = True
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif now_s - self._last_s >= LOG_EVERY_S or done == total:
            self._say()

    def _say(self) -> None:
        self._last_s = self._clock()
        self._unsaid = False
        say(self._console, f"{self._what}: {self._note()}")

    def _note(self) -> str:
        """`12,800/100,000, 52 images/s, 3 quarantined, 0:27:57 left`; what is not known yet is left out."""
        done, total, quarantined = self._state
        if not total:
            return "starting"
        said = [f"{done:,}/{total:,}"]
        rate = self._rate.per_s(self._clock())
        if rate is not None:
            said.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s")
        if quarantined is not None:
            said.append(f"{quarantined:,} quarantined")
        if rate and done < total:
            said.append(f"{timedelta(seconds=round((total - done) / rate))} left")
        return ", ".join(said)


class _NoteColumn(ProgressColumn):
    """The note as it is now: drawn anew with the bar, so that the time left moves while no row comes."""

    def __init__(self, note: Callable[[], str]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._note = note

    def render(self, task: Task) -> Text:  # noqa: ARG002 - Progress asks for each task, and there is one
        """See `ProgressColumn.render`."""
        return Text(self._note())


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Says what is waited for: a spinner on a terminal, one line elsewhere."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        say(console, text)
        yield


def print_table(console: Console, title: str, rows: list[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Afterwards the table is on the console; cells are shown as they are, also where they look like markup."""
    table = Table(title=title, title_justify="left", show_header=bool(header))
    for column in header or [""] * (len(rows[0]) if rows else 1):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(plain(cell)) for cell in row))
    console.print(table)


def say(console: Console, text: str) -> None:
    """Afterwards the text is on the console as it is: unwrapped, so that a path can be copied, and without markup."""
    console.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """The text with what does not print spelled out: file names come from outside and may hold terminal commands."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)


def describe_changes(changes: Changes) -> str:
    """`3 new, 1 changed and 0 retried objects; 2 removed ones keep their rows`."""
    said = f"{changes.new} new, {changes.changed} changed and {changes.retried} retried objects"
    return said + (f"; {changes.removed} removed ones keep their rows" if changes.removed else "")


def print_score_result(result: ScoreResult, console: Console) -> None:
    """Afterwards the run's table is on the console, and where its Parquet lies."""
    manifest = result.manifest
    rows = [("rows planned", str(manifest.planned)), ("scored", str(manifest.scored))]
    rows += [(f"  label {label}", str(count)) for label, count in manifest.labels.items()]
    rows += [("flagged", str(manifest.flagged)), ("quarantined", str(manifest.quarantined))]
    rows += [(f"  {code}", str(count)) for code, count in manifest.codes.items()]
    if manifest.left_out and not result.already_done:
        rows += [("left out of INPUT", str(sum(manifest.left_out.values())))]
        rows += [(f"  {reason}", str(count)) for reason, count in manifest.left_out.items()]
    if not result.already_done:
        rows += [("images/s", f"{result.images_per_s:.0f}")]
    print_table(console, f"{manifest.model}@{manifest.version}, {manifest.engine} {manifest.precision}", rows)
    if not result.already_done:
        say_left_out(manifest.left_out, console)
    if result.already_done:
        say(console, "Already scored: nothing was left to do.")
        if result.changes.removed:
            say(console, f"{result.changes.removed} recorded objects are no longer in the input; their rows stay.")
    elif result.resumed_rows:
        say(console, f"{result.resumed_rows} rows were kept from an earlier attempt.")
    elif manifest.generation > 1:
        say(console, f"Generation {manifest.generation}: {describe_changes(result.changes)}.")
    say(console, f"Parquet: {result.partition_uri}")
    if not result.already_done and result.attempt.wait_share is not None:
        say(console, f"Predictors waited {result.attempt.wait_share:.0%} of their time for images.")
    if result.report_uri is not None:
        print_report(result.report_uri, console)


def say_left_out(counts: Mapping[str, int], console: Console) -> None:
    """Say on the console what lies in the input and is no image to be scored; nothing where there is none."""
    if counts:
        say(console, f"Left out of INPUT: {describe_left_out(counts)}.")


def print_report(uri: str, console: Console) -> None:
    """Afterwards the console says where the run's report lies."""
    say(console, f"Report: {uri}")


def print_runs(found: Sequence[RunSummary], console: Console) -> None:
    """Afterwards one line per partition is on the console."""
    rows: list[tuple[str, ...]] = []
    for run in found:
        m, status = run.manifest, run.status
        if run.open_generation is not None and m is not None:
            status += f", generation {run.open_generation} open"
        counts = ("", "", "", "", "") if m is None else _counts(m)
        rows.append((run.date, f"{run.model}@{run.version}", status, *counts))
    header = ("date", "model", "status", "generation", "rows", "quarantined", "flagged", "finished")
    if not console.is_terminal:
        console.width = LIST_WIDTH  # for grep: no cell is broken
    print_table(console, "", rows, header)


def _counts(manifest: Manifest) -> tuple[str, str, str, str, str]:
    numbers = (manifest.generation, manifest.scored, manifest.quarantined, manifest.flagged)
    first, second, third, fourth = (f"{number:,}" for number in numbers)
    return first, second, third, fourth, manifest.finished_at


def print_manifest(manifest: Manifest, console: Console) -> None:
    """Afterwards the manifest's totals and its generations are on the console."""
    rows = [("status", manifest.status), ("rows", f"{manifest.planned:,}"), ("scored", f"{manifest.scored:,}")]
    rows += [(f"  label {label}", f"{count:,}") for label, count in manifest.labels.items()]
    rows += [("flagged", f"{manifest.flagged:,}"), ("quarantined", f"{manifest.quarantined:,}")]
    rows += [(f"  {code}", f"{count:,}") for code, count in manifest.codes.items()]
    rows += [("left out of the input", f"{sum(manifest.left_out.values()):,}")] if manifest.left_out else []
    rows += [(f"  {reason}", f"{count:,}") for reason, count in manifest.left_out.items()]
    rows += [("accepted", f"{manifest.accepted:,}"), ("removed from the input", f"{manifest.removed:,}")]
    print_table(console, f"{manifest.model}@{manifest.version}, {manifest.engine} {manifest.precision}", rows)
    generations = [
        (
            str(g.generation),
            f"{g.planned:,}",
            f"{g.superseded:,}",
            f"{g.quarantined:,}",
            str(g.parts),
            f"{g.images_per_s:,.0f}",
            g.finished_at,
        )
        for g in manifest.generations
    ]
    header = ("generation", "rows", "of them newer", "quarantined", "parts", "images/s", "finished")
    print_table(console, "", generations, header)


def print_diff(found: RunDiff, console: Console) -> None:
    """Afterwards the comparison is on the console: counts, label changes, score shift, and the rows that moved most."""
    rows = [("shared", f"{found.shared:,}"), ("only in A", f"{found.only_a:,}"), ("only in B", f"{found.only_b:,}")]
    rows += [("of other bytes", f"{found.other_etag:,}"), ("labels changed", f"{found.changed_labels:,}")]
    rows += [("newly flagged", f"{found.newly_flagged:,}"), ("no longer flagged", f"{found.no_longer_flagged:,}")]
    if found.shift_mean is not None and found.psi is not None:
        rows += [("mean shift", f"{found.shift_mean:+.4f}"), ("PSI", f"{found.psi:.3f} ({reading_of_psi(found.psi)})")]
        rows += [(f"shift {name}", f"{value:+.4f}") for name, value in found.shift_quantiles.items()]
    say(console, f"A: {found.a}")
    say(console, f"B: {found.b}")
    print_table(console, f"score of {found.score}", rows)
    labels = sorted(set(found.label_changes) | {name for row in found.label_changes.values() for name in row})
    matrix = [(a, *(f"{found.label_changes.get(a, {}).get(b, 0):,}" for b in labels)) for a in labels]
    if matrix:
        print_table(console, "labels: A down, B across", matrix, ("", *labels))
    moved = [
        (row.uri, f"{row.label_a} {row.score_a:.3f}", f"{row.label_b} {row.score_b:.3f}") for row in found.most_changed
    ]
    if moved:
        print_table(console, "most changed", moved, ("uri", "A", "B"))


def reading_of_psi(value: float) -> str:
    """The usual reading of a population stability index."""
    if value < 0.1:
        return "no shift to speak of"
    return "a shift worth a look" if value < 0.25 else "another population"


def print_lines(lines: Sequence[str], console: Console) -> None:
    """Print sentences, one a line, as they are."""
    for line in lines:
        console.print(Text(plain(line)), soft_wrap=True)


def print_epoch(metrics: Mapping[str, Any], console: Console) -> None:
    """Afterwards one line about the epoch is on the console."""
    shown = " ".join(f"{k}={v:.4g}" for k, v in metrics.items() if isinstance(v, float))
    say(console, f"{metrics.get('phase', 'train')} epoch {metrics.get('epoch', '?')}: {shown}")
