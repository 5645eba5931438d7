"""`cnn-ray keys`: the key on stdout once and nowhere else; exit code 2 and one sentence for what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnn_ray.auth import KeyRing
from cnn_ray.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_add_prints_the_key_alone_on_stdout_and_it_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = str(tmp_path / "keys.json")
    code, out, err = run(capsys, "add", "nightly", "--keys", keys)
    assert code == 0
    assert out == out.strip() + "\n"
    assert KeyRing.load(keys).name_of(f"Bearer {out.strip()}") == "nightly"
    assert out.strip() not in err


def test_list_shows_names_and_neither_keys_nor_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = str(tmp_path / "keys.json")
    _, key, _ = run(capsys, "add", "nightly", "--keys", keys)
    code, out, _ = run(capsys, "list", "--keys", keys)
    assert code == 0
    assert "nightly" in out
    assert key.strip() not in out
    assert '"sha256"' not in out


def test_remove_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = str(tmp_path / "keys.json")
    run(capsys, "add", "nightly", "--keys", keys)
    assert run(capsys, "remove", "nightly", "--keys", keys)[0] == 0
    assert "No keys in" in run(capsys, "list", "--keys", keys)[1]
    code, out, err = run(capsys, "remove", "nightly", "--keys", keys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Next:" in err
    assert run(capsys, "list", "--keys", str(tmp_path / "none.json"))[0] == 2
    assert run(capsys, "add", "nightly", "--keys", "ftp://host/keys.json")[0] == 2
    assert run(capsys, "add", "nightly")[0] == 2
