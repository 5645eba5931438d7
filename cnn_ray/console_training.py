"""What the terminal shows of trainings: findings of the guards, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from cnn_ray.compare_page import HEAD, table_cells
from cnn_ray.comparison_rows import ComparisonResult, Failure, Training
from cnn_ray.console import print_table, say
from cnn_ray.guards import Finding

if TYPE_CHECKING:
    from rich.console import Console


def print_findings(findings: Sequence[Finding], allow: Sequence[str], console: Console) -> None:
    """Prints each finding that is not allowed, in one line."""
    for finding in findings:
        if finding.guard not in allow:
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(Text.assemble((finding.severity, colour), " ", finding.sentence), soft_wrap=True)


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
    print_table(console, f"{result.images:,} images of {result.split}", [table_cells(r) for r in result.rows], HEAD)
    for failure in result.failures:
        say(console, f"{failure.variant}, seed {failure.seed}: failed. {failure.sentence}")
    say(console, f"Page: {result.page_uri}")
    say(console, f"JSON: {result.json_uri}")
    return result.failures[0].exit_code if result.failures else 0
