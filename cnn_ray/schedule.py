"""The schedule of the nightly runs: shown as text, and only on demand installed, looked up or removed."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from cnn_ray.config import NightlyConfig, build_config, load_yaml
from cnn_ray.errors import ConfigError
from cnn_ray.schedule_files import (
    Schedule,
    cron_block,
    cron_marks,
    kuberay_manifests,
    kubernetes_manifests,
    systemd_units,
)
from cnn_ray.storage import open_store
from cnn_ray.user_folders import home_folder

Kind = Literal["systemd", "cron", "kubernetes", "kuberay"]

TOOL_TIMEOUT_S = 60
SYSTEM_UNITS = Path("/etc/systemd/system")
_KUBERNETES_HEAD = """\
# Written by cnn-ray schedule. Change the image (this package and its pinned requirements) and the resources; give the
# pods their rights on storage through the service account's cloud role, not through keys.
"""
_KUBERAY_HEAD = """\
# RayCronJob is alpha: KubeRay 1.6 or newer with its feature gate. A plain CronJob (--kubernetes) needs neither.
# The schedule is in the zone of the operator, which is UTC where nobody changed it.
"""


def schedule_of(
    config_file: str, *, at: str, name: str, is_system: bool = False, user: str = "", image: str | None = None
) -> Schedule:
    """The schedule of a configuration, which is read and checked; nothing is looked up or written.

    Raises:
        ConfigError: the file is no nightly configuration, or the time no time of day.
    """
    config = build_config(NightlyConfig, load_yaml(config_file), source=config_file)
    output_uri = open_store(config.score.output_uri).uri
    made = Schedule(
        name=name,
        at=at,
        config=Path(config_file).absolute(),
        folder=Path.cwd(),
        python=Path(sys.executable),
        output_folder=None if output_uri.startswith("s3://") else Path(output_uri),
        is_system=is_system,
        user=user or getpass.getuser(),
        **({} if image is None else {"image": image}),
    )
    _ = made.clock
    return made


def text_of(kind: Kind, schedule: Schedule) -> str:
    """What would be installed, each file under its name."""
    match kind:
        case "systemd":
            folder = unit_folder(is_system=schedule.is_system)
            return "\n".join(f"# {folder / name}\n{text}" for name, text in systemd_units(schedule).items())
        case "cron":
            return cron_block(schedule)
        case "kubernetes":
            settings = schedule.config.read_text(encoding="utf-8")
            return _KUBERNETES_HEAD + _dumped(kubernetes_manifests(schedule, settings))
        case "kuberay":
            settings = schedule.config.read_text(encoding="utf-8")
            return _KUBERNETES_HEAD + _KUBERAY_HEAD + _dumped(kuberay_manifests(schedule, settings))


def install(kind: Kind, schedule: Schedule) -> list[str]:
    """What was done, one sentence each; an older schedule of the same name is replaced.

    Raises:
        ConfigError: a tool is missing or refused; StorageError: the output folder cannot be made.
    """
    if kind == "cron":
        _write_crontab(f"{_without_block(_crontab(), schedule.name)}{cron_block(schedule)}")
        return [f"The crontab has the lines of {schedule.name}."]
    if kind != "systemd":
        _tool(["kubectl", "apply", "-f", "-"], text_of(kind, schedule))
        return [f"Applied {schedule.name}; `kubectl get cronjob,raycronjob {schedule.name}` shows it."]
    if schedule.output_folder is not None:  # systemd refuses a writable path that is not there
        open_store(str(schedule.output_folder)).check_writable()
    folder = unit_folder(is_system=schedule.is_system)
    for name, text in systemd_units(schedule).items():
        _write(folder / name, text)
    systemctl = _systemctl(is_system=schedule.is_system)
    _tool([*systemctl, "daemon-reload"])
    _tool([*systemctl, "enable", "--now", f"{schedule.name}.timer"])
    done = [f"Wrote {folder}/{schedule.name}.service and .timer; the timer is enabled."]
    if not schedule.is_system:
        done.append("Without `loginctl enable-linger` a user's timers run only while the user is logged in.")
    return done


def remove(kind: Kind, name: str, *, is_system: bool = False) -> list[str]:
    """What was done, one sentence each; results, configuration and credentials are not touched.

    Raises:
        ConfigError: there is no such schedule, or a tool is missing or refused.
    """
    if not installed(kind, name, is_system=is_system):
        raise ConfigError(f"Expected a {kind} schedule {name}. Received: none. Next: cnn-ray schedule show.")
    if kind == "cron":
        _write_crontab(_without_block(_crontab(), name))
        return [f"The crontab has no lines of {name} any more."]
    if kind != "systemd":
        resource = "raycronjob" if kind == "kuberay" else "cronjob"
        _tool(["kubectl", "delete", f"{resource}/{name}", f"secret/{name}"])
        return [f"Deleted {resource}/{name} and secret/{name}."]
    systemctl = _systemctl(is_system=is_system)
    _tool([*systemctl, "disable", "--now", f"{name}.timer"])
    folder = unit_folder(is_system=is_system)
    for suffix in ("timer", "service"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    _tool([*systemctl, "daemon-reload"])
    return [f"Removed {folder}/{name}.timer and .service; a run under way goes on."]


def installed(kind: Kind, name: str, *, is_system: bool = False) -> str:
    """What is installed under the name, as its scheduler has it; empty where there is nothing.

    Raises:
        ConfigError: the tool that knows is missing or refused.
    """
    if kind == "cron":
        begin, end = cron_marks(name)
        _, found, after = _crontab().partition(begin)
        return f"{found}{after.partition(end)[0]}{end}" if found else ""
    if kind != "systemd":
        resource = "raycronjob" if kind == "kuberay" else "cronjob"
        return _tool(["kubectl", "get", resource, name, "--ignore-not-found"])
    folder = unit_folder(is_system=is_system)
    files = [folder / f"{name}.{suffix}" for suffix in ("service", "timer")]
    return "\n".join(f"# {path}\n{path.read_text(encoding='utf-8')}" for path in files if path.is_file())


def unit_folder(*, is_system: bool) -> Path:
    """Where systemd looks for units of this machine, or of this user."""
    if is_system:
        return SYSTEM_UNITS
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config") / "systemd" / "user"


def _systemctl(*, is_system: bool) -> list[str]:
    return ["systemctl"] if is_system else ["systemctl", "--user"]


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Expected to write {path}. Received: {error.strerror}. Next: check its owner, or leave --system out."
        ) from None


def _crontab() -> str:
    try:
        return _tool(["crontab", "-l"])
    except ConfigError as error:
        if "no crontab" in str(error):  # how every cron says that it is empty
            return ""
        raise


def _write_crontab(text: str) -> None:
    _tool(["crontab", "-"], text)


def _without_block(text: str, name: str) -> str:
    """The crontab without the lines of this name; what others wrote stays as it is.

    Raises:
        ConfigError: the block has no end: what belongs to it cannot be known.
    """
    begin, end = cron_marks(name)
    before, found, rest = text.partition(f"{begin}\n")
    if not found:
        return text if not text or text.endswith("\n") else f"{text}\n"
    _, closed, after = rest.partition(f"{end}\n")
    if not closed:
        raise ConfigError(f"Expected the line {end!r} in the crontab. Received: none. Next: mend it by `crontab -e`.")
    return before + after


def _tool(command: list[str], text: str | None = None) -> str:
    """What the command printed.

    Raises:
        ConfigError: it is not there, did not end, or refused.
    """
    path = shutil.which(command[0])
    if path is None:
        raise ConfigError(f"Expected {command[0]} on this machine. Received: none. Next: install it, or use --print.")
    shown = " ".join(command)
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command; names are checked by the command line
            [path, *command[1:]], input=text, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"Expected `{shown}` to end. Received: no end in {TOOL_TIMEOUT_S} s. Next: run it.") from None
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[:300] or f"exit code {done.returncode}"
        raise ConfigError(f"Expected `{shown}` to succeed. Received: {reason}. Next: run it by hand to see more.")
    return done.stdout


def _dumped(manifests: list[dict[str, Any]]) -> str:
    return "---\n".join(yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=120) for one in manifests)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that the settings can be read; no anchors for equal parts."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the dumper passes it
        """See `yaml.SafeDumper`."""
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)
