"""Generations on the local runner: what a second, third ... run of the same command fetches, writes and shows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from factories import image_bytes, write_images

from cnn_ray import manifests, outputs, planning, score
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import ConfigError, DataError, PlanError, QuarantineLimitError, UnavailableError
from cnn_ray.outputs import Partition
from cnn_ray.storage import LocalStore
from cnn_ray.tallies import tally_of


def config(models: str, source, output, **changes) -> ScoreConfig:
    settings = {"model": "small@1", "models_uri": models, "input_uri": str(source), "output_uri": str(output)}
    return ScoreConfig(**{**settings, "shard_size": 8, "runner": "local", "report": False, **changes})


def images_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.glob("*.png")}


def fresh(models, source, output) -> pa.Table:
    """What one undisturbed run over the input as it is now would say."""
    return outputs.read(score.run_score(config(models, source, output, max_quarantine_rate=1)).partition_uri)


ANSWER = ["uri", "etag", "size_bytes", "width_px", "height_px", "label", "score", "scores", "flagged"]


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the images that are read from now on."""
    names: list[str] = []
    get = LocalStore.get

    def noting(self, key, **options):
        if key.endswith(".png"):
            names.append(key)
        return get(self, key, **options)

    monkeypatch.setattr(LocalStore, "get", noting)
    return names


def check_totals(uri: str) -> manifests.Manifest:
    """The newest manifest, whose live totals are those of the rows that readers see."""
    manifest = Partition(uri).newest_manifest()
    assert manifest is not None
    rows, bad = outputs.read(uri), outputs.read_quarantine(uri)
    both = rows["uri"].to_pylist() + bad["uri"].to_pylist()
    assert len(set(both)) == len(both) == manifest.planned == manifest.scored + manifest.quarantined
    assert rows["uri"].to_pylist() == sorted(rows["uri"].to_pylist())
    counted = tally_of(rows, bad, 1)
    for name in ("scored", "quarantined", "flagged", "labels", "codes", "score_bins"):
        assert getattr(manifest, name) == getattr(counted, name), name
    shown = {row.uri for row in manifest.top}
    assert shown <= set(rows.filter(rows["flagged"])["uri"].to_pylist())
    assert {row.uri for row in manifest.bad} <= set(bad["uri"].to_pylist())
    return manifest


def test_only_new_and_changed_objects_are_fetched_and_readers_see_the_newest(
    tmp_path, small_models, fetched, monkeypatch
):
    source = write_images(tmp_path / "in", 40)
    settings = config(small_models, source, tmp_path / "out", max_quarantine_rate=0.2)
    uri = score.run_score(settings).partition_uri
    before = {p: p.read_bytes() for p in Path(uri).rglob("*g0001*")}
    fetched.clear()
    (source / "a-new.png").write_bytes(image_bytes(901))
    (source / "shot-0007.png").write_bytes(image_bytes(902))
    (source / "shot-0020.png").write_bytes(b"no image any more")
    (source / "shot-0030.png").unlink()
    result = score.run_score(settings)
    assert sorted(fetched) == ["a-new.png", "shot-0007.png", "shot-0020.png"]
    assert (result.changes.new, result.changes.changed, result.changes.removed) == (1, 2, 1)
    assert {p: p.read_bytes() for p in Path(uri).rglob("*g0001*")} == before
    manifest = check_totals(uri)
    assert (manifest.generation, manifest.planned, manifest.quarantined, manifest.removed) == (2, 41, 1, 1)
    assert [g.superseded for g in manifest.generations] == [0, 2]
    now, rows = fresh(small_models, source, tmp_path / "other"), outputs.read(uri)
    still_there = rows.filter(pa.compute.not_equal(rows["uri"], str(source / "shot-0030.png")))
    assert still_there.select(ANSWER).equals(now.select(ANSWER))
    assert outputs.read_quarantine(uri)["uri"].to_pylist() == [str(source / "shot-0020.png")]
    generation = dict(zip(rows["uri"].to_pylist(), rows["generation"].to_pylist(), strict=True))
    assert {Path(u).name for u, g in generation.items() if g == 2} == {"a-new.png", "shot-0007.png"}


def test_nothing_new_writes_nothing_also_when_objects_are_gone(tmp_path, small_models):
    source = write_images(tmp_path / "in", 9)
    settings = config(small_models, source, tmp_path / "out")
    score.run_score(settings)
    (source / "shot-0003.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = score.run_score(settings)
    assert (again.already_done, again.changes.removed, again.changes.rows) == (True, 1, 0)
    for path in source.iterdir():
        path.unlink()
    source.rmdir()
    gone = score.run_score(settings)
    assert (gone.already_done, gone.changes.removed) == (True, 9)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_three_generations_of_the_same_object(tmp_path, small_models):
    source = write_images(tmp_path / "in", 30)
    settings = config(small_models, source, tmp_path / "out")
    for seed in (800, 801, 802):
        uri = score.run_score(settings).partition_uri
        (source / "shot-0011.png").write_bytes(image_bytes(seed))
        (source / f"shot-00{seed - 785}.png").write_bytes(image_bytes(seed + 50))
    score.run_score(settings)
    manifest = check_totals(uri)
    assert (manifest.generation, manifest.planned, len(manifest.superseded)) == (4, 30, 3)
    assert outputs.read(uri).select(ANSWER).equals(fresh(small_models, source, tmp_path / "o").select(ANSWER))
    rows = {Path(r["uri"]).name: r["generation"] for r in outputs.read(uri).to_pylist()}
    assert (rows["shot-0011.png"], rows["shot-0015.png"], rows["shot-0016.png"], rows["shot-0000.png"]) == (4, 2, 3, 1)


def test_the_first_settings_bind_all_generations(tmp_path, small_models):
    source = write_images(tmp_path / "in", 4)
    score.run_score(config(small_models, source, tmp_path / "out"))
    (source / "new.png").write_bytes(image_bytes(99))
    for change in ({"max_image_pixels": 9}, {"limit": 2}):
        with pytest.raises(ConfigError, match=f"Expected {next(iter(change))}="):
            score.run_score(config(small_models, source, tmp_path / "out", **change))
    assert not list(Path(tmp_path / "out").rglob("_plan-g0002*"))


def test_a_run_with_a_limit_has_one_generation(tmp_path, small_models):
    source = write_images(tmp_path / "in", 4)
    settings = config(small_models, source, tmp_path / "out", limit=3)
    score.run_score(settings)
    (source / "a.png").write_bytes(image_bytes(99))
    assert score.run_score(settings).already_done
    with pytest.raises(ConfigError, match="--limit"):
        score.run_score(settings.model_copy(update={"retry_quarantined": True}))


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_damaged_superseded_file_is_refused(tmp_path, small_models, how):
    source = write_images(tmp_path / "in", 9)
    settings = config(small_models, source, tmp_path / "out")
    score.run_score(settings)
    (source / "shot-0001.png").write_bytes(image_bytes(99))
    uri = score.run_score(settings).partition_uri
    file = next(Path(uri, "_superseded").glob("*.parquet"))
    if how == "damaged":
        pq.write_table(pa.table({"uri": pa.array([], pa.string())}), file)
    else:
        file.unlink()
    with pytest.raises(PlanError, match=r"_superseded/superseded-g0002-00000\.parquet"):
        outputs.read(uri)


def test_an_open_generation_is_finished_first_and_newer_objects_follow_in_the_same_run(
    tmp_path, small_models, monkeypatch
):
    source = write_images(tmp_path / "in", 20)
    settings = config(small_models, source, tmp_path / "out")
    uri = score.run_score(settings).partition_uri
    (source / "shot-0001.png").write_bytes(image_bytes(700))

    def away(*_):
        raise UnavailableError("Expected an answer. Received: none. Next: try again later.")
        yield

    monkeypatch.setattr(score, "run_local", away)
    with pytest.raises(UnavailableError):
        score.run_score(settings)
    monkeypatch.undo()
    assert Path(uri, "_plan-g0002.json").exists()
    assert not Path(uri, "_manifest-g0002.json").exists()
    assert outputs.read(uri).num_rows == 20  # of generation 1, until the manifest of the second is there
    (source / "shot-0002.png").write_bytes(image_bytes(701))
    shown = score.dry_run(settings)
    assert (shown.generation, shown.resumes, shown.rows) == (2, True, 1)
    result = score.run_score(settings)
    assert [g.planned for g in result.manifest.generations] == [20, 1, 1]
    check_totals(uri)
    assert outputs.read(uri).select(ANSWER).equals(fresh(small_models, source, tmp_path / "o").select(ANSWER))


def test_dry_run_shows_the_next_generation_and_writes_nothing(tmp_path, small_models):
    source = write_images(tmp_path / "in", 20)
    settings = config(small_models, source, tmp_path / "out")
    score.run_score(settings)
    (source / "new.png").write_bytes(image_bytes(700))
    (source / "shot-0001.png").write_bytes(image_bytes(701))
    before = sorted((tmp_path / "out").rglob("*"))
    shown = score.dry_run(settings)
    assert (shown.generation, shown.rows, shown.changes.new, shown.changes.changed) == (2, 2, 1, 1)
    assert shown.bytes == sum((source / n).stat().st_size for n in ("new.png", "shot-0001.png"))
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_accept_releases_a_run_over_the_limit_and_later_ones_judge_what_comes_on_top(tmp_path, small_models, fetched):
    source = write_images(tmp_path / "in", 5, bad=3)
    settings = config(small_models, source, tmp_path / "out")
    with pytest.raises(QuarantineLimitError, match="--accept"):
        score.run_score(settings)
    fetched.clear()
    with pytest.raises(QuarantineLimitError):
        score.run_score(settings)
    result = score.run_score(settings.model_copy(update={"accept": True}))
    assert fetched == []
    assert (result.manifest.status, result.manifest.accepted, result.manifest.generation) == ("complete", 3, 2)
    assert outputs.read(result.partition_uri).num_rows == 5
    assert score.run_score(settings).already_done
    (source / "good.png").write_bytes(image_bytes(50))
    assert score.run_score(settings).manifest.status == "complete"
    (source / "bad-again.png").write_bytes(b"")
    with pytest.raises(QuarantineLimitError, match="beyond the 3 accepted"):
        score.run_score(settings)
    assert score.run_score(settings.model_copy(update={"accept": True})).manifest.accepted == 4


def test_accept_on_the_first_run(tmp_path, small_models):
    source = write_images(tmp_path / "in", 5, bad=3)
    result = score.run_score(config(small_models, source, tmp_path / "out", accept=True))
    assert (result.manifest.status, result.manifest.accepted, result.manifest.generation) == ("complete", 3, 1)


def test_mended_images_release_a_run_by_themselves(tmp_path, small_models):
    source = write_images(tmp_path / "in", 5, bad=3)
    settings = config(small_models, source, tmp_path / "out")
    with pytest.raises(QuarantineLimitError):
        score.run_score(settings)
    for number in range(3):
        (source / f"bad-000{number}.png").write_bytes(image_bytes(60 + number))
    manifest = score.run_score(settings).manifest
    assert (manifest.status, manifest.scored, manifest.quarantined, manifest.codes) == ("complete", 8, 0, {})
    check_totals(f"{tmp_path}/out/model=small/version=1")


def test_retry_scores_what_can_be_scored_now(tmp_path, small_models, monkeypatch, fetched):
    source = write_images(tmp_path / "in", 20, bad=3)
    settings = config(small_models, source, tmp_path / "out", max_quarantine_rate=0.5)
    get = LocalStore.get

    def denying(self, key, **options):
        if key == "shot-0004.png":
            from cnn_ray.errors import AccessDeniedError

            raise AccessDeniedError("Expected access. Received: 403. Next: allow it.")
        return get(self, key, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "get", denying)
        uri = score.run_score(settings).partition_uri
    assert outputs.read_quarantine(uri).num_rows == 4
    assert score.run_score(settings).already_done  # the etags are the planned ones
    (source / "bad-0001.png").unlink()
    fetched.clear()
    retry = settings.model_copy(update={"retry_quarantined": True})
    result = score.run_score(retry)
    assert sorted(fetched) == ["bad-0000.png", "bad-0002.png", "shot-0004.png"]
    assert (result.changes.retried, result.changes.removed, result.manifest.generations[-1].retry) == (3, 1, True)
    manifest = check_totals(uri)
    assert (manifest.scored, manifest.quarantined) == (20, 3)
    assert {Path(u).name for u in outputs.read_quarantine(uri)["uri"].to_pylist()} == {
        "bad-0000.png",
        "bad-0001.png",
        "bad-0002.png",
    }


def test_retry_and_accept_together(tmp_path, small_models):
    source = write_images(tmp_path / "in", 5, bad=3)
    settings = config(small_models, source, tmp_path / "out")
    with pytest.raises(QuarantineLimitError):
        score.run_score(settings)
    both = settings.model_copy(update={"accept": True, "retry_quarantined": True})
    manifest = score.run_score(both).manifest
    assert (manifest.status, manifest.accepted, manifest.generations[-1].planned) == ("complete", 3, 3)
    check_totals(f"{tmp_path}/out/model=small/version=1")


def test_manifest_inputs_grow_and_an_object_that_vanished_keeps_its_row(tmp_path, small_models):
    source = write_images(tmp_path / "in", 4)
    table = source / "list.csv"
    table.write_text("uri,brand,n\nshot-0000.png,a,1\nshot-0001.png,b,2\n")
    settings = config(small_models, table, tmp_path / "out")
    uri = score.run_score(settings).partition_uri
    table.write_text("uri,brand,n\nshot-0000.png,a,1\nshot-0001.png,b,2\nshot-0002.png,7,3\n")
    (source / "shot-0001.png").unlink()
    result = score.run_score(settings)
    assert (result.changes.new, result.changes.changed, result.changes.removed) == (1, 0, 1)
    rows = outputs.read(uri)
    assert rows["input_brand"].to_pylist() == ["a", "b", "7"]
    assert rows["input_n"].to_pylist() == ["1", "2", "3"]
    table.write_text(table.read_text() + "shot-0003.png,c,spring\n")
    score.run_score(settings)
    assert outputs.read(uri)["input_n"].to_pylist() == ["1", "2", "3", "spring"]


def test_plans_of_older_versions_keep_the_types_of_their_columns(tmp_path, small_models, monkeypatch):
    """Versions before text columns planned numbers: such a partition goes on with them, or says why it cannot."""
    source = write_images(tmp_path / "in", 3)
    table = source / "list.csv"
    table.write_text("uri,n\nshot-0000.png,1\n")
    settings = config(small_models, table, tmp_path / "out")
    listed = planning.list_inputs

    def typed(*arguments, **options):
        for rows in listed(*arguments, **options):
            yield rows.set_column(3, "input_n", rows["input_n"].cast("int64"))

    monkeypatch.setattr(planning, "list_inputs", typed)
    uri = score.run_score(settings).partition_uri
    monkeypatch.setattr(planning, "list_inputs", listed)
    table.write_text("uri,n\nshot-0000.png,1\nshot-0001.png,2\n")
    score.run_score(settings)
    assert outputs.read(uri)["input_n"].to_pylist() == [1, 2]
    table.write_text("uri,n\nshot-0000.png,1\nshot-0001.png,2\nshot-0002.png,spring\n")
    with pytest.raises(DataError, match="'n', as in earlier generations"):
        score.run_score(settings)


def test_generations_on_s3(tmp_path, small_models, s3_uri):
    from cnn_ray.storage import open_store

    store = open_store(f"{s3_uri}/in")
    for seed in range(12):
        store.put(f"shot-{seed:04d}.png", image_bytes(seed))
    settings = config(small_models, f"{s3_uri}/in", f"{s3_uri}/out")
    uri = score.run_score(settings).partition_uri
    store.put("shot-0003.png", image_bytes(300))
    store.put("shot-9999.png", image_bytes(301))
    result = score.run_score(settings)
    assert (result.changes.new, result.changes.changed) == (1, 1)
    check_totals(uri)
    assert outputs.read(uri).select(ANSWER).equals(fresh(small_models, f"{s3_uri}/in", f"{s3_uri}/o").select(ANSWER))


def test_the_superseded_files_are_cut_in_pieces(tmp_path, small_models, monkeypatch):
    monkeypatch.setattr(outputs, "SUPERSEDED_ROWS", 4)
    source = write_images(tmp_path / "in", 20)
    settings = config(small_models, source, tmp_path / "out")
    uri = score.run_score(settings).partition_uri
    for number in range(0, 20, 2):
        (source / f"shot-{number:04d}.png").write_bytes(image_bytes(500 + number))
    manifest = score.run_score(settings).manifest
    assert [ref.rows for ref in manifest.superseded] == [4, 4, 2]
    check_totals(uri)
    assert outputs.read(uri).select(ANSWER).equals(fresh(small_models, source, tmp_path / "o").select(ANSWER))
