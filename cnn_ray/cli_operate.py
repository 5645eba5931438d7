"""The verbs that run every night: `nightly`, `nightly status`, `schedule install | show | remove`, `runs prune`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from datetime import date as Date
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cnn_ray.config import NightlyConfig, parse_date
from cnn_ray.errors import ConfigError
from cnn_ray.flags import config_flags, config_from_flags, shared_flags, stderr_console, stdout_console
from cnn_ray.flags import print_config as show_config

if TYPE_CHECKING:
    from cnn_ray.console import RowProgress
    from cnn_ray.nightly_status import DateState
    from cnn_ray.schedule import Kind
    from cnn_ray.score import Progress

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_HEADER = ("date", "state", "version", "what")

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
    from cnn_ray import nightly as job

    with _Progress() as progress:
        result = job.run_nightly(config, day, on_progress=progress.update)
    rows = [(r.date.isoformat(), r.state, _reference(r.version), " ".join((r.detail, *r.drift))) for r in result.dates]
    _print_wide(result.reference, rows, _HEADER)
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
    _print_wide("", [(s.date.isoformat(), s.state, _reference(s.version), s.detail) for s in states], _HEADER)


def _print_wide(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
    """Afterwards the table is printed; where there is no terminal, in lines that grep can use."""
    from cnn_ray import console as ui

    console = stdout_console()
    if not console.is_terminal:
        console.width = ui.LIST_WIDTH
    ui.print_table(console, title, list(rows), header)


def _reference(version: int | None) -> str:
    return "" if version is None else str(version)


def _date(text: str | None) -> Date | None:
    return None if text is None else parse_date(text, "--today")


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


@click.group()
def schedule() -> None:
    """Install, show and remove what starts `nightly`: a systemd timer, a cron line, or a Kubernetes cron job."""


def _kinds(command: CommandT) -> CommandT:
    for kind, text in (
        ("kuberay", "KubeRay's RayCronJob (alpha)."),
        ("kubernetes", "A plain Kubernetes CronJob."),
        ("cron", "Lines of the user's crontab."),
        ("systemd", "A systemd timer and service."),
    ):
        command = click.option(f"--{kind}", "kind", flag_value=kind, help=text)(command)
    return command


_name = click.option("--name", default="cnn-ray-nightly", show_default=True, help="What the schedule is called.")
_system = click.option("--system", "is_system", is_flag=True, help="A unit of the machine, not of this user.")


@schedule.command("install")
@_kinds
@click.option("--config", "config_file", metavar="FILE.yaml", required=True, help="The nightly configuration.")
@click.option("--at", default="02:00", show_default=True, metavar="HH:MM", help="When it starts, UTC.")
@_name
@_system
@click.option("--user", default="", help="--system: who runs it. [default: this user]")
@click.option("--image", metavar="IMAGE", help="Kubernetes: the image with this package.")
@click.option("--print/--yes", "print_only", default=True, help="Print it, or really install it. [default: print]")
def schedule_install(kind: Kind | None, config_file: str, name: str, print_only: bool, **settings: Any) -> None:
    """Print what would start nightly every night; with --yes, install it."""
    from cnn_ray import schedule as job

    chosen = _chosen(kind)
    made = job.schedule_of(config_file, name=_checked(name), **settings)
    if print_only:
        return click.echo(job.text_of(chosen, made).rstrip())
    return click.echo("\n".join(job.install(chosen, made)))


@schedule.command("show")
@_kinds
@_name
@_system
def schedule_show(kind: Kind | None, name: str, is_system: bool) -> None:
    """Show what is installed: of one kind, or of systemd and cron."""
    from cnn_ray import schedule as job

    kinds: tuple[Kind, ...] = ("systemd", "cron") if kind is None else (kind,)
    for one in kinds:
        try:
            found = job.installed(one, _checked(name), is_system=is_system)
        except ConfigError:
            if kind is not None:
                raise
            found = ""  # this machine has no such scheduler
        click.echo(found.rstrip() if found else f"{one}: nothing is installed as {name}.")


@schedule.command("remove")
@_kinds
@_name
@_system
@click.option("--yes", is_flag=True, help="Really remove it.")
def schedule_remove(kind: Kind | None, name: str, is_system: bool, yes: bool) -> None:
    """Remove what is installed; without --yes, say what that is."""
    from cnn_ray import schedule as job

    chosen = _chosen(kind)
    if yes:
        return click.echo("\n".join(job.remove(chosen, _checked(name), is_system=is_system)))
    found = job.installed(chosen, _checked(name), is_system=is_system)
    return click.echo(f"{found.rstrip()}\nWould be removed; --yes does it." if found else "Nothing is installed.")


def _chosen(kind: Kind | None) -> Kind:
    if kind is None:
        raise ConfigError(
            "Expected one of --systemd, --cron, --kubernetes, --kuberay. Received: none. Next: choose where it runs."
        )
    return kind


def _checked(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name):
        raise ConfigError(
            f"Expected lower-case letters, digits and - for --name. Received: {name!r}. Next: choose such a name."
        )
    return name


@click.command("prune")
@click.argument("output_uri", metavar="OUTPUT")
@click.option("--keep-days", type=click.IntRange(min=1), required=True, metavar="N", help="Younger ones are kept.")
@click.option("--yes", is_flag=True, help="Really remove them; without it they are only listed.")
@_today
def runs_prune(output_uri: str, keep_days: int, yes: bool, today: str | None) -> int | None:
    """Remove partitions below OUTPUT whose date and end are more than N days ago; by default only list them."""
    from cnn_ray import retention as job

    found = job.removable(output_uri, keep_days, _date(today) or datetime.now(UTC).date())
    if not found:
        return click.echo(f"No partition in {output_uri} is older than {keep_days} days.")
    rows: list[tuple[str, ...]] = []
    for one in found:
        done = ("removed" if job.remove(one) else "in use, kept") if yes else "would be removed"
        rows.append((done, one.date, one.finished_at, f"{one.rows:,}", f"{one.size_bytes / 1e6:,.1f}", one.uri))
    _print_wide("", rows, ("what", "date", "finished", "rows", "MB", "partition"))
    return None if yes else click.echo("Nothing was changed. Next: the same command with --yes.")
