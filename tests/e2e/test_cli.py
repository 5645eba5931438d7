"""The command line as a user meets it: one sentence and the right exit code, never a traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factories import image_bytes, write_images

from cnn_ray import cli, outputs


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return ended.value.code, captured.out, captured.err  # type: ignore[return-value]


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "in", 10, bad=1)


def test_score_prints_a_table_and_a_second_run_says_so(capsys, tmp_path, images, small_models):
    command = ("score", images, tmp_path / "out", "--model", "small@1", "--models-uri", small_models)
    command = (*command, "--max-quarantine-rate", "0.2")
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert re.search(r"rows planned +│ 11 ", out)
    assert re.search(r"quarantined +│ 1 ", out)
    assert f"Parquet: {tmp_path}/out/model=small/version=1" in out
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "Already scored: nothing was left to do." in out


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("--model", "small@9"), 3, r"no artifact\.json"),
        (("--model", "small@champion"), 3, "Expected an alias"),
        (("--model", "small"), 2, "NAME@VERSION"),
        (("--models-uri", "nowhere"), 3, "Expected model small@1"),
        (("--date", "yesterday"), 2, "Expected a date"),
        (("--shard-size", "many"), 2, "shard_size"),
        (("--bach-size", "3"), 2, "--batch-size"),
        (("--config", "nowhere.yaml"), 2, "No such file"),
        (("--max-quarantine-rate", "0"), 4, r"1 of 11 \(1 empty\)"),
        (("--precision", "mixed_bfloat16"), 2, "one of the precisions f32, bf16"),
    ],
)
def test_mistakes_have_one_sentence_and_an_exit_code(capsys, tmp_path, images, small_models, change, code, message):
    command = ["score", images, tmp_path / "out", "--model", "small@1", "--models-uri", small_models, *change]
    got, _, err = run(capsys, *command)
    assert got == code
    assert re.search(message, err)


def test_empty_and_missing_inputs_and_unwritable_outputs(capsys, tmp_path, images, small_models):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    model = ("--model", "small@1", "--models-uri", small_models)
    for source, output, message in [
        (tmp_path / "empty", tmp_path / "out", "Expected images in"),
        (tmp_path / "nowhere", tmp_path / "out", "nowhere"),
        (images, tmp_path / "file" / "out", "Expected"),
        (images, "/proc/out", "Expected"),
        (images, "ftp://host/x", "Expected"),
        (images, images / "out", "Expected OUTPUT outside of INPUT"),
    ]:
        code, _, err = run(capsys, "score", source, output, *model)
        assert (code, message in err) == (2, True), err
        assert "Next:" in err


def test_missing_bucket_and_wrong_credentials(capsys, tmp_path, images, small_models, s3_uri, monkeypatch):
    model = ("--model", "small@1", "--models-uri", small_models)
    for source, output in [("s3://no-such-bucket/x", tmp_path / "out"), (images, "s3://no-such-bucket/x")]:
        code, _, err = run(capsys, "score", source, output, *model)
        assert (code, "no-such-bucket" in err) == (2, True), err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, _, err = run(capsys, "score", s3_uri, tmp_path / "out", *model)
    assert (code, "credentials" in err) == (2, True), err


def test_dry_run_and_print_config(capsys, tmp_path, images, small_models):
    command = ("score", images, tmp_path / "out", "--model", "small@1", "--models-uri", small_models)
    code, out, _ = run(capsys, *command, "--dry-run")
    assert code == 0
    assert "Would score 11 objects" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, *command, "--print-config")
    assert (code, f"output_uri: {tmp_path}/out" in out) == (0, True)


def test_model_list_show_verify(capsys, small_models):
    code, out, _ = run(capsys, "model", "list", "--models-uri", small_models)
    assert (code, "small@1" in out) == (0, True)
    code, out, _ = run(capsys, "model", "show", "small@1", "--models-uri", small_models)
    assert json.loads(out)["labels"] == ["legitimate", "phishing"]
    code, out, _ = run(capsys, "model", "verify", "small@1", "--models-uri", small_models)
    assert (code, "files as published" in out) == (0, True)
    code, out, _ = run(capsys, "model", "list", "--models-uri", f"{small_models}/small/1/variables")
    assert (code, "No models" in out) == (0, True)


def test_runs_list_show_diff_compact(capsys, tmp_path, images, small_models):
    command = ("score", images, tmp_path / "out", "--model", "small@1", "--models-uri", small_models)
    command = (*command, "--max-quarantine-rate", "0.2", "--date", "2026-11-23")
    code, out, _ = run(capsys, "runs", "list", tmp_path / "out")
    assert (code, "No runs" in out) == (0, True)
    run(capsys, *command)
    (images / "new.png").write_bytes(image_bytes(77))
    code, out, _ = run(capsys, *command, "--dry-run")
    assert (code, "Generation 2: 1 new, 0 changed and 0 retried objects." in out) == (0, True)
    code, out, _ = run(capsys, *command)
    assert (code, "Generation 2: 1 new, 0 changed and 0 retried objects." in out) == (0, True)
    partition = tmp_path / "out/date=2026-11-23/model=small/version=1"
    code, out, _ = run(capsys, "runs", "list", tmp_path / "out")
    assert (code, "2026-11-23" in out, "complete" in out) == (0, True, True)
    code, out, _ = run(capsys, "runs", "show", partition)
    assert code == 0
    assert re.search(r"scored +│ 11 ", out)
    code, out, _ = run(capsys, "runs", "show", partition, "--json")
    assert (code, json.loads(out)["generation"]) == (0, 2)
    code, out, _ = run(capsys, "runs", "diff", partition, partition, "--json")
    assert (code, json.loads(out)["shared"]) == (0, 11)
    code, out, _ = run(capsys, "runs", "diff", partition, partition)
    assert code == 0
    assert re.search(r"PSI +│ 0\.000 ", out)
    code, out, _ = run(capsys, "runs", "compact", partition, tmp_path / "compact")
    assert (code, f"Parquet: {tmp_path}/compact/cnn_ray-scores.parquet" in out) == (0, True)
    for wrong in (
        ("show", tmp_path / "none"),
        ("diff", partition, tmp_path / "none"),
        ("compact", partition, tmp_path / "out"),
    ):
        code, _, err = run(capsys, "runs", *wrong)
        assert (code in (2, 3), "Expected" in err, "Next:" in err) == (True, True, True), err


def test_accept_and_retry_are_flags(capsys, tmp_path, images, small_models):
    command = ("score", images, tmp_path / "out", "--model", "small@1", "--models-uri", small_models)
    code, _, err = run(capsys, *command)
    assert (code, "--accept" in err, "--retry-quarantined" in err) == (4, True, True)
    code, out, _ = run(capsys, *command, "--accept", "--retry-quarantined")
    assert (code, "1 retried" in out) == (0, True)


def test_a_bug_is_one_line(capsys, monkeypatch, tmp_path, images, small_models):
    from cnn_ray import planning

    monkeypatch.setattr(planning, "load_artifact", lambda *_: 1 / 0)
    code, _, err = run(capsys, "score", images, tmp_path / "o", "--model", "small@1", "--models-uri", small_models)
    assert (code, "ZeroDivisionError" in err, "CNN_RAY_DEBUG=1" in err) == (1, True, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_resumable_run(tmp_path, small_models, number):
    source = tmp_path / "in"
    source.mkdir()
    first = source / "shot-00000.png"
    first.write_bytes(image_bytes(1, size_px=(1200, 900)))
    for k in range(1, 800):  # enough to be still at work when a busy machine gets to the signal
        os.link(first, source / f"shot-{k:05d}.png")
    output = tmp_path / "out" / "model=small" / "version=1"
    command = [sys.executable, "-m", "cnn_ray.cli", "score", source, tmp_path / "out", "--model", "small@1"]
    command += ["--models-uri", small_models, "--shard-size", "16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(output.glob("part-*"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted. Run the same command to continue." in err
    assert "Traceback" not in err
    kept = {p.name: p.stat().st_mtime_ns for p in output.glob("part-*")}
    assert 2 <= len(kept) < 50
    assert not list(output.glob("_manifest*"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{16 * len(kept)} rows were kept from an earlier attempt." in again.stdout
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in output.glob("part-*")}.items()
    assert outputs.read(str(output)).num_rows == 800


def test_help_is_quick_and_imports_no_framework():
    code = (
        "import sys\ntry:\n    from cnn_ray.cli import main\n    main(sys.argv[1:])\nexcept SystemExit:\n"
        "    heavy = {'ray', 'tensorflow', 'keras', 'openvino', 'boto3', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(repr(heavy) if heavy else 0)"
    )
    for verb in ([], ["score"], ["train"], ["serve"], ["model", "list"], ["runs", "diff"]):
        arguments = [*verb, "--help"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Class folders with eight images each."""
    root = tmp_path / "labelled"
    for number, label in enumerate(("legitimate", "phishing")):
        (root / label).mkdir(parents=True)
        for k in range(8):
            (root / label / f"{k}.png").write_bytes(image_bytes(100 * number + k))
    return root


def test_evaluate_prints_figures_and_where_the_page_is(capsys, tmp_path, labelled, small_models):
    command = ("evaluate", "small@1", labelled, "--models-uri", small_models, "--output-uri", tmp_path / "out")
    code, out, _ = run(capsys, *command, "--bootstrap-samples", "100")
    assert code == 0
    assert re.search(r"images +│ 16 ", out)
    assert "8 negatives are too few" in " ".join(out.split())
    page = next(line for line in out.splitlines() if line.startswith("Page: ")).removeprefix("Page: ")
    assert Path(page).read_text().startswith("<!doctype html>")
    code, out, _ = run(capsys, *command, "--dry-run")
    assert (code, "Would evaluate small@1 on 16 images" in out) == (0, True)


def test_calibrate_and_promote_end_to_end(capsys, tmp_path, labelled, small_models):
    models = tmp_path / "models"
    shutil.copytree(small_models, models)
    judged = (labelled, "--models-uri", models, "--split", "all", "--bootstrap-samples", "100")
    code, out, _ = run(capsys, "model", "calibrate", "small@1", *judged, "--max-fpr", "0.2", "--dry-run")
    assert (code, "Nothing was written." in out) == (0, True)
    code, out, _ = run(capsys, "model", "calibrate", "small@1", *judged, "--max-fpr", "0.001")
    assert code == 0
    assert "8 negatives are too few for a false-positive rate of 0.10%, which needs 1,000" in out
    assert f"Model: small@2 in {models}/small/2" in out
    code, out, _ = run(capsys, "model", "promote", "small@2", *judged)
    assert (code, "takes it" in out) == (0, True)
    assert json.loads((models / "small" / "aliases.json").read_text()) == {"champion": 2}
    code, _, err = run(capsys, "model", "promote", "small@1", *judged, "--force")
    assert (code, "Expected --reason with --force" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "--resume", "nowhere"), 2, "Expected the folder of a training run"),
        (("train", "--resume", "nowhere", "--seed", "3"), 2, "Received: seed"),
        (("train", "--name", "x", "--data-uri", "nowhere"), 2, "nowhere"),
        (("train", "--name", "x", "--data-uri", "nowhere", "--train-schedule", "linear"), 2, "'cosine'"),
        (("evaluate", "small@1"), 2, "data"),
        (("compare", "--config", "nowhere.yaml"), 2, "No such file"),
        (("model", "promote", "small@1", "nowhere"), 3, "Expected model small@1"),
    ],
)
def test_mistakes_in_the_verbs_of_models_have_one_sentence(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    got, _, err = run(capsys, *arguments)
    assert got == code, err
    assert message in err


def test_a_guard_stops_a_training_before_ray_starts_and_can_be_allowed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, count in (("a", 30), ("b", 3)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for k in range(count):
            (tmp_path / "set" / label / f"{k}.png").write_bytes(image_bytes(1000 * ord(label) + k))
    command = ("train", "--name", "x", "--data-uri", "set", "--model-augmentation", "photo")
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "Expected a training without too_few_per_class" in err
    assert "--allow too_few_per_class" in err
    code, out, _ = run(capsys, *command, "--allow", "too_few_per_class,class_imbalance", "--dry-run")
    assert code == 0
    assert "Would train simple_cnn" in out


def test_a_preview_of_the_augmentation_is_drawn(capsys, tmp_path, labelled):
    command = ("train", "--name", "x", "--data-uri", labelled, "--preview-augmentation", tmp_path / "sheet.png")
    code, out, _ = run(capsys, *command, "--model-augmentation", "screenshot")
    assert (code, str(tmp_path / "sheet.png") in out) == (0, True)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, *command)
    assert (code, "Expected an augmentation to preview" in err) == (2, True)
