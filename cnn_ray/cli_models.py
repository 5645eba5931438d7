"""The verbs about models: evaluate, compare, and `model list | show | verify | calibrate | promote`."""

from __future__ import annotations

from typing import Any

import click

from cnn_ray.config import CalibrateConfig, CompareConfig, EvaluateConfig, PromoteConfig
from cnn_ray.flags import config_flags, config_from_flags, list_option, shared_flags, stderr_console, stdout_console
from cnn_ray.flags import print_config as show_config

_JUDGED = ("model", "data__uri")


@click.command()
@config_flags(EvaluateConfig, positional=_JUDGED)
@shared_flags
def evaluate(config_file: str | None, print_config: bool, dry_run: bool, **flags: Any) -> None:
    """Say what MODEL (NAME@V) gets right and wrong on the labelled images in DATA: a page and JSON."""
    config = config_from_flags(EvaluateConfig, config_file, flags)
    if print_config:
        return show_config(config)
    from cnn_ray import console_evaluation as ui
    from cnn_ray import evaluate as job

    if dry_run:
        return click.echo(job.dry_run(config))
    return ui.print_evaluation(job.run_evaluation(config), stdout_console())


@click.command()
@click.option("--config", "config_file", metavar="FILE.yaml", required=True, help="The comparison.")
@click.option("--output-uri", metavar="TEXT", help="Folder or s3:// prefix for the table and the page.")
@click.option("--data-uri", metavar="TEXT", help="The labelled images, in place of base.data.uri.")
@list_option("--seeds", "seeds", "One training per variant and seed.")
@click.option("--print-config", is_flag=True, help="Print the resolved configuration as YAML and stop.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, change nothing.")
def compare(config_file: str, print_config: bool, dry_run: bool, data_uri: str | None, **flags: Any) -> int | None:
    """Train several configurations on one split and list of seeds, and write them side by side.

    Run the same command again after anything: finished trainings are kept.
    """
    config = config_from_flags(CompareConfig, config_file, flags | {"base__data__uri": data_uri})
    if print_config:
        return show_config(config)
    from cnn_ray import compare as job
    from cnn_ray import console_training as ui

    if dry_run:
        return click.echo(job.dry_run(config))
    console = stderr_console()
    result = job.run_comparison(config, on_training=lambda event: ui.print_training(event, console))
    return ui.print_comparison(result, stdout_console())


@click.group()
def model() -> None:
    """List, show, verify, calibrate and promote the versions of models."""


_models_uri = click.option(
    "--models-uri", default="models", show_default=True, help="Folder or s3:// prefix of the models."
)


@model.command("list")
@_models_uri
def model_list(models_uri: str) -> None:
    """List all model versions."""
    from cnn_ray import artifact, console

    found = artifact.list_artifacts(models_uri)
    if not found:
        click.echo(f"No models in {models_uri}. Next: cnn-ray train --config FILE.yaml, or cnn-ray demo.")
        return
    aliases = {name: artifact.read_aliases(models_uri, name) for name in {a.name for a in found}}
    rows = [
        (
            a.reference,
            a.description.definition.architecture,
            ", ".join(a.labels[:4]) + (" ..." if len(a.labels) > 4 else ""),
            "x".join(str(side) for side in a.size_px),
            ", ".join(sorted(alias for alias, version in aliases[a.name].items() if version == a.version)),
            a.description.created_at,
        )
        for a in found
    ]
    console.print_table(
        stdout_console(), "", rows, ("model", "architecture", "labels", "input px", "aliases", "created")
    )


@model.command("show")
@click.argument("reference")
@_models_uri
def model_show(reference: str, models_uri: str) -> None:
    """Print artifact.json of a version."""
    from cnn_ray.artifact import load_artifact

    click.echo(load_artifact(models_uri, reference).description.model_dump_json(indent=2))


@model.command("verify")
@click.argument("reference")
@_models_uri
def model_verify(reference: str, models_uri: str) -> None:
    """Read every file of a version and compare its digest with artifact.json."""
    from cnn_ray.artifact import load_artifact, verify_artifact

    artifact = load_artifact(models_uri, reference)
    count = verify_artifact(artifact)
    click.echo(f"{artifact.reference}: {count} files as published, digest {artifact.digest}")


@model.command("calibrate")
@config_flags(CalibrateConfig, positional=_JUDGED)
@shared_flags
def model_calibrate(config_file: str | None, print_config: bool, dry_run: bool, **flags: Any) -> None:
    """Pick MODEL's threshold for a false-positive budget on DATA and write a new version with it."""
    config = config_from_flags(CalibrateConfig, config_file, flags)
    if print_config:
        return show_config(config)
    from cnn_ray import calibration as job
    from cnn_ray import console_evaluation as ui

    if dry_run:
        return ui.print_calibration(job.fit_calibration(config), None, stdout_console())
    fitted, artifact = job.run_calibration(config)
    return ui.print_calibration(fitted, artifact, stdout_console())


@model.command("promote")
@config_flags(PromoteConfig, positional=_JUDGED)
@shared_flags
def model_promote(config_file: str | None, print_config: bool, dry_run: bool, **flags: Any) -> None:
    """Move an alias to MODEL (NAME@V), if it is not worse on DATA than the version that the alias means now."""
    config = config_from_flags(PromoteConfig, config_file, flags)
    if print_config:
        return show_config(config)
    from cnn_ray import console_evaluation as ui
    from cnn_ray import promotion as job

    verdict = job.judge(config)
    ui.print_verdict(verdict, stdout_console())
    return job.refuse_worse(config, verdict) if dry_run else job.promote(config, verdict)
