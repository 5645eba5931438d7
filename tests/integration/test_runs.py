"""Partitions looked at: list, compare, and the one file that plain readers read exactly."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from factories import image_bytes, publish_small_artifact, write_images

from cnn_ray import outputs, runs, score
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import ConfigError, QuarantineLimitError, UnavailableError
from cnn_ray.storage import LocalStore, open_store
from cnn_ray.tallies import psi, score_bins


def config(models: str, source, output, **changes) -> ScoreConfig:
    settings = {"model": "small@1", "models_uri": models, "input_uri": str(source), "output_uri": str(output)}
    return ScoreConfig(**{**settings, "shard_size": 8, "runner": "local", **changes})


@pytest.fixture
def two_generations(tmp_path, small_models) -> str:
    """A partition in which rows of generation 1 are superseded, one of them by a quarantined row."""
    source = write_images(tmp_path / "in", 30)
    settings = config(small_models, source, tmp_path / "out", max_quarantine_rate=0.5)
    score.run_score(settings)
    (source / "a.png").write_bytes(image_bytes(500))
    (source / "shot-0003.png").write_bytes(image_bytes(501))
    (source / "shot-0004.png").write_bytes(b"")
    return score.run_score(settings).partition_uri


def test_a_compacted_folder_is_exact_for_plain_readers(tmp_path, two_generations):
    expected = outputs.read(two_generations)
    assert pyarrow.dataset.dataset(two_generations).to_table().num_rows > expected.num_rows  # why it is needed
    folder = str(tmp_path / "compact")
    location = runs.compact_run(two_generations, folder)
    plain = pyarrow.dataset.dataset(folder).to_table()
    assert plain.replace_schema_metadata(None).equals(expected)
    names = duckdb.from_parquet(f"{folder}/*.parquet").order("uri").project("uri").fetchall()
    assert [name for (name,) in names] == expected["uri"].to_pylist()
    metadata = pq.read_schema(location).metadata
    assert metadata[b"cnn_ray.generation"] == b"2"
    assert metadata[b"cnn_ray.partition"].decode() == two_generations
    assert metadata[b"cnn_ray.manifest_sha256"].decode() == outputs.Partition(two_generations).manifest_digest(2)


def test_compacting_again_replaces_the_one_file(tmp_path, small_models, two_generations):
    folder = tmp_path / "compact"
    runs.compact_run(two_generations, str(folder))
    (tmp_path / "in" / "shot-0003.png").write_bytes(image_bytes(777))
    score.run_score(config(small_models, tmp_path / "in", tmp_path / "out", max_quarantine_rate=0.5))
    runs.compact_run(two_generations, str(folder))
    assert [path.name for path in folder.iterdir()] == [runs.COMPACT_NAME]
    now = pyarrow.dataset.dataset(folder).to_table().replace_schema_metadata(None)
    assert now.equals(outputs.read(two_generations))
    assert max(now["generation"].to_pylist()) == 3


def test_compaction_that_dies_leaves_the_old_file(tmp_path, two_generations, monkeypatch):
    folder = tmp_path / "compact"
    runs.compact_run(two_generations, str(folder))
    before = (folder / runs.COMPACT_NAME).read_bytes()

    def dying(*_):
        raise UnavailableError("Expected an answer. Received: none. Next: try again later.")

    monkeypatch.setattr(LocalStore, "put_file", dying)
    with pytest.raises(UnavailableError):
        runs.compact_run(two_generations, str(folder))
    assert [path.name for path in folder.iterdir()] == [runs.COMPACT_NAME]
    assert (folder / runs.COMPACT_NAME).read_bytes() == before


def test_compaction_refuses_folders_that_would_not_be_exact(tmp_path, small_models, two_generations):
    for folder in (two_generations, f"{two_generations}/compact", str(tmp_path / "out")):
        with pytest.raises(ConfigError, match="Expected"):
            runs.compact_run(two_generations, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"mine\.parquet"):
        runs.compact_run(two_generations, str(tmp_path / "other"))
    bad = write_images(tmp_path / "bad-in", 1, bad=3)
    with pytest.raises(QuarantineLimitError):
        score.run_score(config(small_models, bad, tmp_path / "bad"))
    with pytest.raises(QuarantineLimitError):
        runs.compact_run(f"{tmp_path}/bad/model=small/version=1", str(tmp_path / "c"))


def test_compaction_joins_generations_with_other_input_columns(tmp_path, small_models):
    source = write_images(tmp_path / "in", 3)
    (source / "list.csv").write_text("uri,a\nshot-0000.png,1\n")
    settings = config(small_models, source / "list.csv", tmp_path / "out")
    score.run_score(settings)
    (source / "list.csv").write_text("uri,b\nshot-0000.png,x\nshot-0001.png,y\n")
    uri = score.run_score(settings).partition_uri
    runs.compact_run(uri, str(tmp_path / "c"))
    table = pyarrow.dataset.dataset(tmp_path / "c").to_table()
    assert (table["input_a"].to_pylist(), table["input_b"].to_pylist()) == (["1", None], [None, "y"])


def test_compaction_to_s3(two_generations, s3_uri):
    location = runs.compact_run(two_generations, f"{s3_uri}/compact")
    assert location == f"{s3_uri}/compact/{runs.COMPACT_NAME}"
    raw = open_store(f"{s3_uri}/compact").get(runs.COMPACT_NAME)
    table = pq.read_table(pa.BufferReader(raw)).replace_schema_metadata(None)
    assert table.equals(outputs.read(two_generations))


def test_list_names_each_partition_and_its_state(tmp_path, small_models, monkeypatch):
    source = write_images(tmp_path / "in", 9, bad=1)
    score.run_score(config(small_models, source, tmp_path / "out", date="2026-11-23", max_quarantine_rate=1))
    with pytest.raises(QuarantineLimitError):
        score.run_score(config(small_models, source, tmp_path / "out", date="2026-11-24"))

    def away(*_):
        raise UnavailableError("Expected an answer. Received: none. Next: try again later.")
        yield

    monkeypatch.setattr(score, "run_local", away)
    with pytest.raises(UnavailableError):
        score.run_score(config(small_models, source, tmp_path / "out", date="2026-11-25"))
    found = runs.list_runs(str(tmp_path / "out"))
    assert [(r.date, r.model, r.version, r.status, r.open_generation) for r in found] == [
        ("2026-11-23", "small", 1, "complete", None),
        ("2026-11-24", "small", 1, "quarantine_limit", None),
        ("2026-11-25", "small", 1, "unfinished", 1),
    ]
    assert [r.uri for r in runs.list_runs(found[0].uri)] == [found[0].uri]


def test_diff_of_two_versions_over_the_uris_they_share(tmp_path):
    models = str(tmp_path / "models")
    publish_small_artifact(models, seed=0)
    publish_small_artifact(models, seed=1)
    source = write_images(tmp_path / "in", 40)
    one = score.run_score(config(models, source, tmp_path / "out")).partition_uri
    (source / "shot-0000.png").unlink()
    (source / "shot-0001.png").write_bytes(image_bytes(333))
    (source / "z.png").write_bytes(image_bytes(1))
    two = score.run_score(config(models, source, tmp_path / "out", model="small@2")).partition_uri
    found = runs.diff_runs(one, two)
    a, b = ({row["uri"]: row for row in outputs.read(uri).to_pylist()} for uri in (one, two))
    shared = sorted(a.keys() & b.keys())
    assert (found.shared, found.only_a, found.only_b, found.other_etag) == (39, 1, 1, 1)
    pairs = [(a[uri]["label"], b[uri]["label"]) for uri in shared]
    for before, row in found.label_changes.items():
        for now, count in row.items():
            assert count == pairs.count((before, now))
    assert sum(sum(row.values()) for row in found.label_changes.values()) == 39
    assert found.changed_labels == sum(x != y for x, y in pairs) > 0
    was, now = (np.array([rows[uri]["scores"][1] for uri in shared], np.float32) for rows in (a, b))
    assert found.shift_mean == pytest.approx(float((now - was).mean()), abs=1e-6)
    assert found.shift_quantiles["50%"] == pytest.approx(float(np.median(now - was)), abs=1e-6)
    assert found.psi == pytest.approx(psi(score_bins(was).tolist(), score_bins(now).tolist()))
    assert found.newly_flagged == sum(b[u]["flagged"] and not a[u]["flagged"] for u in shared)
    most = sorted(shared, key=lambda uri: -abs(float(now[shared.index(uri)] - was[shared.index(uri)])))[:10]
    assert [row.uri for row in found.most_changed] == most


def test_a_run_does_not_differ_from_itself(two_generations):
    found = runs.diff_runs(two_generations, two_generations)
    assert (found.changed_labels, found.psi, found.most_changed, found.only_a) == (0, 0.0, (), 0)
    assert found.shared == outputs.read(two_generations).num_rows


def test_show_is_the_newest_manifest(two_generations):
    manifest = runs.show_run(two_generations)
    assert [(g.generation, g.planned, g.superseded) for g in manifest.generations] == [(1, 30, 0), (2, 3, 2)]


def test_diff_needs_finished_runs(tmp_path, two_generations):
    with pytest.raises(Exception, match="no manifest"):
        runs.diff_runs(two_generations, str(Path(tmp_path) / "nothing"))
