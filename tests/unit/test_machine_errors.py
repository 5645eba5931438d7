"""What the machine lacks is said as such, whichever library met it, and everything else stays a bug."""

from __future__ import annotations

import errno
import os

import pytest

from cnn_ray import cli
from cnn_ray.errors import CnnRayError
from cnn_ray.machine_errors import explain_machine_error


class ResourceExhaustedError(Exception):
    """As TensorFlow's."""


class RayTaskError(Exception):
    """As Ray's, which keeps the worker's error in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::work() failed")
        self.cause = cause


def caused(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("training failed") from inner
    except RuntimeError as outer:
        return outer


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out/part.parquet")


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        ResourceExhaustedError("{{node Save}} /tmp/x.data: No space left on device [Op:SaveV2]"),
        RuntimeError("Exception from src/core/serialize.cpp:12: No space left on device"),
        OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"),
        RayTaskError(FULL),
        caused(FULL),
        caused(RayTaskError(caused(FULL))),
    ],
)
def test_a_full_disk_is_free_space(error):
    known = explain_machine_error(error)

    assert isinstance(known, CnnRayError)
    assert (known.exit_code, "free space" in str(known)) == (2, True)


def test_the_path_is_named_where_it_is_known():
    assert "/data/out/part.parquet" in str(explain_machine_error(caused(FULL)))


@pytest.mark.parametrize(
    ("path", "variable"),
    [
        ("/proc/nohome/.ray", "HOME"),
        ("/var/scratch/x", "TMPDIR"),
        ("/cache/x", "XDG_CACHE_HOME"),
        ("/tmp/ray/s", "RAY_TMPDIR"),  # noqa: S108
    ],
)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_names_the_variable(monkeypatch, path, variable, number):
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/ray")  # noqa: S108
    monkeypatch.setattr("tempfile.tempdir", "/var/scratch")

    known = explain_machine_error(OSError(number, os.strerror(number), path))

    assert known is not None
    assert known.exit_code == 2
    assert f"Expected to write {path}." in str(known)
    assert f"set {variable} to" in str(known)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 75, "ulimit -n"),
        (RuntimeError("Could not determine home directory."), 2, "set HOME"),
        (MemoryError(), 75, "enough memory"),
    ],
)
def test_other_things_that_a_machine_lacks(error, code, text):
    known = explain_machine_error(error)

    assert known is not None
    assert (known.exit_code, text in str(known)) == (code, True)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("28 errors"), RuntimeError("permission denied by policy"), OSError(errno.EINVAL, "x")],
)
def test_a_bug_stays_a_bug(error):
    assert explain_machine_error(caused(error)) is None


def exit_of(capsys, error: BaseException) -> tuple[int, str]:
    def run() -> None:
        raise error

    code = cli._exit_code(run)
    return code, capsys.readouterr().err


def test_the_forms_of_messages(capsys, monkeypatch):
    monkeypatch.delenv("CNN_RAY_DEBUG", raising=False)
    bug = "cnn-ray: Internal error (KeyError: 'x'). Run again with CNN_RAY_DEBUG=1 and report the output.\n"
    assert exit_of(capsys, KeyError("x")) == (1, bug)
    interrupted = "cnn-ray: Interrupted. Run the same command to continue.\n"
    assert exit_of(capsys, KeyboardInterrupt()) == (130, interrupted)
    code, message = exit_of(capsys, caused(FULL))
    assert (code, message.startswith("cnn-ray: Expected free space on the disk of /data/out/")) == (2, True)
