"""The scoring run on the local runner: what is written, resumed, refused. test_ray.py compares the Ray runner."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet
import pytest
from factories import image_bytes, publish_small_artifact, write_images

from cnn_ray import outputs, planning, score, stages
from cnn_ray.artifact import load_artifact
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import (
    AccessDeniedError,
    BusyError,
    ConfigError,
    DataError,
    NotFoundError,
    PlanError,
    QuarantineLimitError,
    UnavailableError,
)
from cnn_ray.images import ImageCaps, decode
from cnn_ray.lease import Lease
from cnn_ray.near_duplicates import picture_hash
from cnn_ray.predictor import load_predictor
from cnn_ray.records import SCORE_SCHEMA, RowFailure
from cnn_ray.storage import LocalStore, open_store


def config(models: str, source, output, **changes) -> ScoreConfig:
    settings = {"model": "small@1", "models_uri": models, "input_uri": str(source), "output_uri": str(output)}
    return ScoreConfig(**{**settings, "shard_size": 8, "runner": "local", "report": False, **changes})


def partition(output) -> str:
    return f"{output}/model=small/version=1"


def test_each_file_is_in_exactly_one_of_parts_and_quarantine(tmp_path, small_models):
    source = write_images(tmp_path / "in" / "deep", 20, bad=2).parent
    result = score.run_score(config(small_models, source, tmp_path / "out", max_quarantine_rate=0.2))
    good = outputs.read(result.partition_uri)
    bad = outputs.read_quarantine(result.partition_uri)
    assert sorted(good["uri"].to_pylist() + bad["uri"].to_pylist()) == sorted(str(p) for p in source.rglob("*.png"))
    assert dict(zip(bad["uri"].to_pylist(), bad["code"].to_pylist(), strict=True)) == {
        str(source / "deep/bad-0000.png"): "empty",
        str(source / "deep/bad-0001.png"): "not_an_image",
    }
    assert result.manifest.planned == result.manifest.scored + result.manifest.quarantined == 22


def test_rows_hold_what_the_predictor_says(tmp_path, small_models, small_artifact):
    source = write_images(tmp_path / "in", 10)
    table = outputs.read(score.run_score(config(small_models, source, tmp_path / "out")).partition_uri)
    assert table.schema.equals(SCORE_SCHEMA)
    predictor = load_predictor(small_artifact)
    for row in table.to_pylist():
        image = decode(Path(row["uri"]).read_bytes(), (32, 32), ImageCaps())
        assert not isinstance(image, RowFailure)
        scores = predictor.predict(image.pixels[None])[0]
        assert row["scores"] == scores.tolist()
        assert row["label"] == small_artifact.labels[int(np.argmax(scores))]
        assert row["score"] == scores.max()
        assert row["flagged"] == (scores[1] >= 0.5)
        assert (row["width_px"], row["height_px"], row["generation"]) == (40, 30, 1)
        assert (row["model_name"], row["model_version"], row["run_date"]) == ("small", 1, None)
        assert row["sha256"] == hashlib.sha256(Path(row["uri"]).read_bytes()).hexdigest()
        assert row["phash"] == picture_hash(image.pixels)


def test_quarantined_rows_have_the_hash_of_the_bytes_that_were_read(tmp_path, small_models):
    source = write_images(tmp_path / "in", 4, bad=2)
    lines = ["uri", *(str(path) for path in sorted(source.iterdir())), "gone.png"]
    (source / "list.csv").write_text("\n".join(lines))
    settings = config(small_models, source / "list.csv", tmp_path / "out", max_quarantine_rate=1)
    bad = outputs.read_quarantine(score.run_score(settings).partition_uri)
    found = dict(zip(bad["uri"].to_pylist(), bad["sha256"].to_pylist(), strict=True))
    assert found == {
        str(source / "bad-0000.png"): hashlib.sha256(b"").hexdigest(),
        str(source / "bad-0001.png"): hashlib.sha256((source / "bad-0001.png").read_bytes()).hexdigest(),
        str(source / "gone.png"): None,
    }


@pytest.mark.parametrize(("first", "second"), [(None, "2026-11-23"), ("2026-11-23", None)])
def test_dated_and_undated_runs_do_not_share_an_output(tmp_path, small_models, first, second):
    source = write_images(tmp_path / "in", 2)
    score.run_score(config(small_models, source, tmp_path / "out", date=first))
    with pytest.raises(ConfigError, match="choose another OUTPUT"):
        score.run_score(config(small_models, source, tmp_path / "out", date=second))
    again = score.run_score(config(small_models, source, tmp_path / "out", date=first))
    assert again.manifest.scored == 2


def test_a_partition_of_another_format_is_refused(tmp_path, small_models):
    source = write_images(tmp_path / "in", 2)
    uri = Path(score.run_score(config(small_models, source, tmp_path / "out")).partition_uri)
    manifest = uri / "_manifest-g0001.json"
    older = json.loads(manifest.read_text()) | {"format": 2}
    manifest.write_text(json.dumps(older))
    for use in (
        lambda: outputs.read(str(uri)),
        lambda: score.run_score(config(small_models, source, tmp_path / "out")),
    ):
        with pytest.raises(PlanError, match="Received: format 2"):
            use()


def test_plain_readers_see_one_table(tmp_path, small_models):
    source = write_images(tmp_path / "in", 20, bad=1)
    settings = config(small_models, source, tmp_path / "out", date="2026-11-23", report=True)
    uri = score.run_score(settings).partition_uri
    page = (Path(uri) / "_report.html").read_text()
    assert "images/s over" in page
    assert "came from earlier attempts" not in page
    by_manifest = outputs.read(uri)
    plain = pyarrow.dataset.dataset(tmp_path / "out", partitioning="hive").to_table()
    assert plain.select(["uri", "label", "score"]).equals(by_manifest.select(["uri", "label", "score"]))
    assert set(plain["date"].to_pylist()) == {"2026-11-23"}
    rows = duckdb.from_parquet(f"{tmp_path}/out/**/part-*.parquet", hive_partitioning=True)
    assert rows.order("uri").project("uri").fetchall() == [(u,) for u in by_manifest["uri"].to_pylist()]
    quarantine = pyarrow.dataset.dataset(f"{uri}/_quarantine").to_table()
    assert quarantine.equals(outputs.read_quarantine(uri))


def test_a_second_run_is_a_no_op(tmp_path, small_models):
    source = write_images(tmp_path / "in", 9)
    settings = config(small_models, source, tmp_path / "out")
    first = score.run_score(settings)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    again = score.run_score(settings)
    assert again.already_done
    assert again.manifest == first.manifest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_a_run_resumes_without_fetching_what_is_committed(tmp_path, small_models, monkeypatch):
    source = write_images(tmp_path / "in", 40)
    fetched: list[str] = []
    fail_at = 25
    get = LocalStore.get

    def failing_get(self, key, **options):
        if key.startswith("shot-"):
            fetched.append(key)
            if len(fetched) == fail_at:
                raise UnavailableError("Expected an answer. Received: none. Next: try again later.")
        return get(self, key, **options)

    monkeypatch.setattr(LocalStore, "get", failing_get)
    settings = config(small_models, source, tmp_path / "out", fetch_concurrency=1)
    with pytest.raises(UnavailableError):
        score.run_score(settings)
    committed = len(list(Path(partition(tmp_path / "out")).glob("part-*"))) * 8
    fetched.clear()
    fail_at = 0
    result = score.run_score(settings)
    assert result.resumed_rows == committed > 0
    assert len(fetched) == 40 - committed
    undisturbed = score.run_score(config(small_models, source, tmp_path / "other"))
    assert outputs.read(result.partition_uri).equals(outputs.read(undisturbed.partition_uri))


def test_changed_and_vanished_objects_are_named(tmp_path, small_models, monkeypatch):
    source = write_images(tmp_path / "in", 4)
    listing = planning.list_inputs

    def listing_then_change(*arguments, **options):
        yield from listing(*arguments, **options)
        (source / "shot-0001.png").unlink()
        (source / "shot-0002.png").write_bytes(image_bytes(77))

    monkeypatch.setattr(planning, "list_inputs", listing_then_change)
    uri = score.run_score(config(small_models, source, tmp_path / "out", max_quarantine_rate=1)).partition_uri
    assert outputs.read_quarantine(uri)["code"].to_pylist() == ["not_found", "changed"]


@pytest.mark.parametrize(
    "change",
    [{"shard_size": 4}, {"max_image_pixels": 100}, {"max_image_bytes": 99}, {"engine": "tensorflow"}, {"limit": 3}],
)
def test_a_rerun_that_would_answer_otherwise_is_refused(tmp_path, small_models, change):
    source = write_images(tmp_path / "in", 4)
    score.run_score(config(small_models, source, tmp_path / "out"))
    with pytest.raises(ConfigError, match=f"Expected {next(iter(change))}="):
        score.run_score(config(small_models, source, tmp_path / "out", **change))


def test_parallelism_may_differ(tmp_path, small_models):
    source = write_images(tmp_path / "in", 4)
    score.run_score(config(small_models, source, tmp_path / "out"))
    assert score.run_score(
        config(small_models, source, tmp_path / "out", batch_size=1, fetch_concurrency=3)
    ).already_done


def test_too_many_bad_files_end_with_a_manifest_that_readers_refuse(tmp_path, small_models):
    source = write_images(tmp_path / "in", 5, bad=3)
    settings = config(small_models, source, tmp_path / "out")
    for _ in range(2):  # the second run does not score again, and says the same
        with pytest.raises(QuarantineLimitError, match="3 of 8"):
            score.run_score(settings)
    with pytest.raises(QuarantineLimitError):
        outputs.read(partition(tmp_path / "out"))


def test_readers_refuse_an_unfinished_or_damaged_run(tmp_path, small_models):
    source = write_images(tmp_path / "in", 5)
    with pytest.raises(PlanError, match="no manifest"):
        outputs.read(partition(tmp_path / "out"))
    uri = score.run_score(config(small_models, source, tmp_path / "out")).partition_uri
    part = next(Path(uri).glob("part-*"))
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(PlanError, match="other bytes"):
        outputs.read(uri)


def test_one_commit_must_account_for_every_planned_row(tmp_path):
    from cnn_ray.plan import Shard
    from cnn_ray.records import QUARANTINE_SCHEMA

    where = outputs.Partition(str(tmp_path))
    with pytest.raises(PlanError, match="Expected 1 rows"):
        where.commit_part(Shard(1, 0, "p"), SCORE_SCHEMA.empty_table(), QUARANTINE_SCHEMA.empty_table(), 1, 1)
    assert where.committed_names(1) == []


def test_manifest_inputs_keep_their_columns(tmp_path, small_models):
    source = write_images(tmp_path / "in", 3)
    (source / "list.csv").write_text(
        "file,brand\nshot-0000.png,a\nshot-0002.png,b\nmissing.png,c\nhttp://host/x.png,d\n../../etc/passwd,e\n"
    )
    settings = config(small_models, source / "list.csv", tmp_path / "out", uri_column="file", max_quarantine_rate=1)
    uri = score.run_score(settings).partition_uri
    good, bad = outputs.read(uri), outputs.read_quarantine(uri)
    assert good["uri"].to_pylist() == [str(source / "shot-0000.png"), str(source / "shot-0002.png")]
    assert good["input_brand"].to_pylist() == ["a", "b"]
    assert sorted(zip(bad["uri"].to_pylist(), bad["code"].to_pylist(), strict=True)) == [
        ("../../etc/passwd", "uri_not_allowed"),
        (str(source / "missing.png"), "not_found"),
        ("http://host/x.png", "uri_not_allowed"),
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_manifest_formats_agree(tmp_path, small_models, suffix):
    source = write_images(tmp_path / "in", 3)
    table = pa.table({"uri": ["shot-0001.png", str(source / "shot-0000.png")], "n": [1, 2]})
    file = source / f"list.{suffix}"
    if suffix == "csv":
        pyarrow.csv.write_csv(table, file)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    uri = score.run_score(config(small_models, file, tmp_path / "out")).partition_uri
    assert outputs.read(uri)["input_n"].to_pylist() == ["2", "1"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("uri\na.png\na.png\n", "twice"),
        ("file\na.png\n", "Expected a column 'uri'"),
        ("", "Expected a header and rows"),
        ("uri\n", "Expected images"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, small_models, text, error):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=error):
        score.run_score(config(small_models, tmp_path / "list.csv", tmp_path / "out"))


def test_empty_and_missing_inputs_are_refused(tmp_path, small_models):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Expected images"):
        score.run_score(config(small_models, tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(NotFoundError):
        score.run_score(config(small_models, tmp_path / "nowhere", tmp_path / "out"))


def test_access_denied_on_every_row_is_no_row_code(tmp_path, small_models, monkeypatch):
    source = write_images(tmp_path / "in", 40)
    get = LocalStore.get
    denied = "shot-"

    def denying_get(self, key, **options):
        if key.startswith(denied):
            raise AccessDeniedError("Expected access. Received: 403. Next: allow it.")
        return get(self, key, **options)

    monkeypatch.setattr(LocalStore, "get", denying_get)
    with pytest.raises(AccessDeniedError, match="on every row"):
        score.run_score(config(small_models, source, tmp_path / "out"))
    assert not list(Path(partition(tmp_path / "out")).glob("part-*"))
    denied = "shot-000"  # ten of forty rows, one whole shard among them: these are rows
    uri = score.run_score(config(small_models, source, tmp_path / "out", max_quarantine_rate=0.5)).partition_uri
    assert outputs.read_quarantine(uri)["code"].to_pylist() == ["access_denied"] * 10


def test_a_second_run_waits_for_the_first(tmp_path, small_models):
    source = write_images(tmp_path / "in", 4)
    settings = config(small_models, source, tmp_path / "out")
    Path(partition(tmp_path / "out")).mkdir(parents=True)
    with Lease(open_store(partition(tmp_path / "out")), 60), pytest.raises(BusyError, match="works on it since"):
        score.run_score(settings)
    assert not score.run_score(settings).already_done  # the lease was released


def test_dry_run_writes_nothing(tmp_path, small_models):
    source = write_images(tmp_path / "in", 20)
    plan = score.dry_run(config(small_models, source, tmp_path / "out"))
    assert (plan.rows, plan.shards, plan.engine) == (20, 3, "openvino")
    assert plan.precision in ("f32", "bf16")  # as this CPU has it
    assert not (tmp_path / "out").exists()


def test_two_versions_score_side_by_side(tmp_path):
    models = str(tmp_path / "models")
    publish_small_artifact(models, seed=0)
    publish_small_artifact(models, seed=1)
    source = write_images(tmp_path / "in", 5)
    one = score.run_score(config(models, source, tmp_path / "out"))
    two = score.run_score(config(models, source, tmp_path / "out", model="small@2"))
    assert one.partition_uri != two.partition_uri
    assert not outputs.read(one.partition_uri)["score"].equals(outputs.read(two.partition_uri)["score"])
    assert load_artifact(models, "small@2").version == 2


def test_scoring_on_openvino_imports_no_tensorflow(tmp_path, small_models):
    source = write_images(tmp_path / "in", 3)
    code = (
        "import sys; from cnn_ray import score; from cnn_ray.config import ScoreConfig; "
        f"score.run_score(ScoreConfig(model='small@1', models_uri={small_models!r}, input_uri={str(source)!r}, "
        f"output_uri={str(tmp_path / 'out')!r})); "
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras', 'ray', 'openvino_telemetry.main')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_rows_that_do_not_add_up_never_reach_the_manifest(tmp_path, small_models, monkeypatch):
    source = write_images(tmp_path / "in", 5)
    scored = stages._scored_table
    monkeypatch.setattr(stages, "_scored_table", lambda *a: scored(*a).slice(1))
    with pytest.raises(PlanError, match="Expected 5 rows"):
        score.run_score(config(small_models, source, tmp_path / "out"))
    assert not list(Path(partition(tmp_path / "out")).glob("_manifest*"))


def test_what_a_manifest_says_of_an_object_is_checked(tmp_path, small_models):
    source = write_images(tmp_path / "in", 3)
    store = LocalStore(str(source))
    infos = [store.head(f"shot-{k:04d}.png") for k in range(3)]
    rows = [(infos[0].etag, infos[0].size_bytes), (infos[1].etag, 7), ("1-2", infos[2].size_bytes)]
    text = "".join(f"shot-{k:04d}.png,{etag},{size}\n" for k, (etag, size) in enumerate(rows))
    (source / "list.csv").write_text(f"uri,etag,size\n{text}")
    settings = config(small_models, source / "list.csv", tmp_path / "out", max_quarantine_rate=1)
    uri = score.run_score(settings).partition_uri
    assert outputs.read(uri)["uri"].to_pylist() == [f"{source}/shot-0000.png"]
    assert outputs.read_quarantine(uri)["code"].to_pylist() == ["changed", "changed"]


@pytest.mark.parametrize("name", ["lists.parquet", "lists.parquet/", "lists/*.parquet", "lists"])
def test_output_inside_of_a_folder_that_is_read_is_refused(tmp_path, small_models, name):
    folder = tmp_path / name.split("/")[0]
    with pytest.raises(ConfigError, match="outside of INPUT"):
        score.run_score(config(small_models, f"{tmp_path}/{name}", folder / "out"))
