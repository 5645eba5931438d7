"""The doctor: what would hurt in the night, found in a few seconds by day, each finding with its mend.

Checks that ask storage or import Ray run side by side, each with a deadline: one that hangs is a finding, not a hang.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cnn_ray import doctor_machine as machine
from cnn_ray import doctor_security as security
from cnn_ray import doctor_storage as storage
from cnn_ray.config import (
    Config,
    ModelConfig,
    NightlyConfig,
    ScoreConfig,
    ServeConfig,
    StorageConfig,
    TrainConfig,
    build_config,
    load_yaml,
)
from cnn_ray.doctor_finding import Finding, error, ok, warning
from cnn_ray.errors import CnnRayError, ConfigError
from cnn_ray.partitions import dateless_root, fill_date
from cnn_ray.storage_options import these_storage_options
from cnn_ray.storage_retry import patience
from cnn_ray.user_folders import home_folder
from cnn_ray.yaml_files import parse_yaml

DEADLINE_S = 15.0
"""For all checks together. A storage that needs longer for one probe is down or out of reach for practical ends."""

SHORTEST_BUDGET_S = 300.0
CHECK_THREAD = "doctor-check"

Check = Callable[[], Sequence[Finding]]


def examine(files: Sequence[str] = (), *, gpu: bool = False) -> list[Finding]:
    """All findings about this machine and the given YAML files: configurations of jobs, Serve's, the cluster's."""
    findings: list[Finding] = []
    checks: list[tuple[str, Check]] = []
    wants_cluster, serve_ports = bool(os.environ.get("RAY_ADDRESS")), list[int]()
    for file in files:
        try:
            document = load_yaml(file)
            checks += checks_of_document(document, file)
        except CnnRayError as failure:
            findings.append(_as_finding(f"config {file}", failure))
            continue
        wants_cluster = wants_cluster or "applications" in document or "available_node_types" in document
        port = (document.get("http_options") or {}).get("port")
        serve_ports += [port] if isinstance(port, int) else []
    return [*machine_findings(wants_cluster, serve_ports), *findings, *run_checks([*_gpu_checks(gpu), *checks])]


def machine_findings(wants_cluster: bool, serve_ports: Sequence[int]) -> list[Finding]:
    """What is quickly read of this machine."""
    token_mode = os.environ.get("RAY_AUTH_MODE") == "token"
    return [
        machine.python_finding(),
        *machine.version_findings(machine.installed_versions()),
        machine.cpu_finding(machine.cpu_flags()),
        *machine.read_disk_findings(),
        *machine.timeout_findings(os.environ),
        *security.port_findings(security.listening(), token_mode=token_mode, serve_ports=serve_ports),
        *security.token_findings(os.environ, home_folder(), wanted=wants_cluster),
        security.haproxy_finding(Path(os.environ.get(security.HAPROXY_VARIABLE, security.HAPROXY_SOCKET))),
    ]


def checks_of_document(document: Mapping[str, Any], file: str) -> list[tuple[str, Check]]:
    """The checks that a YAML file asks for, by what kind of file it is.

    Raises:
        ConfigError: it is none that we know, or a key is wrong.
    """
    if document.get("kind") == "RayService":
        document = load_inner_yaml(document, file)
    if "applications" in document:
        from cnn_ray.doctor_serve_yaml import serve_yaml_findings

        return [("serve yaml", lambda: serve_yaml_findings(document))]
    if "available_node_types" in document or "cluster_name" in document:
        from cnn_ray.doctor_cluster_yaml import cluster_yaml_findings

        return [("cluster yaml", lambda: cluster_yaml_findings(document))]
    return checks_of_config(config_of(document, file))


def load_inner_yaml(document: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """The Serve configuration that a RayService holds as text.

    Raises:
        ConfigError: there is none.
    """
    spec = document.get("spec")
    inner = (
        parse_yaml(str(spec.get("serveConfigV2")), f"serveConfigV2 of {file}") if isinstance(spec, Mapping) else None
    )
    if not isinstance(inner, Mapping) or "applications" not in inner:
        raise ConfigError(f"Expected applications in spec.serveConfigV2 of {file}. Received: none. Next: correct it.")
    return inner


def config_of(document: Mapping[str, Any], file: str) -> Config:
    """The configuration in a job's YAML file, its kind told by its keys.

    Raises:
        ConfigError: a key is wrong.
    """
    if "data" in document and "name" in document:
        return build_config(TrainConfig, document, source=file)
    if "score" in document:
        return build_config(NightlyConfig, document, source=file)
    if "input_uri" in document or "output_uri" in document:
        day = {} if "date" in document else {"date": "2000-01-01"}  # {date} is filled in by a flag
        return build_config(ScoreConfig, day, document, source=file)
    return build_config(ServeConfig, document, source=file)


def checks_of_config(config: Config) -> list[tuple[str, Check]]:
    """What storage and model of a configuration are asked, with its own storage options."""
    options = config.score if isinstance(config, NightlyConfig) else config

    def asked_so(check: Check) -> Check:
        def run() -> Sequence[Finding]:
            own = these_storage_options(options) if isinstance(options, StorageConfig) else nullcontext()
            with own, patience(DEADLINE_S / 2):  # what storage says is worth more than "no answer"
                return check()

        return run

    return [(name, asked_so(check)) for name, check in _checks_of_config(config)]


def _checks_of_config(config: Config) -> list[tuple[str, Check]]:
    checks: list[tuple[str, Check]] = []
    if isinstance(config, NightlyConfig):
        return [("time-outs", lambda: [night_finding(config)]), *_checks_of_config(config.score)]
    if isinstance(config, ScoreConfig):
        checks += _score_checks(config)
    if isinstance(config, ModelConfig):
        checks.append(("model", lambda: [model_finding(config)]))
        checks.append(("engine", lambda: [engine_finding(config)]))
    if isinstance(config, TrainConfig):
        checks.append(("models", lambda: storage.output_findings(config.models_uri, "models")))
        checks.append(("runs", lambda: [storage.arrow_finding(config.runs_uri, "runs", needed=True)]))
        checks.append(("clock", lambda: [storage.read_clock_finding(config.models_uri)]))
    return checks


def _score_checks(config: ScoreConfig) -> list[tuple[str, Check]]:
    # Without a day there may be nothing yet; the folder above the placeholder must answer all the same.
    root = dateless_root(config.input_uri) or fill_date(config.input_uri, config.date)
    return [
        ("input", lambda: [storage.input_finding(root)]),
        ("output", lambda: storage.output_findings(config.output_uri)),
        ("chunked uploads", lambda: [storage.arrow_finding(config.output_uri, "chunked uploads", needed=False)]),
        ("clock", lambda: [storage.read_clock_finding(config.output_uri)]),
    ]


def night_finding(config: NightlyConfig) -> Finding:
    """Whether the times of a night agree with one another."""
    budget, wait = config.date_budget_s, config.wait_timeout_s
    if budget is not None and budget < SHORTEST_BUDGET_S:
        said = f"date_budget_s {budget:g}: a start of Ray alone takes some 15 s, and a stopped date begins again"
        return warning("time-outs", said, "3600 or more")
    if wait == 0 and (config.wait_for_marker is not None or config.min_age_s > 0):
        said = "wait_timeout_s 0: a date that is not ready ends the call with 75"
        return warning("time-outs", said, "wait_timeout_s: 3600, or a scheduler that calls again at 75")
    return ok("time-outs", f"a date may take {'as long as it needs' if budget is None else f'{budget:g} s'}")


def model_finding(config: ModelConfig) -> Finding:
    """Whether the model is there and every file of it has the digest that artifact.json names."""
    from cnn_ray.artifact import load_artifact, verify_artifact

    try:
        artifact = load_artifact(config.models_uri, config.model)
        files = verify_artifact(artifact)
    except CnnRayError as failure:
        return _as_finding("model", failure)
    return ok(
        "model", f"{config.model} is {artifact.reference}, {files} files as published, digest {artifact.digest[:12]}"
    )


def engine_finding(config: ModelConfig) -> Finding:
    """Which engine and precision this node would take."""
    from cnn_ray.artifact import load_artifact
    from cnn_ray.predictor import choose_engine

    use_gpu = isinstance(config, ScoreConfig | ServeConfig) and config.num_gpus > 0
    try:
        artifact = load_artifact(config.models_uri, config.model)
        engine, precision = choose_engine(artifact, config.engine, config.precision, use_gpu=use_gpu)
    except CnnRayError as failure:
        return _as_finding("engine", failure)
    return ok("engine", f"{engine} {precision}")


def _gpu_checks(asked: bool) -> list[tuple[str, Check]]:
    devices = machine.gpu_devices()
    if not asked and devices == 0:
        return [("gpu", lambda: [machine.gpu_finding(0)])]
    return [("gpu", lambda: [machine.gpu_finding(devices, machine.gpus_by_ray(), machine.gpus_by_tensorflow())])]


def run_checks(checks: Sequence[tuple[str, Check]], deadline_s: float = DEADLINE_S) -> list[Finding]:
    """The findings of all checks in their order; one that has not ended after `deadline_s` is an error of its own."""
    results: list[list[Finding] | None] = [None] * len(checks)

    def run(place: int) -> None:
        name, check = checks[place]
        try:
            results[place] = list(check())
        except Exception as failure:  # noqa: BLE001 - a check that breaks is a finding; the others go on
            reason = " ".join(str(failure).split())[:200]
            results[place] = [error(name, f"{type(failure).__name__}: {reason}", "report this as a bug of the doctor")]

    # Daemons: a check that hangs must not keep the process. See also `is_waited_for`.
    threads = [
        threading.Thread(target=run, args=(place,), name=CHECK_THREAD, daemon=True) for place in range(len(checks))
    ]
    until = time.monotonic() + deadline_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    late = [
        error(name, f"no answer in {deadline_s:g} s", "check the network, AWS_ENDPOINT_URL and proxies")
        for name, _ in checks
    ]
    return [
        finding
        for place in range(len(checks))
        for finding in (results[place] if results[place] is not None else [late[place]]) or []
    ]


def is_waited_for() -> bool:
    """Whether a check goes on that would keep this process from its end: pools of threads that it started are waited
    for by Python, however long storage does not answer."""
    return any(thread.name == CHECK_THREAD for thread in threading.enumerate())


def _as_finding(check: str, failure: CnnRayError) -> Finding:
    said, _, mend = str(failure).replace("\n", " ").partition(" Next: ")
    return error(check, said, mend or "correct it")
