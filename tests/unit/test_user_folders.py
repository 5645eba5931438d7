"""Another uid, no home, a read-only root: what must be written has a place, and it is this user's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cnn_ray import user_folders
from cnn_ray.errors import ConfigError
from cnn_ray.user_folders import cache_folder, give_ray_a_token, home_folder

NOWHERE = "/proc/nohome"
"""Not even root can make it."""


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", *user_folders.RAY_TOKEN_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_cache_is_where_users_expect_it(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "home" / ".cache" / "cnn_ray"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "cnn_ray"


@pytest.mark.parametrize("home", [NOWHERE, "/dev/null", ""])
def test_without_a_home_the_cache_is_a_private_temporary_folder(monkeypatch, tmp_path, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", NOWHERE)

    folder = cache_folder()

    assert folder == tmp_path / f"cnn_ray-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


def test_a_cache_that_others_may_write_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", NOWHERE)
    folder = tmp_path / f"cnn_ray-cache-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        cache_folder()


def test_no_folder_at_all_names_the_variables(monkeypatch):
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setattr(tempfile, "tempdir", NOWHERE)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME or HOME to a folder"):
        cache_folder()


def test_a_uid_without_a_name_has_no_home(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert home_folder() == Path("/nonexistent")


def test_ray_gets_a_token_only_where_it_could_not_write_one(monkeypatch, tmp_path):
    give_ray_a_token()
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray writes ~/.ray/auth_token itself, and `ray status` finds it"

    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    give_ray_a_token()
    assert "RAY_AUTH_TOKEN" not in os.environ

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    give_ray_a_token()
    assert os.environ.pop("RAY_AUTH_TOKEN")

    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "removed at the end of the test")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    give_ray_a_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
