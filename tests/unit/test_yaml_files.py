"""YAML as people write it: nothing is dropped, nothing becomes another value, and what is wrong is one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnn_ray.errors import ConfigError
from cnn_ray.yaml_files import load_yaml


def loaded(tmp_path: Path, text: str | bytes) -> dict:
    (tmp_path / "x.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("\ufeffa: 1\n", {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("date: 2026-11-23\n", {"date": "2026-11-23"}),
        ("date: 2026-11-31\n", {"date": "2026-11-31"}),
        ("at: 2026-11-23 10:00:00\n", {"at": "2026-11-23 10:00:00"}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}\n", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: {b: 1}\nc: {b: 1}\n", {"a": {"b": 1}, "c": {"b": 1}}),
    ],
)
def test_values_are_what_stands_there(tmp_path, text, expected):
    assert loaded(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "the key 'a' a second time"),
        ("d:\n  uri: x\n  uri: y\n", "line 3"),
        ("a:\n\tb: 1\n", r"character '\\t'"),
        ("a: [1\n", "Expected YAML in"),
        ("a: 1\n---\na: 2\n", "Expected YAML in"),
        ("- a\n- b\n", "Received: a list"),
        ("only text\n", "Received: text"),
        ("a: !!int x\n", "Expected YAML in"),
        ("a: !!timestamp 2026-02-30\n", "Expected YAML in"),
        ("a: !!timestamp soon\n", "Expected YAML in"),
        ("a: !!python/object/apply:os.system [ls]\n", "Expected YAML in"),
        ("? [a]\n: 1\n", "Expected YAML in"),
        ("a: " + "[" * 5000 + "\n", "nested too deep"),
        ("name: phishing\u00e9\n".encode("latin-1"), r"UTF-8 text .* byte 0xe9 at offset 14.*save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "UTF-8 text"),
        (b"a: \x00\n", "Expected YAML in"),
        (b"a" * 17_000_000, "at most"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_wrong_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, text)

    assert str(caught.value).startswith("Expected ")
    assert "Next: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Expected a YAML file"):
        load_yaml(tmp_path)
    with pytest.raises(ConfigError, match="Expected a YAML file"):
        load_yaml("/dev/zero")
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="readable YAML file"):
        load_yaml("a\0b")
    (tmp_path / "secret.yaml").write_text("a: 1\n")
    (tmp_path / "secret.yaml").chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(ConfigError, match="Permission denied"):
            load_yaml(tmp_path / "secret.yaml")


def test_a_pipe_is_a_file(tmp_path):
    """As in `--config <(make_config)`."""
    os.mkfifo(tmp_path / "pipe")
    if os.fork() == 0:
        (tmp_path / "pipe").write_text("a: 1\n")
        os._exit(0)

    assert load_yaml(tmp_path / "pipe") == {"a": 1}
    os.wait()
