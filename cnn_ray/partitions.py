"""Date and model version <-> location. Hive-style names, so that DuckDB, Spark and Athena see them as columns."""

from __future__ import annotations

from datetime import date as Date
from datetime import timedelta

DATE_PLACEHOLDER = "{date}"


def partition_uri(output_uri: str, date: Date | None, model: str, version: int) -> str:
    """Location of one model version's results: `<output_uri>[/date=YYYY-MM-DD]/model=<name>/version=<v>`."""
    day = [] if date is None else [f"date={date.isoformat()}"]
    return "/".join([output_uri.rstrip("/") or "/", *day, f"model={model}", f"version={version}"])


def fill_date(uri: str, date: Date | None) -> str:
    """The location with `{date}` replaced by YYYY-MM-DD; unchanged where there is no date."""
    return uri if date is None else uri.replace(DATE_PLACEHOLDER, date.isoformat())


def look_back(today: Date, days: int, lag_days: int, first: Date | None = None) -> list[Date]:
    """The `days` dates that end `lag_days` before today, oldest first; none before `first`."""
    newest = today - timedelta(days=lag_days)
    dates = [newest - timedelta(days=back) for back in reversed(range(days))]
    return [date for date in dates if first is None or date >= first]
