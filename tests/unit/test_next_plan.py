"""The comparison of listing and plans, against plain dictionaries, whatever the tables and generations are cut like."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn_ray import generations, sorted_rows
from cnn_ray.manifests import FORMAT, GenerationRecord, Manifest
from cnn_ray.object_lookup import ABSENT, DENIED
from cnn_ray.outputs import Partition
from cnn_ray.plan import Frozen, Plan, make_plan
from cnn_ray.records import LISTING_SCHEMA
from cnn_ray.sorted_rows import among, in_step, newest_rows
from cnn_ray.tallies import Tally

FROZEN = Frozen(
    input_uri="/in",
    uri_column="uri",
    model="m",
    version=1,
    model_digest="d",
    engine="openvino",
    precision="f32",
    threshold=0.5,
    max_image_pixels=10,
    max_image_bytes=10,
    shard_size=4,
    limit=None,
)


def table(rows: dict[str, str]) -> pa.Table:
    uris = sorted(rows, key=str.encode)
    return pa.table([uris, [rows[uri] for uri in uris], [1] * len(uris)], schema=LISTING_SCHEMA)


def cut(whole: pa.Table, draw: random.Random) -> list[pa.Table]:
    pieces, start = [], 0
    while start < whole.num_rows:
        size = draw.randint(0, 7)
        pieces.append(whole.slice(start, size))
        start += size
    return pieces


def manifest(generation: int, status: str = "complete") -> Manifest:
    record = GenerationRecord(
        generation=1, planned=0, scored=0, quarantined=0, superseded=0, removed=0, retry=False, parts=0,
        started_at="", finished_at="", images_per_s=0, wait_s=0, busy_s=0,
    )  # fmt: skip
    return Manifest(
        format=FORMAT, generation=generation, status=status, planned=0, **Tally().model_dump(), removed=0, accepted=0,
        parts=(), quarantine=(), superseded=(), generations=(record,), model="m", version=1, model_digest="d",
        label_names=("a", "b"), positive_label="b", threshold=0.5, engine="", precision="", runner="", config={},
        libraries={}, started_at="", finished_at="",
    )  # fmt: skip


def plan(partition: Partition, rows: dict[str, str], generation: int) -> Plan:
    return partition.write_plan(make_plan([table(rows)], FROZEN, partition.store.put_if_absent, generation))


def planned(pages: dict[str, bytes]) -> dict[str, str]:
    tables = [pq.read_table(io.BytesIO(raw)) for raw in pages.values()]
    return {row["uri"]: row["etag"] for one in tables for row in one.to_pylist()}


@pytest.mark.parametrize("seed", range(12))
def test_new_changed_and_removed_are_those_of_plain_dictionaries(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(sorted_rows, "STEP_ROWS", draw.choice([1, 3, 16]))
    partition, known = Partition(str(tmp_path)), {}
    names = [f"/in/{k:02d}{end}" for k in range(40) for end in ("", "é.png", "-b", "/c", "\U0001f600")]
    count = draw.randint(1, 4)
    for generation in range(1, count + 1):
        rows = {uri: f"e{draw.randint(0, 3)}" for uri in draw.sample(names, draw.randint(1, 60))}
        plan(partition, rows, generation)
        known |= rows
    now = {uri: f"e{draw.randint(0, 3)}" for uri in draw.sample(names, draw.randint(0, 100))}
    pages: dict[str, bytes] = {}
    following, changes = generations.next_plan(partition, manifest(count), cut(table(now), draw), pages.__setitem__)
    due = {uri: etag for uri, etag in now.items() if known.get(uri) != etag}
    assert planned(pages) == due
    assert changes.new == len(now.keys() - known.keys())
    assert changes.changed == len(due) - changes.new
    assert changes.removed == len(known.keys() - now.keys())
    assert changes.size_bytes == len(due)
    assert (following is None) == (not due)
    if following is not None:
        assert (following.generation, following.planned_rows, following.removed) == (
            count + 1,
            len(due),
            changes.removed,
        )


def test_what_cannot_be_read_replaces_nothing(tmp_path):
    partition = Partition(str(tmp_path))
    plan(partition, {"/in/a": "e", "/in/b": "e", "/in/c": ABSENT, "/in/d": "e"}, 1)
    now = {"/in/a": ABSENT, "/in/b": DENIED, "/in/c": ABSENT, "/in/d": "e", "/in/e": ABSENT}
    pages: dict[str, bytes] = {}
    _, changes = generations.next_plan(partition, manifest(1), [table(now)], pages.__setitem__)
    assert planned(pages) == {"/in/e": ABSENT}  # named for the first time: a row, told as not_found
    assert (changes.new, changes.changed, changes.removed) == (1, 0, 1)


def test_an_object_that_appears_is_planned(tmp_path):
    partition = Partition(str(tmp_path))
    plan(partition, {"/in/a": ABSENT, "/in/b": DENIED}, 1)
    pages: dict[str, bytes] = {}
    generations.next_plan(partition, manifest(1), [table({"/in/a": "e", "/in/b": "e"})], pages.__setitem__)
    assert planned(pages) == {"/in/a": "e", "/in/b": "e"}


def test_accept_alone_makes_an_empty_plan_only_over_the_limit(tmp_path):
    partition = Partition(str(tmp_path))
    plan(partition, {"/in/a": "e"}, 1)
    arguments = ([table({"/in/a": "e"})], lambda *_: None)
    assert generations.next_plan(partition, manifest(1), *arguments, accept=True)[0] is None
    assert generations.next_plan(partition, manifest(1, "quarantine_limit"), *arguments)[0] is None
    empty, _ = generations.next_plan(partition, manifest(1, "quarantine_limit"), *arguments, accept=True)
    assert empty is not None
    assert (empty.planned_rows, empty.shards, empty.accept) == (0, 0, True)


@pytest.mark.parametrize("seed", range(6))
def test_in_step_yields_each_row_once_and_equal_uris_together(monkeypatch, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(sorted_rows, "STEP_ROWS", draw.choice([1, 5]))
    streams = [{f"/{draw.randint(0, 60):02d}": str(k) for _ in range(40)} for k in range(3)]
    seen: list[list[str]] = [[], [], []]
    ranges: list[set[str]] = []
    for step in in_step([cut(table(rows), draw) for rows in streams]):
        here = [[] if rows is None else rows["uri"].to_pylist() for rows in step]
        for k, uris in enumerate(here):
            seen[k] += uris
        ranges.append({uri for uris in here for uri in uris})
    assert seen == [sorted(rows) for rows in streams]
    assert sum(len(one) for one in ranges) == len(set().union(*ranges))


def test_newest_rows_are_those_of_the_first_table():
    one, two = table({"/a": "new", "/c": "new"}), table({"/a": "old", "/b": "old"})
    joined = newest_rows([one, None, two])
    assert joined is not None
    assert dict(zip(joined["uri"].to_pylist(), joined["etag"].to_pylist(), strict=True)) == {
        "/a": "new",
        "/b": "old",
        "/c": "new",
    }
    assert newest_rows([None]) is None
    assert among(two["uri"], [one, None]).to_pylist() == [True, False]
    assert among(two["uri"], [None]).to_pylist() == [False, False]
