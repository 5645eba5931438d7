"""What a check of the doctor says: a finding, its level, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table. `said` is what was seen; `mend` what to do, empty where all is well."""

    check: str
    level: Level
    said: str
    mend: str = ""


def ok(check: str, said: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, mend: str) -> Finding:
    """Something that may be meant, or hurts only some."""
    return Finding(check, "warning", said, mend)


def error(check: str, said: str, mend: str) -> Finding:
    """Something that will hurt: the doctor ends with exit code 2."""
    return Finding(check, "error", said, mend)


def exit_code(findings: Sequence[Finding]) -> int:
    """2 where a finding is an error, else 0."""
    return 2 if any(finding.level == "error" for finding in findings) else 0
