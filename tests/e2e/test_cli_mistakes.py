"""Wrong calls of every verb end with 2 or 3 and one sentence, never as a bug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCORE = ["score", "img", "out", "--model", "demo@1"]
SERVE = ["serve", "--model", "small@1"]
TRAIN = ["train", "--name", "x", "--data-uri"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    for name, text in {
        "file": "x", "text.yaml": "just text", "list.yaml": "- a\n", "empty.yaml": "", "twice.yaml": "a: 1\na: 2\n",
        "tab.yaml": "a:\n\tb: 1\n", "types.yaml": "input_uri: [1]\noutput_uri: {a: 1}\nmodel: 3\n",
        "night.yaml": "score: {model: demo@1, input_uri: 'in/{date}', output_uri: out}\nfirst_date: 2026-02-30\n",
        "compare.yaml": "name: x\nbase: [1]\nvariants: 3\n", "keys.json": "{",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes(b"name: \xe9\n")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["score"], ["score", "a", "b", "c"], [*SCORE, "--batch-size", "0"], [*SCORE, "--lease-s", "nan"],
        [*SCORE, "--date", "2026-02-30"], [*SCORE, "--date", ""], [*SCORE, "--runner", "spark"],
        [*SCORE, "--limit", "99999999999999999999999"], [*SCORE, "--num-threads", "999999999999"], [*SCORE],
        ["score", "http://x/y", "out", "--model", "demo@1"], ["score", "img", "out", "--model", "demo"],
        *[["score", "--config", name] for name in (
            "text.yaml", "list.yaml", "empty.yaml", "twice.yaml", "tab.yaml", "types.yaml", "latin.yaml", "empty",
            "nowhere.yaml", "/dev/zero",
        )],
        ["nightly", "--config", "night.yaml"], ["nightly", "--config", "types.yaml"],
        ["compare", "--config", "compare.yaml"], ["compare", "--config", "compare.yaml", "--seeds", "a,b"],
        [*SERVE, "--port", "99999"], [*SERVE, "--host", "0.0.0.0"], [*SERVE, "--also", "b@1,,c@1"],
        [*SERVE, "--api-keys-uri", "keys.json"], [*SERVE, "--api-keys-uri", "nowhere.json"],
        [*SERVE, "--ssl-certfile", "file", "--ssl-keyfile", "file"],
        [*SERVE, "--ssl-certfile", "nowhere", "--ssl-keyfile", "nowhere"],
        [*TRAIN, "nowhere"], [*TRAIN, "empty"], [*TRAIN, "file"], ["train", "--resume", "nowhere"],
        ["model", "show", "demo"], ["model", "show", "demo@1"], ["runs", "show", "nowhere"], ["runs", "diff", "a", "b"],
        ["runs", "prune", "nowhere", "--keep-days", "3", "--today", "x"], ["keys", "list", "--keys", "keys.json"],
        ["doctor", "--config", "text.yaml"], ["demo", "file"], ["demo", "/proc/x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_call_is_one_sentence(folder, small_models, arguments):
    models = ["--models-uri", small_models] if arguments[0] == "serve" else []
    done = subprocess.run(
        [sys.executable, "-m", "cnn_ray.cli", *arguments, *models],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode in (2, 3), done.stderr
    assert "Traceback" not in done.stderr
    assert "Internal error" not in done.stderr
    assert "Expected " in done.stderr + done.stdout or "Error: " in done.stderr
