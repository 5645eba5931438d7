import pyarrow as pa
import pytest

from cnn_ray.errors import ConfigError
from cnn_ray.partitions import fill_date, partition_uri
from cnn_ray.plan import Frozen, make_plan, page_rows, pending_shards, refuse_other_settings, shard_rows, shards_of
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
    after = frozen(**{"limit": 5, field: value + 1 if isinstance(value, int | float) else value + "x"})
    with pytest.raises(ConfigError, match=f"Expected {field}="):
        refuse_other_settings(before, after, "out")
    refuse_other_settings(before, before, "out")


def test_partition_names():
    from datetime import date

    assert partition_uri("out/", None, "m", 2) == "out/model=m/version=2"
    assert partition_uri("s3://b/p", date(2026, 1, 2), "m", 2) == "s3://b/p/date=2026-01-02/model=m/version=2"
    assert fill_date("s3://b/{date}/x", date(2026, 1, 2)) == "s3://b/2026-01-02/x"
