"""A connected Ray: the cluster of RAY_ADDRESS, or a local one that ends with the work it was started for."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnn_ray.errors import UnavailableError
from cnn_ray.machine_errors import explain_machine_error
from cnn_ray.user_folders import give_ray_a_token


@contextmanager
def connected(*, num_cpus: int | None = None, logging_level: int = logging.ERROR) -> Iterator[bool]:
    """Inside, Ray is connected; the value says whether it is a local one that was started here.

    A Ray that the caller had already connected is used as it is and left as it is. `num_cpus` are the logical CPUs of a
    local Ray, by default the cores of the machine.

    Raises:
        ConfigError: Ray cannot write where it must; the message names the variable to set.
        UnavailableError: Ray did not start, or the cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    local = not os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging_level}
    if local:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
        give_ray_a_token()
        # Ray's core complains on standard error about how Ray Data makes its own actors; its files keep what matters.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # "token authentication is enabled"
    try:
        with _own_sigterm(), _package_on_path():
            ray.init(**options)
    except Exception as error:  # a node that did not start is a bare Exception
        known = explain_machine_error(error)
        if known is not None:
            raise known from error
        first = str(error).strip().partition("\n")[0][:300]
        raise UnavailableError(
            f"Expected Ray to start. Received: {type(error).__name__}: {first} "
            f"Next: try again; the logs are in {logs_folder()}."
        ) from error
    try:
        yield local
    finally:
        ray.shutdown()  # ends a local Ray, leaves a cluster


def logs_folder() -> str:
    """Return where Ray's processes of this machine log."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - as Ray chooses it
    return f"{base}/ray/session_latest/logs"


@contextmanager
def _package_on_path() -> Iterator[None]:
    """Lets the workers of a Ray that starts inside import this very cnn_ray, also from a source folder.

    They inherit the environment. A runtime_env would do too, but keeps Ray from using the workers it started ahead.
    """
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = root if not before else f"{root}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Puts the handler of SIGTERM back: ray.init leaves one of its own there, which exits with 1."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
