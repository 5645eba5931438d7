"""Folders of the user that this process may write, also as another uid, without a home and under a read-only root."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from cnn_ray.errors import ConfigError

RAY_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def home_folder() -> Path:
    """Return the user's home; where the system knows none, a folder that does not exist."""
    try:
        return Path.home()
    except RuntimeError:  # a uid without a name, and HOME is not set
        return Path("/nonexistent")


def cache_folder() -> Path:
    """Return the folder for what can be fetched again: XDG_CACHE_HOME, ~/.cache, or, where neither can be written, one
    below the temporary folder that is this user's alone.

    Raises:
        ConfigError: none can be written, or somebody else owns the last one.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache") / "cnn_ray"
    return folder if is_writable(folder) else _own_temporary_folder()


def is_writable(folder: Path) -> bool:
    """Make the folder if it is missing, and return whether a file can be written there: modes alone do not say so
    (read-only file systems, /proc)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def give_ray_a_token() -> None:
    """Give a Ray that is started from here a token of its own in the environment, where Ray would fail to write one
    to ~/.ray/auth_token."""
    mode, *tokens = (os.environ.get(name) for name in RAY_TOKEN_VARIABLES)
    if mode not in (None, "", "token") or any(tokens):
        return
    folder = home_folder() / ".ray"
    if not os.access(folder / "auth_token", os.R_OK) and not is_writable(folder):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _own_temporary_folder() -> Path:
    try:
        folder = Path(tempfile.gettempdir()) / f"cnn_ray-cache-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"Expected a cache folder that can be written. Received: {error.strerror or error}. "
            "Next: set XDG_CACHE_HOME or HOME to a folder that can be written."
        ) from None
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise ConfigError(
            f"Expected {folder} to be this user's own. Received: a folder that others may write. "
            "Next: set XDG_CACHE_HOME to a folder of yours."
        )
    return folder
