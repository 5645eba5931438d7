"""The verb `doctor`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cnn_ray.doctor_finding import Finding


@click.command()
@click.option(
    "--config",
    "files",
    metavar="FILE.yaml",
    multiple=True,
    help="A job's configuration, Serve's YAML or a cluster's; several are taken.",
)
@click.option(
    "--gpu", is_flag=True, help="Ask Ray and TensorFlow for GPUs also where the driver shows none (some 10 s)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(files: tuple[str, ...], gpu: bool, as_json: bool) -> int:
    """Check this machine, storage, the model and YAML files before a night does, each finding with its mend.

    Ends with 2 where a finding is an error, else with 0. Probes under the output are removed again.
    """
    from dataclasses import asdict

    from cnn_ray.doctor import examine, is_waited_for
    from cnn_ray.doctor_finding import exit_code
    from cnn_ray.redaction import redact

    findings = examine(files, gpu=gpu)
    if as_json:
        click.echo(redact(json.dumps([asdict(finding) for finding in findings], indent=2)))
    else:
        _print_findings(findings)
    if is_waited_for():  # the prompt comes back with the table, whatever still hangs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code(findings))
    return exit_code(findings)


def _print_findings(findings: list[Finding]) -> None:
    from cnn_ray.console import LIST_WIDTH, print_table
    from cnn_ray.flags import stdout_console
    from cnn_ray.redaction import redact

    rows: list[tuple[str, ...]] = [
        (finding.level, finding.check, redact(finding.said), redact(finding.mend)) for finding in findings
    ]
    console = stdout_console()
    if not console.is_terminal:
        console.width = LIST_WIDTH  # for grep: no cell is broken
    print_table(console, "", rows, ("", "check", "seen", "mend"))
