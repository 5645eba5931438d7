"""What the terminal shows of trainings: findings of the guards, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from cnn_ray.guards import Finding

if TYPE_CHECKING:
    from rich.console import Console


def print_findings(findings: Sequence[Finding], allow: Sequence[str], console: Console) -> None:
    """Prints each finding that is not allowed, in one line."""
    for finding in findings:
        if finding.guard not in allow:
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(Text.assemble((finding.severity, colour), " ", finding.sentence), soft_wrap=True)
