import threading
from datetime import date

import pyarrow as pa
import pytest

import cnn_ray.plan as plan_module
from cnn_ray.errors import ConfigError
from cnn_ray.partitions import dateless_root, differs_by_day, fill_date, partition_uri
from cnn_ray.plan import (
    Frozen,
    auto_shard_size,
    largest_shard,
    make_plan,
    page_rows,
    pending_shards,
    refuse_other_settings,
    shard_rows,
    shards_of,
)
from cnn_ray.records import LISTING_SCHEMA


def frozen(**changes) -> Frozen:
    settings = {
        "input_uri": "/in",
        "uri_column": "uri",
        "model": "m",
        "version": 1,
        "model_digest": "d",
        "engine": "openvino",
        "precision": "f32",
        "threshold": 0.5,
        "max_image_pixels": 10,
        "max_image_bytes": 10,
        "shard_size": 100,
        "limit": None,
    }
    return Frozen(**{**settings, **changes})


def listing(count: int, start: int = 0) -> pa.Table:
    uris = [f"/in/{k:09d}.png" for k in range(start, start + count)]
    return pa.table([uris, [f"e{k}" for k in range(count)], list(range(count))], schema=LISTING_SCHEMA)


def test_every_row_is_in_exactly_one_shard_in_order():
    pages = {}
    batches = [listing(30_000), listing(20_001, 30_000)]
    plan = make_plan(batches, frozen(), pages.__setitem__)
    shards = shards_of(plan)
    rows = [shard_rows(pages[s.page], s.index) for s in shards]
    assert pa.concat_tables(rows).equals(pa.concat_tables(batches))
    assert [t.num_rows for t in rows] == [100] * 500 + [1]
    assert [s.index for s in shards] == list(range(501))
    assert len(pages) == 4
    assert plan.planned_rows == 50_001


def test_automatic_shards_begin_short_and_are_a_function_of_their_number():
    pages = {}
    plan = make_plan([listing(60_000)], frozen(shard_size=0), pages.__setitem__)
    rows = [shard_rows(pages[s.page], s.index) for s in shards_of(plan)]
    assert pa.concat_tables(rows).equals(listing(60_000))
    sizes = [t.num_rows for t in rows]
    assert sizes[:64] == [32, 64, 128] + [256] * 61
    assert sizes[64:128] == [512] * 64
    assert sizes[128:-1] == [1024] * 11
    assert all(page.rows <= plan_module.ROWS_PER_PAGE for page in plan.pages)


def test_a_million_rows_make_the_number_of_parts_that_is_promised():
    def parts(rows, largest=1024):
        shard = 0
        while rows > 0:
            rows, shard = rows - auto_shard_size(shard, largest), shard + 1
        return shard

    assert parts(1_000_000) == 1058
    assert parts(10) == 1


def test_no_automatic_shard_is_longer_than_the_largest():
    pages = {}
    plan = make_plan([listing(2_000)], frozen(shard_size=0, largest_shard=50), pages.__setitem__)
    sizes = [shard_rows(pages[s.page], s.index).num_rows for s in shards_of(plan)]
    assert sizes == [32] + [50] * 39 + [18]
    assert largest_shard(224, 224) == 1024
    assert largest_shard(640, 640) == 218
    assert largest_shard(100_000, 100_000) == 1


def test_pages_say_which_uris_they_hold():
    pages = {}
    plan = make_plan([listing(40_000)], frozen(shard_size=0), pages.__setitem__)
    assert len(plan.pages) >= 3
    for page in plan.pages:
        uris = page_rows(pages[page.name])["uri"].to_pylist()
        assert (page.first_uri, page.last_uri, page.rows) == (uris[0], uris[-1], len(uris))


def test_a_shard_longer_than_a_page_is_a_page():
    pages = {}
    plan = make_plan([listing(40_000)], frozen(shard_size=17_000), pages.__setitem__)
    assert [page.rows for page in plan.pages] == [17_000, 17_000, 6_000]


def test_a_page_that_cannot_be_written_ends_the_planning():
    written = []

    def write(name, _):
        written.append(name)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_plan((listing(16_000, k * 16_000) for k in range(100)), frozen(), write)
    assert len(written) <= 2 * plan_module.PAGES_AHEAD


def test_pages_are_written_side_by_side():
    together = threading.Barrier(2, timeout=20)
    plan = make_plan([listing(32_000)], frozen(), lambda *_: together.wait())
    assert len(plan.pages) == 2


def test_the_same_listing_gives_the_same_bytes_however_it_is_batched():
    one, two = {}, {}
    whole = listing(700)
    first = make_plan([whole], frozen(), one.__setitem__)
    second = make_plan([whole.slice(0, 250), whole.slice(250)], frozen(), two.__setitem__)
    assert one == two
    assert first == second


def test_limit_takes_the_first_rows():
    pages = {}
    plan = make_plan([listing(80), listing(80, 80)], frozen(limit=150), pages.__setitem__)
    assert plan.planned_rows == 150
    assert sum(page_rows(raw).num_rows for raw in pages.values()) == 150


def test_input_columns_travel():
    pages = {}
    table = listing(3).append_column("input_brand", pa.array(["a", None, "c"]))
    plan = make_plan([table], frozen(), pages.__setitem__)
    assert shard_rows(pages[plan.pages[0].name], 0)["input_brand"].to_pylist() == ["a", None, "c"]


def test_pending_shards_are_those_without_a_part():
    plan = make_plan([listing(250)], frozen(), {}.__setitem__)
    committed = ["part-g0001-00001.parquet", "_quarantine/quarantine-g0001-00000.parquet", "part-g0002-00000.parquet"]
    assert [s.index for s in pending_shards(plan, committed)] == [0, 2]


@pytest.mark.parametrize("field", list(Frozen.model_fields))
def test_each_setting_that_decides_answers_is_compared(field):
    before = frozen(limit=5)
    value = getattr(before, field)
    other = (*value, "x") if isinstance(value, tuple) else value + 1 if isinstance(value, int | float) else value + "x"
    after = frozen(**{"limit": 5, field: other})
    with pytest.raises(ConfigError, match=f"Expected {field}="):
        refuse_other_settings(before, after, "out")
    refuse_other_settings(before, before, "out")


def test_partition_names():
    assert partition_uri("out/", None, "m", 2) == "out/model=m/version=2"
    assert partition_uri("s3://b/p", date(2026, 1, 2), "m", 2) == "s3://b/p/date=2026-01-02/model=m/version=2"
    assert fill_date("s3://b/{date}/x", date(2026, 1, 2)) == "s3://b/2026-01-02/x"


@pytest.mark.parametrize(
    ("uri", "filled", "root", "each_day"),
    [
        ("s3://b/{year}/{month}/{day}/", "s3://b/2026/01/02/", "s3://b", True),
        ("s3://b/x/y={year}/m={month}/{date}.csv", "s3://b/x/y=2026/m=01/2026-01-02.csv", "s3://b/x", True),
        ("/in/{year}{month}{day}", "/in/20260102", "/in", True),
        ("/in/{date}/{date}", "/in/2026-01-02/2026-01-02", "/in", True),
        ("/{date}", "/2026-01-02", "/", True),
        ("{date}", "2026-01-02", ".", True),
        ("s3://shots-{year}/{month}", "s3://shots-2026/01", None, False),
        ("/in/{year}/all", "/in/2026/all", "/in", False),
        ("/in/{month}-{day}", "/in/01-02", "/in", False),
        ("/in/{{date}}", "/in/{date}", "/in/{date}", False),
        ("/in/{{{date}}}", "/in/{2026-01-02}", "/in", True),
        ("/a{{x}}/{day}{month}{year}", "/a{x}/02012026", "/a{x}", True),
        ("/in/plain", "/in/plain", "/in/plain", False),
    ],
)
def test_dates_in_inputs(uri, filled, root, each_day):
    assert fill_date(uri, date(2026, 1, 2)) == filled
    assert (dateless_root(uri), differs_by_day(uri)) == (root, each_day)


def test_plans_of_older_versions_know_no_patterns_and_take_all():
    old = frozen().model_dump_json(exclude={"include", "exclude", "follow_symlinks"})
    refuse_other_settings(Frozen.model_validate_json(old), frozen(), "out")
    with pytest.raises(ConfigError, match=r"Expected include=none, .* Received: \*\.png,\*\.jpg\."):
        refuse_other_settings(Frozen.model_validate_json(old), frozen(include=("*.png", "*.jpg")), "out")
