"""The verbs that hand jobs to a cluster: `submit score | train | evaluate | nightly | list | status | logs | stop`."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from datetime import date as Date
from typing import TYPE_CHECKING, Any

import click

from cnn_ray.config import (
    Config,
    EvaluateConfig,
    NightlyConfig,
    ScoreConfig,
    TrainConfig,
    load_yaml,
    merge_layers,
    parse_date,
)
from cnn_ray.flags import config_flags, config_from_flags, given_keys, stderr_console, stdout_console
from cnn_ray.flags import print_config as show_config

if TYPE_CHECKING:
    from cnn_ray.submit import JobKind, Submission
    from cnn_ray.submit_client import JobServer, JobState

_address = click.option(
    "--address",
    metavar="URL",
    help="Ray's job server, such as http://127.0.0.1:8265; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or here.",
)
_INTERRUPTED = 130


@click.group()
def submit() -> None:
    """Hand a job to a Ray cluster, at most once per partition and attempt, and watch it.

    The flags of a job are those of its own verb. Needs RAY_AUTH_MODE=token and the token where the cluster wants one.
    """


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--dry-run", is_flag=True, help="Check everything, say what would be submitted, submit nothing."),
        click.option("--print-config", is_flag=True, help="Print the resolved configuration as YAML and stop."),
        click.option("--requirements", metavar="FILE", help="Pins that each node installs; else its image has them."),
        click.option("--entrypoint-memory", type=int, default=0, metavar="BYTES", help="Memory of the entrypoint."),
        click.option("--entrypoint-num-gpus", type=float, default=0, metavar="X", help="GPUs of the entrypoint."),
        click.option(
            "--entrypoint-num-cpus",
            type=float,
            default=0,
            metavar="X",
            help="CPUs of the entrypoint; 0: head node.",
        ),
        click.option("--no-wait", is_flag=True, help="Return when it is submitted."),
        click.option("--follow", is_flag=True, help="Show the job's output as it comes."),
        click.option("--attempt", type=click.IntRange(min=1), default=1, help="Submit the same work once more."),
        _address,
        click.option("--config", "config_file", metavar="FILE.yaml", help="The job's YAML file; flags win."),
    ):
        command = option(command)
    return command


@submit.command("score")
@config_flags(ScoreConfig)
@_job_options
def submit_score(**flags: Any) -> int | None:
    """Submit `cnn-ray score`; ends with the job's own exit code."""
    return _submit("score", ScoreConfig, flags)


@submit.command("train")
@config_flags(TrainConfig)
@_job_options
def submit_train(**flags: Any) -> int | None:
    """Submit `cnn-ray train`; ends with the job's own exit code."""
    return _submit("train", TrainConfig, flags)


@submit.command("evaluate")
@config_flags(EvaluateConfig)
@_job_options
def submit_evaluate(**flags: Any) -> int | None:
    """Submit `cnn-ray evaluate`; ends with the job's own exit code."""
    return _submit("evaluate", EvaluateConfig, flags)


@submit.command("nightly")
@config_flags(NightlyConfig)
@click.option("--today", metavar="YYYY-MM-DD", help="Take this for today's UTC date.")
@_job_options
def submit_nightly(today: str | None, **flags: Any) -> int | None:
    """Submit `cnn-ray nightly`; ends with the job's own exit code."""
    return _submit("nightly", NightlyConfig, flags, today)


def _submit(kind: JobKind, config_class: type[Config], flags: dict[str, Any], today: str | None = None) -> int | None:
    own = {name: flags.pop(name) for name in ("config_file", "address", "attempt", "follow", "no_wait")}
    shown, dry, requirements = (flags.pop(name) for name in ("print_config", "dry_run", "requirements"))
    amounts = [flags.pop(f"entrypoint_{name}") for name in ("num_cpus", "num_gpus", "memory")]
    config = config_from_flags(config_class, own["config_file"], flags)
    if shown:
        return show_config(config)
    from cnn_ray.submit import Resources, submission_of

    document = merge_layers({} if own["config_file"] is None else load_yaml(own["config_file"]), given_keys(flags))
    submission = submission_of(kind, config, document, attempt=own["attempt"], today=_today(today))
    if dry:
        return click.echo(f"Would submit {submission.submission_id}: {submission.entrypoint}")
    server = _server(own["address"])
    earlier = server.submit(submission, Resources(*amounts), requirements)
    _say_submitted(submission, earlier, own["attempt"])
    if own["no_wait"]:
        return 0
    return _watch(server, submission.submission_id, follow=own["follow"])


def _say_submitted(submission: Submission, earlier: JobState | None, attempt: int) -> None:
    if earlier is None:
        return click.echo(f"Submitted: {submission.submission_id}")
    click.echo(
        f"Already submitted: {earlier.submission_id} is {earlier.status}. "
        f"Next: --attempt {attempt + 1} submits the same work once more."
    )
    return None


def _watch(server: JobServer, submission_id: str, *, follow: bool) -> int:
    from cnn_ray import console as ui

    console = stderr_console()
    try:
        state = server.watch(
            submission_id,
            write=(lambda text: click.echo(text, nl=False)) if follow else None,
            on_status=lambda state: ui.say(console, f"{state.submission_id}: {state.status}"),
        )
    except KeyboardInterrupt:
        click.echo(
            f"cnn-ray: the job {submission_id} goes on. "
            f"Next: cnn-ray submit logs {submission_id} --follow, or cnn-ray submit stop {submission_id}.",
            err=True,
        )
        return _INTERRUPTED
    if state.exit_code and not follow:
        ui.say(console, _reason(state))
    return state.exit_code


def _reason(state: JobState) -> str:
    from cnn_ray.redaction import redact

    return redact(state.message.strip()) or f"{state.submission_id}: {state.status}, exit code {state.exit_code}"


@submit.command("list")
@_address
def submit_list(address: str | None) -> None:
    """List the jobs that the cluster knows, newest first."""
    from cnn_ray.console import LIST_WIDTH, print_table

    found = _server(address).jobs()
    if not found:
        return click.echo("No jobs. Next: cnn-ray submit score --config FILE.yaml.")
    rows: list[tuple[str, ...]] = [
        (
            job.submission_id,
            job.status,
            str(job.exit_code) if job.ended else "",
            "" if job.start_time_ms is None else _time(job.start_time_ms),
            job.metadata.get("output", job.entrypoint[:60]),
        )
        for job in found
    ]
    console = stdout_console()
    if not console.is_terminal:
        console.width = LIST_WIDTH
    return print_table(console, "", rows, ("job", "status", "exit code", "started (UTC)", "output"))


@submit.command("status")
@click.argument("submission_id", metavar="JOB")
@_address
def submit_status(submission_id: str, address: str | None) -> int:
    """Say what JOB is doing; ends with its exit code, 0 while it runs."""
    state = _server(address).state(submission_id)
    click.echo(f"{state.submission_id}: {state.status}" + (f", exit code {state.exit_code}" if state.ended else ""))
    if state.exit_code:
        click.echo(_reason(state))
    return state.exit_code


@submit.command("logs")
@click.argument("submission_id", metavar="JOB")
@click.option("--follow", is_flag=True, help="Go on until the job ends, and end with its exit code.")
@_address
def submit_logs(submission_id: str, follow: bool, address: str | None) -> int:
    """Print what JOB has written."""
    server = _server(address)
    if follow:
        server.state(submission_id)
        return _watch(server, submission_id, follow=True)
    click.echo(server.logs(submission_id), nl=False)
    return 0


@submit.command("stop")
@click.argument("submission_id", metavar="JOB")
@_address
def submit_stop(submission_id: str, address: str | None) -> None:
    """Stop JOB as Ctrl-C would: what it has committed is kept."""
    if _server(address).stop(submission_id):
        return click.echo(f"Stopping: {submission_id}")
    return click.echo(f"Not running: {submission_id}")


def _server(address: str | None) -> JobServer:
    from cnn_ray.submit_client import JobServer, travels_in_clear

    server = JobServer(address)
    if travels_in_clear(server.address, os.environ.get("RAY_AUTH_MODE") == "token"):
        click.echo(
            f"cnn-ray: warning: the token goes to {server.address} unencrypted. "
            "Next: `ray dashboard cluster.yaml` opens a tunnel, then --address http://127.0.0.1:8265; or https.",
            err=True,
        )
    return server


def _today(given: str | None) -> Date:
    return datetime.now(UTC).date() if given is None else parse_date(given, "--today")


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
