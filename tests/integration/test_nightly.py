"""Nights with a frozen clock and a real model: what is owed, in which order, who waits, and how a call ends."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from factories import publish_small_artifact, write_images

from cnn_ray import nightly, nightly_status, outputs
from cnn_ray.artifact import set_alias
from cnn_ray.config import NightlyConfig
from cnn_ray.errors import ConfigError, NotFoundError, UnavailableError
from cnn_ray.lease import Lease
from cnn_ray.nightly_calendar import calendar, foresee
from cnn_ray.readiness import is_empty, why_not_ready
from cnn_ray.storage import open_store

TODAY = date(2026, 11, 25)
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
D22, D23, D24 = date(2026, 11, 22), date(2026, 11, 23), date(2026, 11, 24)


class FrozenClock(nightly.Clock):
    """Stands still; sleeping moves it, and calls what a test wants to happen meanwhile."""

    def __init__(self, now: datetime, on_sleep=lambda: None) -> None:
        self.at, self.slept, self.on_sleep = now, [], on_sleep

    def now(self) -> datetime:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += timedelta(seconds=seconds)
        self.on_sleep()


@pytest.fixture
def make(tmp_path, small_models):
    """A function that makes a configuration over tmp_path; keywords of `score` and of nightly together."""

    def config(**changes) -> NightlyConfig:
        score = {
            "model": changes.pop("model", "small@1"),
            "models_uri": changes.pop("models_uri", small_models),
            "input_uri": changes.pop("input_uri", f"{tmp_path}/in/{{date}}"),
            "output_uri": changes.pop("output_uri", f"{tmp_path}/out"),
            "precision": "f32",
            "exclude": changes.pop("score_exclude", []),
            "runner": "local",
            "report": False,
            "shard_size": changes.pop("shard_size", 4),
        }
        return NightlyConfig.model_validate({"score": score, "look_back_days": 3, **changes})

    return config


def images(tmp_path: Path, day: date, count: int = 3, bad: int = 0) -> Path:
    return write_images(tmp_path / "in" / day.isoformat(), count, bad)


def partition(tmp_path: Path, day: date, version: int = 1) -> str:
    return f"{tmp_path}/out/date={day}/model=small/version={version}"


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def ends(result: nightly.NightlyResult) -> dict[str, tuple[str, int]]:
    return {r.date.isoformat()[5:]: (r.state, r.exit_code) for r in result.dates}


def test_missed_nights_heal_and_a_second_call_writes_nothing_into_partitions(tmp_path, make):
    for day in (D22, D23, D24):
        images(tmp_path, day)
    seen = []
    result = nightly.run_nightly(make(), TODAY, on_progress=lambda day, p: seen.append(day))
    assert ends(result) == {"11-22": ("done", 0), "11-23": ("done", 0), "11-24": ("done", 0)}
    assert result.exit_code == 0
    assert list(dict.fromkeys(seen)) == [D22, D23, D24]
    assert all(outputs.read(partition(tmp_path, day)).num_rows == 3 for day in (D22, D23, D24))
    before = files(tmp_path / "out")
    again = nightly.run_nightly(make(), TODAY)
    assert again.exit_code == 0
    after = files(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == {"_nightly.json"}


def test_a_date_without_images_waits_or_is_done_as_configured(tmp_path, make):
    images(tmp_path, D22)
    (tmp_path / "in" / "2026-11-23").mkdir()
    (tmp_path / "in/2026-11-23/.DS_Store").write_text("x")
    (tmp_path / "in/2026-11-23/about.json").write_text("{}")
    waits = nightly.run_nightly(make(first_date=D24), TODAY, clock=FrozenClock(NOON))
    assert ends(waits)["11-24"] == ("owed", 75)
    config = make(empty_date="done", score_exclude=["*.json"])
    assert [s.detail for s in foresee(config, TODAY, NOON)][2].startswith("would be done: no image in its input")
    result = nightly.run_nightly(config, TODAY, clock=FrozenClock(NOON))
    assert ends(result) == {"11-22": ("done", 0), "11-23": ("done", 0), "11-24": ("done", 0)}
    assert result.exit_code == 0
    shown = calendar(config, TODAY)
    assert [(s.state, s.detail) for s in shown[1:]] == [("done", nightly_status.NO_IMAGE)] * 2
    assert not (tmp_path / "out/date=2026-11-24").exists()


def test_an_empty_date_that_is_done_is_not_looked_at_again_until_it_may_wait(tmp_path, make, monkeypatch):
    config = make(empty_date="done")
    assert nightly.run_nightly(config, TODAY, clock=FrozenClock(NOON)).exit_code == 0
    before = nightly_status.read_status(config.score.output_uri).models["small"].dates
    images(tmp_path, D23)
    with monkeypatch.context() as patch:
        patch.setattr(nightly, "why_not_ready", lambda *_: pytest.fail("it was looked at"))
        again = nightly.run_nightly(config, TODAY, clock=FrozenClock(NOON))
    assert (again.exit_code, ends(again)["11-23"]) == (0, ("done", 0))
    assert nightly_status.read_status(config.score.output_uri).models["small"].dates == before
    waits = nightly.run_nightly(make(), TODAY, clock=FrozenClock(NOON))
    assert ends(waits) == {"11-22": ("owed", 75), "11-23": ("done", 0), "11-24": ("owed", 75)}
    assert outputs.read(partition(tmp_path, D23)).num_rows == 3


def test_an_empty_date_is_given_the_time_that_the_call_waits_and_to_its_end(tmp_path, make):
    clock = FrozenClock(NOON, on_sleep=lambda: images(tmp_path, D24))
    config = make(empty_date="done", wait_timeout_s=60, look_back_days=1)
    assert ends(nightly.run_nightly(config, TODAY, clock=clock)) == {"11-24": ("done", 0)}
    assert outputs.read(partition(tmp_path, D24)).num_rows == 3
    today = make(empty_date="done", lag_days=0, look_back_days=1)
    assert ends(nightly.run_nightly(today, TODAY, clock=FrozenClock(NOON))) == {"11-25": ("owed", 75)}


def test_an_empty_manifest_is_an_empty_date_and_a_missing_one_is_late(tmp_path, make):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/2026-11-24.csv").write_text("uri\n")
    config = make(empty_date="done", input_uri=f"{tmp_path}/in/{{year}}-{{month}}-{{day}}.csv", look_back_days=2)
    result = nightly.run_nightly(config, TODAY, clock=FrozenClock(NOON))
    assert ends(result) == {"11-23": ("owed", 75), "11-24": ("done", 0)}
    assert ends(nightly.run_nightly(config, TODAY, clock=FrozenClock(NOON)))["11-24"] == ("done", 0)


def test_a_marker_that_is_missing_is_no_empty_date(tmp_path, make):
    late = make(empty_date="done", wait_for_marker="_SUCCESS", look_back_days=1)
    assert ends(nightly.run_nightly(late, TODAY, clock=FrozenClock(NOON))) == {"11-24": ("owed", 75)}


@pytest.mark.parametrize("layout", ["{year}/{month}/{day}", "y={year}/{date}", "{year}{month}{day}"])
def test_nights_of_any_layout_of_dates(tmp_path, make, layout, s3_uri):
    for number, day in enumerate((D23, D24)):
        folder = layout.format(date=day, year=f"{day:%Y}", month=f"{day:%m}", day=f"{day:%d}")
        for path in images(tmp_path, day, count=number + 1).iterdir():
            open_store(f"{s3_uri}/in/{folder}").put(path.name, path.read_bytes())
    result = nightly.run_nightly(make(input_uri=f"{s3_uri}/in/{layout}", look_back_days=2), TODAY)
    assert result.exit_code == 0
    assert [outputs.read(partition(tmp_path, day)).num_rows for day in (D23, D24)] == [1, 2]


def test_newest_first_and_a_bounded_catch_up(tmp_path, make):
    for day in (D22, D23, D24):
        images(tmp_path, day)
    config = make(order="newest", max_dates=2)
    result = nightly.run_nightly(config, TODAY)
    assert ends(result) == {"11-22": ("owed", 75), "11-23": ("done", 0), "11-24": ("done", 0)}
    assert result.exit_code == 75
    assert "max_dates 2" in result.dates[0].detail
    assert nightly.run_nightly(config, TODAY).exit_code == 0


def test_dates_are_utc_whatever_the_zone_and_its_daylight_saving(tmp_path, make, monkeypatch):
    def window(*moment: int) -> list[str]:
        result = nightly.run_nightly(make(), clock=FrozenClock(datetime(*moment, tzinfo=UTC)))
        return [r.date.isoformat() for r in result.dates]

    try:
        for zone in ("Europe/Berlin", "America/New_York", "Pacific/Kiritimati", "UTC"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            # 02:30 in Berlin comes twice in this night; at 22:30 UTC the day before Berlin already has the 25th
            assert (
                window(2026, 10, 25, 0, 30) == window(2026, 10, 25, 1, 30) == ["2026-10-22", "2026-10-23", "2026-10-24"]
            )
            assert window(2026, 10, 24, 22, 30) == ["2026-10-21", "2026-10-22", "2026-10-23"]
            # 02:30 does not exist here
            assert window(2026, 3, 29, 0, 59) == window(2026, 3, 29, 1, 1) == ["2026-03-26", "2026-03-27", "2026-03-28"]
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_leap_day(tmp_path, make):
    leap = date(2028, 2, 29)
    images(tmp_path, leap)
    result = nightly.run_nightly(make(look_back_days=1), clock=FrozenClock(datetime(2028, 3, 1, 2, tzinfo=UTC)))
    assert ends(result) == {"02-29": ("done", 0)}
    assert outputs.read(partition(tmp_path, leap)).num_rows == 3
    no_leap = nightly.run_nightly(make(look_back_days=1), clock=FrozenClock(datetime(2027, 3, 1, 2, tzinfo=UTC)))
    assert [r.date for r in no_leap.dates] == [date(2027, 2, 28)]


def test_first_date_and_lag(tmp_path, make):
    images(tmp_path, TODAY)
    result = nightly.run_nightly(make(lag_days=0, first_date=TODAY, look_back_days=5), TODAY)
    assert ends(result) == {"11-25": ("done", 0)}


def test_a_marker_is_waited_for_and_is_no_image(tmp_path, make):
    folder = images(tmp_path, D24)
    clock = FrozenClock(datetime(2026, 11, 25, 2, tzinfo=UTC))
    config = make(look_back_days=1, wait_for_marker="_SUCCESS", wait_timeout_s=100)
    result = nightly.run_nightly(config, clock=clock)
    assert (result.exit_code, ends(result)) == (75, {"11-24": ("owed", 75)})
    assert result.dates[0].detail == f"waits for {folder}/_SUCCESS"
    assert sum(clock.slept) == 100
    assert not (tmp_path / "out/date=2026-11-24").exists()

    clock = FrozenClock(clock.at, on_sleep=lambda: len(clock.slept) == 2 and (folder / "_SUCCESS").touch())
    assert nightly.run_nightly(config, clock=clock).exit_code == 0
    assert sum(clock.slept) == 2 * nightly.POLL_S
    assert outputs.read(partition(tmp_path, D24)).num_rows == 3
    assert outputs.read_quarantine(partition(tmp_path, D24)).num_rows == 0


def test_a_date_that_is_complete_and_empty_owes_nothing(tmp_path, make):
    folder = images(tmp_path, D24, 0)
    config = make(look_back_days=1, wait_for_marker="_DONE")
    assert nightly.run_nightly(config, TODAY).exit_code == 75
    (folder / "_DONE").touch()
    assert ends(nightly.run_nightly(config, TODAY)) == {"11-24": ("done", 0)}
    assert [s.state for s in calendar(config, TODAY)] == ["done"]
    assert [s.state for s in calendar(make(look_back_days=1), TODAY)] == ["done"]


def test_without_a_marker_a_date_without_screenshots_stays_owed(tmp_path, make):
    result = nightly.run_nightly(make(look_back_days=1), TODAY)
    assert (result.exit_code, result.dates[0].detail) == (75, f"waits for the first screenshot in {tmp_path}/in/{D24}")


def test_a_young_object_is_waited_for(tmp_path, make):
    images(tmp_path, D24)
    now = datetime.now(UTC)
    config = make(look_back_days=1, lag_days=(now.date() - D24).days, min_age_s=600)
    young = nightly.run_nightly(config, now.date(), clock=FrozenClock(now + timedelta(seconds=300)))
    assert young.exit_code == 75
    assert "newest object" in young.dates[0].detail
    old = nightly.run_nightly(config, now.date(), clock=FrozenClock(now + timedelta(seconds=610)))
    assert old.exit_code == 0, old


def test_marker_and_age_on_s3(make, s3_uri):
    store = open_store(s3_uri)
    config = make(input_uri=f"{s3_uri}/in/{{date}}", wait_for_marker="_SUCCESS", min_age_s=600)
    now = datetime.now(UTC)
    assert why_not_ready(config, D24, now) == f"waits for {s3_uri}/in/{D24}/_SUCCESS"
    store.put(f"in/{D24}/a.png", b"x")
    store.put(f"in/{D24}/_SUCCESS", b"")
    assert "is 600 s old" in str(why_not_ready(config, D24, now + timedelta(seconds=590)))
    assert why_not_ready(config, D24, now + timedelta(seconds=620)) is None
    assert not is_empty(config, D24)
    assert is_empty(config, D23)
    manifest = make(input_uri=f"{s3_uri}/in/{{date}}.csv")
    assert why_not_ready(manifest, D24, now) == f"waits for {s3_uri}/in/{D24}.csv"
    store.put(f"in/{D24}.csv", b"uri\na.png\n")
    assert why_not_ready(manifest, D24, now) is None


def test_a_bucket_that_is_not_there_is_no_reason_to_wait(make, s3_uri):
    with pytest.raises(NotFoundError):
        nightly.run_nightly(make(input_uri="s3://no-such-bucket/{date}"), TODAY)


def test_over_the_quarantine_limit_is_4_once_told_and_not_looped_on(tmp_path, make):
    images(tmp_path, D23, 3, bad=3)
    images(tmp_path, D24)
    config = make(look_back_days=2)
    result = nightly.run_nightly(config, TODAY)
    assert (result.exit_code, ends(result)) == (4, {"11-23": ("failed", 4), "11-24": ("done", 0)})
    before = files(tmp_path / "out/date=2026-11-23")
    again = nightly.run_nightly(config, TODAY)
    assert (again.exit_code, ends(again)) == (4, {"11-23": ("failed", 4), "11-24": ("done", 0)})
    assert files(tmp_path / "out/date=2026-11-23") == before
    assert [s.state for s in calendar(config, TODAY)] == ["failed", "done"]


def test_what_is_owed_counts_more_than_what_failed(tmp_path, make):
    images(tmp_path, D23, 3, bad=3)
    assert nightly.run_nightly(make(look_back_days=2), TODAY).exit_code == 75


def test_a_held_date_is_left_alone_and_the_others_go_on(tmp_path, make):
    for day in (D23, D24):
        images(tmp_path, day)
    config = make(look_back_days=2)
    with Lease(open_store(partition(tmp_path, D23)), 60):
        result = nightly.run_nightly(config, TODAY)
        assert (result.exit_code, ends(result)) == (75, {"11-23": ("running", 75), "11-24": ("done", 0)})
        assert [s.state for s in calendar(config, TODAY)] == ["running", "done"]
        assert f"process {os.getpid()}" in calendar(config, TODAY)[0].detail
    assert nightly.run_nightly(config, TODAY).exit_code == 0


def test_another_version_at_work_on_the_date_counts(tmp_path, make):
    images(tmp_path, D24)
    with Lease(open_store(partition(tmp_path, D24, version=7)), 60):
        result = nightly.run_nightly(make(look_back_days=1), TODAY)
    assert ends(result) == {"11-24": ("running", 75)}
    assert not Path(partition(tmp_path, D24)).exists()


def test_a_run_that_outlives_its_budget_keeps_what_it_committed(tmp_path, make):
    images(tmp_path, D23, 12)
    images(tmp_path, D24, 2)
    config = make(look_back_days=2, date_budget_s=2.0)
    slow = lambda day, p: time.sleep(10 if day == D23 and p.rows else 0)  # noqa: E731
    start = time.monotonic()
    result = nightly.run_nightly(config, TODAY, on_progress=slow)
    assert (result.exit_code, ends(result)) == (75, {"11-23": ("owed", 75), "11-24": ("done", 0)})
    assert time.monotonic() - start < 10
    kept = list(Path(partition(tmp_path, D23)).glob("part-*"))
    assert kept
    assert not list(Path(partition(tmp_path, D23)).glob("_manifest*"))
    assert calendar(config, TODAY)[0].detail == "stopped after its 2 s; what is committed is kept"
    assert foresee(config, TODAY, datetime.now(UTC))[0].detail == "would be finished"
    stamps = [p.stat().st_mtime_ns for p in kept]
    assert nightly.run_nightly(make(look_back_days=2), TODAY).exit_code == 0
    assert [p.stat().st_mtime_ns for p in kept] == stamps
    assert outputs.read(partition(tmp_path, D23)).num_rows == 12


def test_a_damaged_partition_is_3_and_the_others_go_on(tmp_path, make):
    for day in (D23, D24):
        images(tmp_path, day)
    Path(partition(tmp_path, D23)).mkdir(parents=True)
    Path(partition(tmp_path, D23), "_manifest-g0001.json").write_text("{")
    result = nightly.run_nightly(make(look_back_days=2), TODAY)
    assert (result.exit_code, ends(result)) == (3, {"11-23": ("failed", 3), "11-24": ("done", 0)})


def test_a_warning_of_the_report_is_drift(tmp_path, make):
    images(tmp_path, D23, 3)
    images(tmp_path, D24, 12)
    result = nightly.run_nightly(make(look_back_days=2), TODAY)
    assert result.exit_code == 0
    assert (result.dates[0].drift, result.dates[1].drift) == (
        (),
        ("12 screenshots were planned, 3 before (+300.0%).",),
    )
    known = nightly_status.read_status(f"{tmp_path}/out").models["small"].dates
    assert known["2026-11-24"].drift == result.dates[1].drift


def test_the_alias_is_resolved_once_and_a_new_version_owes_nothing_by_itself(tmp_path, make):
    models = f"{tmp_path}/models"
    for seed in (0, 1):
        publish_small_artifact(models, seed=seed)
    set_alias(models, "small", "champion", 1)
    for day in (D23, D24):
        images(tmp_path, day)
    settings = {"model": "small@champion", "models_uri": models, "look_back_days": 2}
    moved = lambda *_: set_alias(models, "small", "champion", 2)  # noqa: E731
    result = nightly.run_nightly(make(**settings), TODAY, on_progress=moved)
    assert (result.reference, [r.version for r in result.dates]) == ("small@1", [1, 1])
    again = nightly.run_nightly(make(**settings), TODAY)
    assert (again.reference, again.exit_code, [r.version for r in again.dates]) == ("small@2", 0, [1, 1])
    assert not Path(partition(tmp_path, D24, version=2)).exists()
    anew = nightly.run_nightly(make(**settings, rescore_new_version=True), TODAY)
    assert (anew.exit_code, [r.version for r in anew.dates]) == (0, [2, 2])
    assert outputs.read(partition(tmp_path, D24, version=2)).num_rows == 3


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_status_object_keeps_what_others_write_at_the_same_time(tmp_path, place, request):
    output = f"{tmp_path}/out" if place == "local" else f"{request.getfixturevalue('s3_uri')}/out"
    template = {"state": "done", "detail": "x", "exit_code": 0, "version": 1, "at": "2026-11-25T00:00:00+00:00"}

    def write(number: int) -> None:
        day = str(date(2026, 1, 1) + timedelta(days=number))
        new = nightly_status.DateRecord.model_validate(template)
        nightly_status.record(
            output, f"m{number % 2}", lambda known: known.model_copy(update={"dates": {**known.dates, day: new}})
        )

    writes = 24 if place == "local" else 4
    with ThreadPoolExecutor(writes // 2) as pool:
        list(pool.map(write, range(writes)))
    status = nightly_status.read_status(output)
    assert {name: len(model.dates) for name, model in status.models.items()} == {"m0": writes // 2, "m1": writes // 2}


def test_a_damaged_status_object_costs_no_night(tmp_path, make, caplog):
    images(tmp_path, D24)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_nightly.json").write_text("{")
    assert nightly.run_nightly(make(look_back_days=1), TODAY).exit_code == 0
    assert outputs.read(partition(tmp_path, D24)).num_rows == 3


def test_old_records_are_dropped(tmp_path):
    new = nightly_status.DateRecord(state="done", detail="", exit_code=0, version=1, at="")
    days = {str(date(2024, 1, 1) + timedelta(days=k)): new for k in range(500)}
    nightly_status.record(str(tmp_path), "m", lambda known: known.model_copy(update={"dates": days}))
    kept = json.loads((tmp_path / "_nightly.json").read_text())["models"]["m"]["dates"]
    assert sorted(kept) == sorted(days)[-nightly_status.KEEP_DAYS :]


def test_a_call_waits_for_the_one_that_works_and_finds_it_done(tmp_path, make):
    images(tmp_path, D24)
    held = Lease(open_store(partition(tmp_path, D24)), 60)
    clock = FrozenClock(datetime(2026, 11, 25, 2, tzinfo=UTC), on_sleep=lambda: held.__exit__(None, None, None))
    with held:
        result = nightly.run_nightly(make(look_back_days=1, wait_timeout_s=100), clock=clock)
    assert (result.exit_code, clock.slept) == (0, [nightly.POLL_S])


def test_a_bug_in_one_date_is_1_and_the_others_go_on(tmp_path, make, monkeypatch):
    for day in (D23, D24):
        images(tmp_path, day)
    real = nightly.run_score

    def buggy(config, *rest):
        if config.date == D23:
            raise ZeroDivisionError("x")
        return real(config, *rest)

    monkeypatch.setattr(nightly, "run_score", buggy)
    result = nightly.run_nightly(make(look_back_days=2), TODAY)
    assert (result.exit_code, ends(result)) == (1, {"11-23": ("failed", 1), "11-24": ("done", 0)})
    assert result.dates[0].detail == "a bug: ZeroDivisionError: x"


def test_no_secret_of_an_error_is_stored_or_sent(tmp_path, make, monkeypatch):
    images(tmp_path, D24)
    key = "cnnray_" + "a" * 52
    sent: list[dict] = []

    def refuses(*arguments) -> None:
        raise ConfigError(f"Expected nothing. Received: https://me:hunter2@store/?X-Amz-Signature=0badf00d and {key}.")

    monkeypatch.setattr(nightly, "run_score", refuses)
    monkeypatch.setattr(nightly, "post_json", lambda url, message: sent.append(message))
    hook = {"webhook_url": "https://hooks.example.com/x", "webhook_hosts": ["hooks.example.com"]}
    result = nightly.run_nightly(
        make(look_back_days=1, **hook), TODAY, clock=FrozenClock(datetime(2026, 11, 25, 2, tzinfo=UTC))
    )

    kept = (tmp_path / "out" / "_nightly.json").read_text()
    for told in (kept, json.dumps(sent), result.dates[0].detail):
        assert "Received" in told
        assert not any(secret in told for secret in (key, "hunter2", "0badf00d"))


def test_storage_that_is_away_ends_the_call_early(tmp_path, make, monkeypatch):
    for day in (D22, D23, D24):
        images(tmp_path, day)

    def away(config, *_):
        raise UnavailableError("Expected an answer. Received: none. Next: try again later.")

    monkeypatch.setattr(nightly, "run_score", away)
    result = nightly.run_nightly(make(), TODAY)
    assert (result.exit_code, {r.state for r in result.dates}) == (75, {"owed"})
    assert [r.detail.partition(":")[0] for r in result.dates[1:]] == ["left to the next call"] * 2


def test_the_calendar_believes_partitions_more_than_records(tmp_path, make):
    images(tmp_path, D23, 3, bad=3)
    images(tmp_path, D24)
    config = make(look_back_days=2)
    assert nightly.run_nightly(config, TODAY).exit_code == 4
    for day in (D23, D24):
        shutil.rmtree(partition(tmp_path, day))
    assert [(s.state, s.detail) for s in calendar(config, TODAY)] == [("owed", "no run yet")] * 2
    busy = nightly_status.DateRecord(state="running", detail="x", exit_code=75, version=1, at="")
    known = {D24.isoformat(): busy}
    nightly_status.record(f"{tmp_path}/out", "small", lambda model: model.model_copy(update={"dates": known}))
    assert [s.state for s in calendar(config, TODAY)] == ["owed", "owed"]


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("name", ["{date}.parquet", "{date}.parquet/", "{date}/*.parquet"])
def test_a_folder_of_parquet_files_is_ready_when_it_has_some(make, tmp_path, s3_uri, place, name):
    base = str(tmp_path / "lists") if place == "local" else f"{s3_uri}/lists"
    folder = f"{base}/{name}".replace("/*.parquet", "").rstrip("/").replace("{date}", str(D24))
    config = make(input_uri=f"{base}/{name}", min_age_s=60)
    marked = make(input_uri=f"{base}/{name}", wait_for_marker="_SUCCESS")
    now = datetime.now(UTC)
    assert (why_not_ready(config, D24, now) or "").startswith("waits for ")
    store = open_store(folder)
    store.put("part-0.parquet", b"x")
    assert "is 60 s old" in (why_not_ready(config, D24, now + timedelta(seconds=30)) or "")
    assert why_not_ready(config, D24, now + timedelta(seconds=90)) is None
    assert (why_not_ready(marked, D24, now + timedelta(seconds=90)) or "").startswith("waits for ")
    store.put("_SUCCESS", b"")
    assert why_not_ready(marked, D24, now + timedelta(seconds=90)) is None
