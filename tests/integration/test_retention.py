"""Old partitions removed: what is chosen, that a removal that dies at any step is finished, and what is left alone."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pytest
from factories import image_bytes, write_images

from cnn_ray import nightly_status, outputs, retention, score
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import PlanError, UnavailableError
from cnn_ray.lease import Lease
from cnn_ray.storage import LocalStore, open_store

OLD, NEW = date(2026, 1, 1), date(2026, 11, 24)
LATER = date(2099, 1, 1)
"""Long after the runs of these tests have ended: what decides then is `keep_days`."""


def run(models: str, source: Path, output: object, **changes) -> str:
    settings = {"model": "small@1", "models_uri": models, "input_uri": str(source), "output_uri": str(output)}
    settings |= {"runner": "local", "precision": "f32", "report": False, "shard_size": 4, "date": OLD}
    return score.run_score(ScoreConfig.model_validate({**settings, **changes})).partition_uri


@pytest.fixture
def two_generations(tmp_path, small_models) -> str:
    """A partition with everything that one can hold: two generations, quarantine, superseded rows."""
    source = write_images(tmp_path / "in", 6, bad=1)
    run(small_models, source, tmp_path / "out", max_quarantine_rate=0.5)
    (source / "shot-0000.png").write_bytes(image_bytes(77))
    return run(small_models, source, tmp_path / "out", max_quarantine_rate=0.5)


def left(uri: str) -> list[str]:
    return [key for key in open_store(uri).keys() if not key.startswith("_lease")]


def chosen(output: object, keep_days: int = 10, today: date = LATER) -> list[retention.Removable]:
    return retention.removable(str(output), keep_days, today)


def test_nothing_is_changed_by_looking(tmp_path, two_generations):
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    (found,) = chosen(tmp_path / "out")
    assert (found.uri, found.date, found.rows, found.resumes) == (two_generations, "2026-01-01", 7, False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_a_removed_partition_leaves_its_tombstone_and_owes_nothing(tmp_path, two_generations):
    names = left(two_generations)
    assert {name.split("-")[0] for name in names} >= {"part", "_plan", "_manifest", "_quarantine/quarantine"}
    assert any(name.startswith("_superseded/") for name in names)
    (found,) = chosen(tmp_path / "out")
    assert retention.remove(found)
    assert left(two_generations) == [nightly_status.TOMBSTONE]
    stone = retention.Tombstone.model_validate_json(open_store(two_generations).get(nightly_status.TOMBSTONE))
    assert (stone.status, stone.newest["generation"], stone.newest["planned"]) == ("removed", 2, 7)
    assert sorted(stone.manifests) == ["_manifest-g0001.json", "_manifest-g0002.json"]
    with pytest.raises(PlanError, match="no manifest"):
        outputs.read(two_generations)
    state = nightly_status.state_of(str(tmp_path / "out"), OLD, "small", 1, any_version=True)
    assert (state.state, state.detail) == ("done", "removed for its age")
    assert chosen(tmp_path / "out") == []


def test_files_of_others_stay(tmp_path, two_generations):
    (Path(two_generations) / "notes.txt").write_text("mine")
    (Path(two_generations) / "mine.parquet").write_text("mine")
    assert retention.remove(chosen(tmp_path / "out")[0])
    assert left(two_generations) == [nightly_status.TOMBSTONE, "mine.parquet", "notes.txt"]


def test_young_unfinished_and_used_partitions_are_left_alone(tmp_path, small_models):
    source = write_images(tmp_path / "in", 2)
    uri = run(small_models, source, tmp_path / "out")
    today = date.today()
    assert chosen(tmp_path / "out", 10, today) == []  # an old date, scored today
    assert chosen(tmp_path / "out", 10, today + timedelta(days=10)) == []
    assert len(chosen(tmp_path / "out", 10, today + timedelta(days=12))) == 1
    young = run(small_models, source, tmp_path / "young", date=LATER - timedelta(days=10))
    assert chosen(tmp_path / "young") == []
    assert len(chosen(tmp_path / "young", 9)) == 1
    with Lease(open_store(uri), 60):
        assert chosen(tmp_path / "out") == []
    (found,) = chosen(tmp_path / "out")
    with Lease(open_store(uri), 60):
        assert not retention.remove(found)
    outputs.read(uri)
    Path(young, "_manifest-g0001.json").unlink()
    assert chosen(tmp_path / "young", 9) == []


class DyingError(UnavailableError):
    """Storage goes away."""


def dying_after(monkeypatch, writes: int) -> None:
    """The store of the removal refuses from that write on."""
    done = []

    def wrap(name):
        real = getattr(LocalStore, name)

        def wrapped(self, key, *rest):
            if "_lease" not in key:
                done.append(key)
                if len(done) > writes:
                    raise DyingError("Expected an answer. Received: none. Next: try again later.")
            return real(self, key, *rest)

        monkeypatch.setattr(LocalStore, name, wrapped)

    for name in ("put", "delete"):
        wrap(name)


def test_a_removal_that_dies_anywhere_is_finished_by_the_next(tmp_path, two_generations, monkeypatch):
    whole = outputs.read(two_generations)
    (found,) = chosen(tmp_path / "out")
    monkeypatch.setattr(retention, "DELETE_THREADS", 1)
    steps = 0
    for writes in range(1, 60):
        with monkeypatch.context() as patch:
            dying_after(patch, 1)  # each attempt gets one step further
            try:
                if retention.remove(found):
                    break
            except DyingError:
                pass
        steps = writes
        try:  # a reader sees all rows or none
            assert outputs.read(two_generations).equals(whole)
        except PlanError as error:
            refused = str(error)
            assert "no manifest" in refused
        state = nightly_status.state_of(str(tmp_path / "out"), OLD, "small", 1, any_version=True).state
        assert state == "done"
        (found,) = chosen(tmp_path / "out", keep_days=100_000)  # a decision once taken holds
        assert (found.resumes, found.rows) == (True, 7)
    assert steps > 5
    assert left(two_generations) == [nightly_status.TOMBSTONE]


def test_a_run_that_began_after_the_removal_is_left_alone(tmp_path, small_models, two_generations, monkeypatch):
    (found,) = chosen(tmp_path / "out")
    with monkeypatch.context() as patch:
        dying_after(patch, 6)  # the tombstone, both manifests, both plans, `emptying`
        with pytest.raises(DyingError):
            retention.remove(found)
    (found,) = chosen(tmp_path / "out")
    assert found.resumes
    uri = run(small_models, tmp_path / "in", tmp_path / "out", max_quarantine_rate=0.5)
    rows = outputs.read(uri)
    assert chosen(tmp_path / "out", 100_000) == []
    assert not retention.remove(found)
    assert outputs.read(uri).equals(rows)
    (anew,) = chosen(tmp_path / "out")  # by its own age it is a run like any other
    assert not anew.resumes
    assert retention.remove(anew)
    assert left(uri) == [nightly_status.TOMBSTONE]


def test_a_new_run_that_only_has_its_plan_is_left_alone_too(tmp_path, two_generations, monkeypatch):
    plan = open_store(two_generations).get("_plan-g0001.json")
    with monkeypatch.context() as patch:
        dying_after(patch, 6)
        with pytest.raises(DyingError):
            retention.remove(chosen(tmp_path / "out")[0])
    open_store(two_generations).put("_plan-g0001.json", plan)
    before = left(two_generations)
    assert any(name.startswith("part-") for name in before)
    (found,) = chosen(tmp_path / "out")
    assert not retention.remove(found)
    assert left(two_generations) == before


def test_on_s3(tmp_path, small_models, s3_uri):
    uri = run(small_models, write_images(tmp_path / "in", 6, bad=1), f"{s3_uri}/out", max_quarantine_rate=0.5)
    (found,) = chosen(f"{s3_uri}/out")
    assert (found.uri, retention.remove(found)) == (uri, True)
    assert left(uri) == [nightly_status.TOMBSTONE]
    assert chosen(f"{s3_uri}/out") == []
