"""What starts nightly, as text: systemd units, a cron line, Kubernetes manifests. Pure; nothing is installed.

All of them rest on the same contract: 75 is tried again, 4 and the rest are not, and a call too many is a no-op. So a
schedule may be generous: the dates that a night missed are in the look-back window of the next one.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_ray.errors import ConfigError

CRON_HOURS = 6
"""cron starts nothing again, so its line names this many hours in a row."""
RETRY_S = 900
RETRIES = 40
NIGHT_S = 20 * 3600
"""Nothing of one night runs into the next one's start."""


@dataclass(frozen=True)
class Schedule:
    """What is started when, and as whom. Paths are absolute; `output_folder` is None where the output is on S3."""

    name: str
    at: str
    config: Path
    folder: Path
    python: Path
    output_folder: Path | None = None
    is_system: bool = False
    user: str = ""
    image: str = "registry.example.com/cnn-ray:0.1.0"

    @property
    def clock(self) -> tuple[int, int]:
        """Hour and minute, UTC.

        Raises:
            ConfigError: `at` is no time of day.
        """
        match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", self.at)
        if match is None:
            raise ConfigError(f"Expected a UTC time like 02:00 for --at. Received: {self.at!r}. Next: correct it.")
        return int(match[1]), int(match[2])

    @property
    def command(self) -> list[str]:
        """The nightly call."""
        return [str(self.python), "-m", "cnn_ray.cli", "nightly", "--config", str(self.config)]


def systemd_units(schedule: Schedule) -> dict[str, str]:
    """File name -> contents of the service and its timer.

    `Type=exec`, because systemd refuses RestartForceExitStatus for oneshot; a timer starts nothing while it runs.
    """
    return {f"{schedule.name}.service": _service(schedule), f"{schedule.name}.timer": _timer(schedule)}


def _timer(schedule: Schedule) -> str:
    hour, minute = schedule.clock
    return f"""\
[Unit]
Description=cnn-ray nightly at {hour:02d}:{minute:02d} UTC

[Timer]
OnCalendar=*-*-* {hour:02d}:{minute:02d}:00 UTC
# A start that was missed (machine off) is made up for at boot.
Persistent=true
RandomizedDelaySec=10min
AccuracySec=1min

[Install]
WantedBy=timers.target
"""


def _service(schedule: Schedule) -> str:
    network = "Wants=network-online.target\nAfter=network-online.target\n" if schedule.is_system else ""
    who = f"User={schedule.user}\nCapabilityBoundingSet=\n" if schedule.is_system else "PrivateUsers=yes\n"
    settings = "/etc/cnn-ray" if schedule.is_system else "%h/.config/cnn-ray"
    writable = "" if schedule.output_folder is None else f"ReadWritePaths={_unit_path(schedule.output_folder)}\n"
    return f"""\
[Unit]
Description=cnn-ray nightly with {_percent(schedule.config.name)}
{network}# Exit 75 (still owed) is started again every {RETRY_S // 60} minutes, at most {RETRIES} times a night.
StartLimitIntervalSec={NIGHT_S}
StartLimitBurst={RETRIES}

[Service]
Type=exec
ExecStart={" ".join(_unit_word(word) for word in schedule.command)}
WorkingDirectory={_percent(str(schedule.folder))}
# Credentials and RAY_ADDRESS, one NAME=VALUE a line, mode 0600; the file may be missing.
EnvironmentFile=-{settings}/{schedule.name}.env
Restart=no
RestartForceExitStatus=75
RestartSec={RETRY_S}
# SIGTERM to the run alone: it keeps what is committed and ends with 130.
KillMode=mixed
TimeoutStopSec=120
RuntimeMaxSec={NIGHT_S}
Nice=10

{who}NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
{writable}CacheDirectory=cnn_ray
Environment=XDG_CACHE_HOME=%C
# A Ray head on this very machine talks through /tmp/ray: set PrivateTmp=no where RAY_ADDRESS names one.
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0027
# Not MemoryDenyWriteExecute: TensorFlow and OpenVINO compile while they run.
"""


def cron_block(schedule: Schedule) -> str:
    """The lines for a crontab, between two marks by which they are found again.

    flock keeps two calls of this machine apart (the lease keeps machines apart) and ends with 75 where one works.
    """
    hour, minute = schedule.clock
    hours = ",".join(str((hour + later) % 24) for later in range(CRON_HOURS))
    flock = ["flock", "-n", "-E", "75", str(schedule.config), *schedule.command]
    settings = f'"$HOME"/.config/cnn-ray/{schedule.name}.env'
    source = f"set -a; [ ! -f {settings} ] || . {settings}; set +a"
    line = f"{source}; cd {shlex.quote(str(schedule.folder))} && exec {shlex.join(flock)}".replace("%", "\\%")
    begin, end = cron_marks(schedule.name)
    return f"""\
{begin}
# Hours are those of the machine's zone; cronie follows CRON_TZ, other crons do not, and nothing depends on the hour:
# the dates are UTC. Each further hour tries again what is still owed (75) and does nothing otherwise. Credentials and
# RAY_ADDRESS, one NAME=VALUE a line, mode 0600, are read from ~/.config/cnn-ray/{schedule.name}.env.
CRON_TZ=UTC
{minute} {hours} * * * {line}
{end}
"""


def cron_marks(name: str) -> tuple[str, str]:
    """First and last line of the block of this name."""
    return f"# {name}: begin (written by cnn-ray schedule)", f"# {name}: end"


def kubernetes_manifests(schedule: Schedule, settings: str) -> list[dict[str, Any]]:
    """A Secret with the settings (the text of the YAML: a webhook's address is one) and the CronJob that runs nightly.

    A pod that ends with 75 is started again by backoffLimit, with pauses that grow to six minutes; 1 to 4 end the job;
    an eviction does not count.
    """
    hour, minute = schedule.clock
    job = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": schedule.name, "labels": _labels(schedule)},
        "spec": {
            "schedule": f"{minute} {hour} * * *",
            "timeZone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 8 * 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 7,
            "jobTemplate": {
                "metadata": {"labels": _labels(schedule)},
                "spec": {
                    "backoffLimit": RETRIES,
                    "activeDeadlineSeconds": NIGHT_S,
                    "ttlSecondsAfterFinished": 7 * 24 * 3600,
                    "podFailurePolicy": {"rules": _failure_rules()},
                    "template": {"metadata": {"labels": _labels(schedule)}, "spec": _pod(schedule)},
                },
            },
        },
    }
    return [_secret(schedule, settings), job]


def kuberay_manifests(schedule: Schedule, settings: str) -> list[dict[str, Any]]:
    """The same for KubeRay's RayCronJob: a Ray cluster is made for each night and goes with it.

    Alpha (KubeRay 1.6, feature gate): it has no concurrencyPolicy, which the lease makes up for; it tries again by
    backoffLimit whatever the exit code was; and the schedule is in the operator's zone.
    """
    hour, minute = schedule.clock
    container = {key: value for key, value in _container(schedule).items() if key != "command"}
    worker = {**container, "name": "ray-worker"}
    head = {**container, "name": "ray-head"}
    group = {
        "groupName": "workers",
        "replicas": 1,
        "minReplicas": 1,
        "maxReplicas": 8,
        "rayStartParams": {},
        "template": {"metadata": {"labels": _labels(schedule)}, "spec": _pod(schedule, worker)},
    }
    cluster = {
        "rayVersion": "2.60.0",
        "enableInTreeAutoscaling": True,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},  # noqa: S104 - the operator's submitter
            # The autoscaler beside the head asks Kubernetes for pods: the one that has a token.
            "template": {
                "metadata": {"labels": _labels(schedule)},
                "spec": _pod(schedule, head) | {"automountServiceAccountToken": True},
            },
        },
        "workerGroupSpecs": [group],
    }
    job = {
        "entrypoint": "cnn-ray nightly --score-runner ray --config /etc/cnn-ray/nightly.yaml",
        "backoffLimit": 3,
        "activeDeadlineSeconds": NIGHT_S,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,
        "rayClusterSpec": cluster,
    }
    spec = {"schedule": f"{minute} {hour} * * *", "suspend": False, "jobTemplate": job}
    metadata = {"name": schedule.name, "labels": _labels(schedule)}
    ray_job = {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": metadata, "spec": spec}
    return [_secret(schedule, settings), ray_job]


def _secret(schedule: Schedule, settings: str) -> dict[str, Any]:
    metadata = {"name": schedule.name, "labels": _labels(schedule)}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"nightly.yaml": settings}}


def _failure_rules() -> list[dict[str, Any]]:
    codes = {"containerName": "nightly", "operator": "In"}
    return [
        {"action": "FailJob", "onExitCodes": {**codes, "values": [1, 2, 3, 4]}},
        {"action": "Count", "onExitCodes": {**codes, "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]


def _pod(schedule: Schedule, container: dict[str, Any] | None = None) -> dict[str, Any]:
    pod: dict[str, Any] = {} if container is not None else {"restartPolicy": "Never"}
    return pod | {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 120,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container or _container(schedule)],
        "volumes": [
            {"name": "settings", "secret": {"secretName": schedule.name}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }


def _container(schedule: Schedule) -> dict[str, Any]:
    return {
        "name": "nightly",
        "image": schedule.image,
        "command": ["cnn-ray", "nightly", "--config", "/etc/cnn-ray/nightly.yaml"],
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - the one place that can be written
        "resources": {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "8Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "settings", "mountPath": "/etc/cnn-ray", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
        ],
    }


def _labels(schedule: Schedule) -> dict[str, str]:
    return {"app.kubernetes.io/name": "cnn-ray", "app.kubernetes.io/instance": schedule.name}


def _percent(text: str) -> str:
    return text.replace("%", "%%")


def _unit_path(path: Path) -> str:
    return _unit_word(str(path)).replace("$$", "$")


def _unit_word(word: str) -> str:
    """A word of an Exec line or a path list, quoted where systemd would split or expand it."""
    escaped = _percent(word).replace("$", "$$")
    if re.fullmatch(r"[A-Za-z0-9_./:@%$+,=-]+", escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'
