"""What a person sees in the terminal: progress and tables; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import TaskID

    from cnn_ray.score import ScoreResult

LOG_EVERY_S = 5.0


class RowProgress:
    """A progress bar on a terminal, a line every five seconds elsewhere (cron mails, job logs)."""

    def __init__(self, what: str, console: Console) -> None:
        self._what = what
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_s = 0.0

    def __enter__(self) -> RowProgress:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(self._what, total=None, note="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._last_s >= LOG_EVERY_S or done == total:
            self._last_s = time.monotonic()
            self._console.print(f"{self._what}: {done}/{total} {note}".rstrip(), markup=False, highlight=False)


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
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def say(console: Console, text: str) -> None:
    """Afterwards the text is on the console as it is: unwrapped, so that a path can be copied, and without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_score_result(result: ScoreResult, console: Console) -> None:
    """Afterwards the run's table is on the console, and where its Parquet lies."""
    manifest = result.manifest
    rows = [("rows planned", str(manifest.planned)), ("scored", str(manifest.scored))]
    rows += [(f"  label {label}", str(count)) for label, count in manifest.labels.items()]
    rows += [("flagged", str(manifest.flagged)), ("quarantined", str(manifest.quarantined))]
    rows += [(f"  {code}", str(count)) for code, count in manifest.codes.items()]
    if not result.already_done:
        rows += [("images/s", f"{result.images_per_s:.0f}")]
    print_table(console, f"{manifest.model}@{manifest.version}, {manifest.engine} {manifest.precision}", rows)
    if result.already_done:
        say(console, "Already scored: nothing was left to do.")
        if result.unplanned:
            say(console, f"{result.unplanned} new or changed objects are in the input; score them into another OUTPUT.")
    elif result.resumed_rows:
        say(console, f"{result.resumed_rows} rows were kept from an earlier attempt.")
    say(console, f"Parquet: {result.partition_uri}")


def print_epoch(metrics: Mapping[str, Any], console: Console) -> None:
    """Afterwards one line about the epoch is on the console."""
    shown = " ".join(f"{k}={v:.4g}" for k, v in metrics.items() if isinstance(v, float))
    say(console, f"{metrics.get('phase', 'train')} epoch {metrics.get('epoch', '?')}: {shown}")
