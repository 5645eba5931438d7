"""Date and model version <-> location. Hive-style names, so that DuckDB, Spark and Athena see them as columns."""

from __future__ import annotations

import re
from datetime import date as Date
from datetime import timedelta

PLACEHOLDERS = ("date", "year", "month", "day")
"""What an input may hold in braces: YYYY-MM-DD, or parts of it with leading zeros."""

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_OF_EACH_DAY = ({"date"}, {"year", "month", "day"})


def partition_uri(output_uri: str, date: Date | None, model: str, version: int) -> str:
    """Location of one model version's results: `<output_uri>[/date=YYYY-MM-DD]/model=<name>/version=<v>`."""
    day = [] if date is None else [f"date={date.isoformat()}"]
    return "/".join([output_uri.rstrip("/") or "/", *day, f"model={model}", f"version={version}"])


def placeholders(uri: str) -> set[str]:
    """Return which of `PLACEHOLDERS` the location of an input holds.

    Raises:
        ValueError: it holds another name in braces, or a brace alone.
    """
    found: set[str] = set()
    for token in _TOKEN.finditer(uri):
        if token[0] in ("{{", "}}"):
            continue
        if token[1] not in PLACEHOLDERS:
            allowed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(
                f"Expected {allowed} in INPUT, and a brace that belongs to a name written twice ({{{{ or }}}}). "
                f"Received: {token[0]}."
            )
        found.add(token[1])
    return found


def differs_by_day(uri: str) -> bool:
    """Return whether each date has an input of its own."""
    found = placeholders(uri)
    return any(needed <= found for needed in _OF_EACH_DAY)


def fill_date(uri: str, date: Date | None) -> str:
    """Return the location with placeholders filled in (where there is a date) and doubled braces as single ones."""
    values: dict[str | None, str] = {}
    if date is not None:
        values = {"date": date.isoformat(), "year": f"{date:%Y}", "month": f"{date:%m}", "day": f"{date:%d}"}
    doubled = {"{{": "{", "}}": "}"}
    return _TOKEN.sub(lambda token: doubled.get(token[0]) or values.get(token[1], token[0]), uri)


def dateless_root(uri: str) -> str | None:
    """Return the folder above the first placeholder, which is there on every day; None where there is no such folder.

    A location without placeholders is its own.
    """
    first = next((token for token in _TOKEN.finditer(uri) if token[1] in PLACEHOLDERS), None)
    if first is None:
        return fill_date(uri, None)
    head, slash, _ = uri[: first.start()].rpartition("/")
    if head in ("s3:", "s3:/"):
        return None
    return fill_date(head, None) or slash or "."


def look_back(today: Date, days: int, lag_days: int, first: Date | None = None) -> list[Date]:
    """The `days` dates that end `lag_days` before today, oldest first; none before `first`."""
    newest = today - timedelta(days=lag_days)
    dates = [newest - timedelta(days=back) for back in reversed(range(days))]
    return [date for date in dates if first is None or date >= first]
