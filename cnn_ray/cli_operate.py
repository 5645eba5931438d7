"""The verbs that run every night: `nightly`, `nightly status`, `schedule install | show | remove`, `runs prune`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from datetime import date as Date
from typing import TYPE_CHECKING, Any

import click

from cnn_ray.config import NightlyConfig
from cnn_ray.errors import ConfigError
from cnn_ray.flags import config_flags, config_from_flags, shared_flags, stderr_console, stdout_console
from cnn_ray.flags import print_config as show_config

if TYPE_CHECKING:
    from cnn_ray.console import RowProgress
    from cnn_ray.nightly_status import DateState
    from cnn_ray.score import Progress

_today = click.option("--today", metavar="YYYY-MM-DD", help="Take this for today's UTC date.")


@click.group(invoke_without_command=True)
@config_flags(NightlyConfig)
@shared_flags
@_today
@click.pass_context
def nightly(
    context: click.Context,
    config_file: str | None,
    print_config: bool,
    dry_run: bool,
    today: str | None,
    **flags: Any,
) -> int | None:
    """Score every date of the look-back window that owes a run; missed nights heal.

    Ends with 0 where nothing is owed, 75 to be called again, 4 where a date is over the quarantine limit.
    """
    if context.invoked_subcommand is not None:
        context.obj = (config_file, flags, today)
        return None
    config, day = config_from_flags(NightlyConfig, config_file, flags), _date(today)
    if print_config:
        return show_config(config)
    if dry_run:
        from cnn_ray.nightly_calendar import foresee

        now = datetime.now(UTC)
        return _print_calendar(foresee(config, day or now.date(), now))
    from cnn_ray import console as ui
    from cnn_ray import nightly as job

    with _Progress() as progress:
        result = job.run_nightly(config, day, on_progress=progress.update)
    rows = [(r.date.isoformat(), r.state, _reference(r.version), " ".join((r.detail, *r.drift))) for r in result.dates]
    ui.print_table(stdout_console(), result.reference, rows, ("date", "state", "version", "what"))
    return result.exit_code


@nightly.command("status")
@click.option("--config", "config_file", metavar="FILE.yaml", help="The configuration of the nightly runs.")
@_today
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def nightly_status(
    outer: tuple[str | None, dict[str, Any], str | None], config_file: str | None, today: str | None, as_json: bool
) -> None:
    """Show the dates of the look-back window: done, owed, running, failed."""
    file, flags, day = outer
    config = config_from_flags(NightlyConfig, config_file or file, flags)
    from cnn_ray import console as ui
    from cnn_ray.nightly_calendar import calendar
    from cnn_ray.nightly_status import read_status

    states = calendar(config, _date(today or day) or datetime.now(UTC).date())
    call = read_status(config.score.output_uri).models.get(config.score.model.partition("@")[0])
    last = None if call is None else call.last_call
    if as_json:
        dates = [
            {"date": s.date.isoformat(), "state": s.state, "version": s.version, "detail": s.detail} for s in states
        ]
        told = {"dates": dates, "last_call": None if last is None else last.model_dump()}
        return click.echo(json.dumps(told, indent=2))
    _print_calendar(states)
    if last is not None:
        ended = "no end yet" if last.exit_code is None else f"ended {last.finished_at} with exit code {last.exit_code}"
        ui.say(stdout_console(), f"Last call: {last.reference} on {last.host}, begun {last.started_at}, {ended}.")
    return None


def _print_calendar(states: list[DateState]) -> None:
    from cnn_ray import console as ui

    rows: list[tuple[str, ...]] = [(s.date.isoformat(), s.state, _reference(s.version), s.detail) for s in states]
    ui.print_table(stdout_console(), "", rows, ("date", "state", "version", "what"))


def _reference(version: int | None) -> str:
    return "" if version is None else str(version)


def _date(text: str | None) -> Date | None:
    if text is None:
        return None
    try:
        return Date.fromisoformat(text) if len(text) == 10 else Date.fromisoformat("")
    except ValueError:
        raise ConfigError(
            f"Expected a date like 2026-11-23 for --today. Received: {text!r}. Next: correct it."
        ) from None


class _Progress:
    """One progress line after the other: each date has its own."""

    def __init__(self) -> None:
        self._date: Date | None = None
        self._bar: RowProgress | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = None

    def update(self, date: Date, progress: Progress) -> None:
        """Shows how far the date is."""
        if date != self._date or self._bar is None:
            from cnn_ray.console import RowProgress

            self.__exit__()
            self._date, self._bar = date, RowProgress(f"{date} scored", stderr_console()).__enter__()
        self._bar.update(progress.rows, progress.planned, progress.quarantined)
