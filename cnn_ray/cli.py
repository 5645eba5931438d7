"""The command line: verbs and exit codes only. Each verb builds one configuration and calls one function."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

import cnn_ray
from cnn_ray.cli_doctor import doctor
from cnn_ray.cli_models import compare, evaluate, model
from cnn_ray.cli_operate import nightly, runs_prune, schedule
from cnn_ray.cli_serve import keys, serve
from cnn_ray.cli_submit import submit
from cnn_ray.config import ScoreConfig, TrainConfig
from cnn_ray.errors import CnnRayError
from cnn_ray.flags import config_flags, config_from_flags, shared_flags, stderr_console, stdout_console
from cnn_ray.flags import print_config as show_config
from cnn_ray.machine_errors import explain_machine_error
from cnn_ray.redaction import RedactingFormatter, redact

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 bug, 2 usage, 3 artifact, 4 quarantine, 75 try again, 130 Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    _write_anything()
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.exit(_exit_code(lambda: commands.main(arguments, prog_name="cnn-ray", standalone_mode=False)))


def _write_anything() -> None:
    """Let standard output and error take every text: what a terminal's encoding lacks is escaped, not an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the rest of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        result = run()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except CnnRayError as error:
        return _failed(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("cnn-ray: Interrupted. Run the same command to continue.", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `cnn-ray model list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("CNN_RAY_DEBUG"):
            raise
        known = explain_machine_error(error)
        if known is not None:
            return _failed(known)
        reason = redact(" ".join(str(error).split()))[:300]
        click.echo(
            f"cnn-ray: Internal error ({type(error).__name__}: {reason}). "
            "Run again with CNN_RAY_DEBUG=1 and report the output.",
            err=True,
        )
        return 1


def _failed(error: CnnRayError) -> int:
    with contextlib.suppress(OSError):  # what standard output still holds does not fit on a full disk
        click.echo(f"cnn-ray: {redact(str(error))}", err=True)
    return error.exit_code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(cnn_ray.__version__, prog_name="cnn-ray")
def commands() -> None:
    """Scores screenshot collections with CNN classifiers into Parquet, exactly once; trains and serves the models."""


@commands.command()
@config_flags(ScoreConfig, positional=("input_uri", "output_uri"))
@shared_flags
def score(config_file: str | None, print_config: bool, dry_run: bool, **flags: Any) -> None:
    """Score every image in INPUT into Parquet under OUTPUT, exactly once.

    INPUT is a folder, an s3:// prefix, or a manifest (.csv, .jsonl, .parquet); OUTPUT is a folder or s3:// prefix.
    Run the same command again after anything: it goes on where it stopped, and a finished run is a no-op.
    """
    config = config_from_flags(ScoreConfig, config_file, flags)
    if print_config:
        return show_config(config)
    from cnn_ray import console as ui
    from cnn_ray import score as job

    if dry_run:
        plan = job.dry_run(config)
        click.echo(
            f"Would {'finish' if plan.resumes else 'score'} {plan.rows} objects ({plan.bytes / 1e6:.1f} MB) in "
            f"{plan.shards} shards with {plan.engine} {plan.precision} into {plan.partition_uri}"
        )
        if plan.generation > 1 and not plan.resumes:
            click.echo(f"Generation {plan.generation}: {ui.describe_changes(plan.changes)}.")
        ui.say_left_out(plan.left_out, stdout_console())
        return None
    with ui.RowProgress("scored", stderr_console()) as bar:
        result = job.run_score(config, lambda p: bar.update(p.rows, p.planned, p.quarantined))
    ui.print_score_result(result, stdout_console())
    return None


@commands.command()
@config_flags(TrainConfig)
@shared_flags
@click.option("--resume", "resume_uri", metavar="RUN", help="Go on with an unfinished run, as it was configured.")
@click.option(
    "--preview-augmentation", "preview", metavar="FILE.png", help="Draw examples of the augmentation and stop."
)
def train(
    config_file: str | None,
    print_config: bool,
    dry_run: bool,
    resume_uri: str | None,
    preview: str | None,
    **flags: Any,
) -> None:
    """Train a classifier on labelled images with Ray Train and write it as the next version of a model."""
    from cnn_ray import console as ui
    from cnn_ray import train as job
    from cnn_ray.console_training import print_findings

    if resume_uri is not None:
        config = job.resumed_config(resume_uri, config_file, flags)
    else:
        config = config_from_flags(TrainConfig, config_file, flags)
    if print_config:
        return show_config(config)
    console = stderr_console()
    if preview is not None:
        from cnn_ray.preview import draw_augmentation

        return click.echo(f"Examples of augmentation {config.model.augmentation}: {draw_augmentation(config, preview)}")
    if dry_run:
        rehearsal = job.dry_run(config)
        ui.print_lines(rehearsal.data, console)
        print_findings(rehearsal.findings, config.allow, console)
        return click.echo(rehearsal.sentence)
    with ui.waiting(console, f"Training {config.model.architecture} with {config.num_workers} workers: Ray starts"):
        result = job.run_training(
            config,
            on_epoch=lambda metrics: ui.print_epoch(metrics, console),
            on_finding=lambda finding: print_findings([finding], config.allow, console),
            on_data=lambda lines: ui.print_lines(lines, console),
            resume_uri=resume_uri,
        )
    return click.echo(f"Model: {result.reference} in {result.artifact_uri}")


@commands.command()
@click.argument("folder", default=".", metavar="[FOLDER]")
def demo(folder: str) -> None:
    """Draw screenshots, train on them, score unseen ones: the whole line in FOLDER, with nothing but this package."""
    from cnn_ray.demo import run_demo

    run_demo(folder, stdout_console(), stderr_console())


commands.add_command(model)
commands.add_command(evaluate)
commands.add_command(compare)
commands.add_command(keys)
commands.add_command(serve)
commands.add_command(nightly)
commands.add_command(schedule)
commands.add_command(doctor)
commands.add_command(submit)


@commands.group()
def runs() -> None:
    """List, show, compare and compact scored partitions."""


@runs.command("list")
@click.argument("output_uri", metavar="OUTPUT")
def runs_list(output_uri: str) -> None:
    """List the partitions below OUTPUT."""
    from cnn_ray import console as ui
    from cnn_ray import runs as job

    found = job.list_runs(output_uri)
    if not found:
        click.echo(f"No runs in {output_uri}. Next: cnn-ray score INPUT OUTPUT --model NAME@VERSION.")
        return
    ui.print_runs(found, stdout_console())


@runs.command("show")
@click.argument("partition_uri", metavar="PARTITION")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def runs_show(partition_uri: str, as_json: bool) -> None:
    """Show what the newest manifest of PARTITION says."""
    from cnn_ray import console as ui
    from cnn_ray import runs as job

    manifest = job.show_run(partition_uri)
    if as_json:
        return click.echo(manifest.model_dump_json(indent=2))
    return ui.print_manifest(manifest, stdout_console())


@runs.command("diff")
@click.argument("partition_a", metavar="A")
@click.argument("partition_b", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs_diff(partition_a: str, partition_b: str, as_json: bool) -> None:
    """Compare partitions A and B over the uris that both scored."""
    from cnn_ray import console as ui
    from cnn_ray import runs as job

    found = job.diff_runs(partition_a, partition_b)
    if as_json:
        return click.echo(found.model_dump_json(indent=2))
    return ui.print_diff(found, stdout_console())


@runs.command("compact")
@click.argument("partition_uri", metavar="PARTITION")
@click.argument("folder", metavar="FOLDER")
def runs_compact(partition_uri: str, folder: str) -> None:
    """Write the rows of PARTITION into one Parquet file in FOLDER, for readers that know no generations."""
    from cnn_ray.runs import compact_run

    click.echo(f"Parquet: {compact_run(partition_uri, folder)}")


runs.add_command(runs_prune)


if __name__ == "__main__":
    main()
