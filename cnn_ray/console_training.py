"""What the terminal shows of trainings: findings of the guards, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cnn_ray.compare_page import spread_text
from cnn_ray.comparison_rows import ComparisonResult, Failure, Row, Training
from cnn_ray.console import plain, say
from cnn_ray.guards import Finding
from cnn_ray.plots import number_text

if TYPE_CHECKING:
    from rich.console import Console


SHORT_HEAD = ("variant", "params", "top-1", "top-3", "top-5", "loss", "train s", "img/s", "MB")
"""What fits into 80 columns; the page has the rest."""


def print_findings(findings: Sequence[Finding], allow: Sequence[str], console: Console) -> None:
    """Prints each finding that is not allowed, in one line."""
    for finding in findings:
        if finding.guard not in allow:
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(Text.assemble((finding.severity, colour), " ", plain(finding.sentence)), soft_wrap=True)


def print_training(event: Training | Failure | str, console: Console) -> None:
    """Prints what a comparison began or finished, in one line."""
    if isinstance(event, Training):
        text = f"{event.variant}, seed {event.seed}: {event.reference}, top-1 {event.top_k['1']:.3f} on {event.split}"
    elif isinstance(event, Failure):
        text = f"{event.variant}, seed {event.seed}: failed. {event.sentence}"
    else:
        text = event
    say(console, text)


def print_comparison(result: ComparisonResult, console: Console) -> int:
    """The exit code, after printing the table: that of the first training that failed, else 0."""
    table = Table(
        title=f"{result.images:,} images of {result.split}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for k, name in enumerate(SHORT_HEAD):
        table.add_column(
            name, justify="right" if k else "left", overflow="fold", no_wrap=k > 0, min_width=0 if k else 12
        )
    for row in result.rows:
        table.add_row(*map(escape, _short_cells(row)))
    console.print(table)
    for failure in result.failures:
        say(console, f"{failure.variant}, seed {failure.seed}: failed. {failure.sentence}")
    say(console, f"Page: {result.page_uri}")
    say(console, f"JSON: {result.json_uri}")
    return result.failures[0].exit_code if result.failures else 0


def _short_cells(row: Row) -> tuple[str, ...]:
    parameters = number_text(float(f"{row.parameters:.3g}"))
    others = [f"{row.top_k[k].mean:.3f}" if k in row.top_k else "–" for k in ("3", "5")]
    speed = "–" if row.cpu_images_per_s is None else f"{row.cpu_images_per_s:,.0f}"
    means = (f"{row.log_loss.mean:.3f}", f"{row.train_s.mean:.0f}", speed, f"{row.size_bytes / 1e6:.1f}")
    return (row.variant, parameters, spread_text(row.top_k["1"]).replace(" ", ""), *others, *means)
