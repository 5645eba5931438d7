"""What a manifest's rows become: etags, sizes, duplicates, names of columns, and few requests for many rows."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cnn_ray import allowed_uris, inputs, object_lookup, storage_s3
from cnn_ray.errors import AccessDeniedError, DataError
from cnn_ray.manifest_listing import ManifestOptions
from cnn_ray.object_lookup import ABSENT, NOT_ALLOWED, look_up
from cnn_ray.storage import open_store
from cnn_ray.stores import Stores


def listing(folder, text, name="m.csv", **options):
    (folder / name).write_text(text)
    (table,) = inputs.list_inputs(str(folder / name), "uri", (), ManifestOptions(**options))
    return table


def refused(folder, text, **options):
    with pytest.raises(DataError) as caught:
        listing(folder, text, **options)
    return str(caught.value)


@pytest.fixture
def requests(monkeypatch):
    """Every request to S3, by its operation."""
    made = []
    once = storage_s3.S3Store._once

    def counted(self, operation, **arguments):
        made.append(operation)
        return once(self, operation, **arguments)

    monkeypatch.setattr(storage_s3.S3Store, "_once", counted)
    return made


def test_etags_and_sizes_of_the_manifest_need_no_request(tmp_path, requests):
    text = 'uri,etag,size,note\ns3://bk/x.png,"""0a1b""",10,1\ns3://bk/a.png,0c,0,2\nhttps://h/a,0d,7,3\n'
    table = listing(tmp_path, text)
    assert table.to_pylist() == [
        {"uri": "https://h/a", "etag": NOT_ALLOWED, "size_bytes": 0, "input_note": "3"},
        {"uri": "s3://bk/a.png", "etag": "0c", "size_bytes": 0, "input_note": "2"},
        {"uri": "s3://bk/x.png", "etag": "0a1b", "size_bytes": 10, "input_note": "1"},
    ]
    assert not requests


def test_rows_without_etag_or_size_are_asked_about(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(b"12345")
    text = "uri,etag,size_bytes\na,wrong,\nb,,5\nc,W/x,9\ngone,old,\nd,old,4\n"
    rows = {row["uri"].rpartition("/")[2]: row for row in listing(tmp_path, text).to_pylist()}
    etag_of = {name: open_store(str(tmp_path)).head(name).etag for name in "abcd"}
    assert rows["a"]["etag"] == "wrong", "it ends as changed"
    assert (rows["b"]["etag"], rows["c"]["etag"], rows["d"]["etag"]) == (etag_of["b"], etag_of["c"], "old")
    assert rows["gone"]["etag"] == ABSENT
    assert {name: row["size_bytes"] for name, row in rows.items()} == {"a": 5, "b": 5, "c": 5, "gone": 0, "d": 4}


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("a b,1", "an etag"),
        ("absent,1", "an etag"),
        ('"x\ny",1', "an etag"),
        ("0a,1.5", "a number of bytes"),
        ("0a,-1", "a number of bytes"),
        ("0a,99999999999999999999", "a number of bytes"),
    ],
)
def test_what_is_no_etag_or_size_is_refused_with_its_row(tmp_path, cells, words):
    message = refused(tmp_path, f"uri,etag,size\na,,\nb,{cells}\n")
    assert words in message
    assert "row 2 (line 3)" in message
    (tmp_path / "b").write_bytes(b"x")
    table = listing(tmp_path, f"uri,etag,size\na,,\nb,{cells}\n", etag_column="none")
    assert {"input_etag", "input_size"} <= set(table.column_names)


def test_columns_of_etags_can_be_named(tmp_path):
    text = "uri,md5,bytes,etag\ns3://bk/a,0a,3,x\n"
    table = listing(tmp_path, text, etag_column="md5", size_column="bytes")
    assert table.to_pylist() == [{"uri": "s3://bk/a", "etag": "0a", "size_bytes": 3, "input_etag": "x"}]
    assert "'checksum'" in refused(tmp_path, text, etag_column="checksum")


@pytest.mark.parametrize("text", ["uri,c\na,1\n,2\n,3\n", "uri,c\na,1\n \t,2\n", 'c,uri\n1,a\n2,""\n'])
def test_a_row_without_a_location_is_named(tmp_path, text):
    assert "row 2 (line 3)" in refused(tmp_path, text)


@pytest.mark.parametrize("text", ["uri\n", "uri,etag,size\n", "uri,etag,size,x\n\n"])
@pytest.mark.parametrize("on_duplicate", ["error", "first"])
def test_a_header_alone_is_a_listing_without_rows(tmp_path, text, on_duplicate):
    assert listing(tmp_path, text, on_duplicate=on_duplicate).num_rows == 0


def test_missing_columns_get_a_hint(tmp_path):
    assert "--uri-column" in refused(tmp_path, "path,c\na,1\n")
    assert "separate the cells by commas, not by ';'" in refused(tmp_path, "uri;c\na;1\n")


def test_duplicates_are_refused_with_their_rows_or_the_first_is_taken(tmp_path):
    text = f"uri,n\na,1\nb,2\n./a,3\n{tmp_path}/b,4\nfile://{tmp_path}/a,5\n"
    message = refused(tmp_path, text)
    assert f"{tmp_path}/a twice, in row 1 (line 2) and row 3 (line 4) (3 rows repeat an earlier one)" in message
    assert [row["input_n"] for row in listing(tmp_path, text, on_duplicate="first").to_pylist()] == ["1", "2"]
    s3 = "uri,etag,size,n\ns3://bk/a,1,1,1\ns3a://bk/a,2,2,2\nS3N://bk/a,3,3,3\n"
    (row,) = listing(tmp_path, s3, on_duplicate="first").to_pylist()
    assert row == {"uri": "s3://bk/a", "etag": "1", "size_bytes": 1, "input_n": "1"}


def test_rows_behind_a_duplicate_keep_their_number(tmp_path):
    assert "row 3 (line 4)" in refused(tmp_path, "uri,etag,size\na,,\na,,\nb,,x\n", on_duplicate="first")


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("uri,my col,a=b", ["input_my_col", "input_a_b"]),
        (",uri,x", ["input_column_1", "input_x"]),
        ('uri,"a\nb",Ünï', ["input_a_b", "input_Ünï"]),
        ("uri,input_x,x", ["input_input_x", "input_x"]),
        ("uri,URI,model", ["input_URI", "input_model"]),
    ],
)
def test_names_of_columns_suit_every_reader(tmp_path, header, names):
    assert listing(tmp_path, f"{header}\na,b,c\n").column_names[3:] == names


@pytest.mark.parametrize("header", ["uri,Tag,tag", "uri,a b,a_b", "uri,a(b,a)b"])
def test_names_that_a_reader_takes_for_one_are_refused(tmp_path, header):
    assert "rename one" in refused(tmp_path, f"{header}\na,b,c\n")


NAMES = [
    "a.png", "a/b.png", ".a", "a/.b", "..a", "a/..b", "../a", "a/../b", "a/../../b", "./a", "a//b", "a/", "/", "//x/y",
    "",
    "/x/a.png", "/x/../a", "/lists/a", "/lists/tonight/../a", "/data/a", "/database/a", "a:b", "c:/x", "file:/x/a",
    "file:///x/a", "file://localhost/x/a", "file://host/a", "FILE:///x/%61", "file:///x/%2e%2e/a", "file:///%ff",
    "file:a", "file:////x", "s3://bk/k", "S3://bk/k", "s3a://bk/k", "s3n://lists/tonight/k", "s3://lists/tonight/k",
    "s3://lists/k", "s3://lists/../k", "s3://lists/a..b", "s3://bk", "s3://bk/", "s3:///k", "s3:/b/k", "s3://bk//k",
    "s3://data/a", "s3://database/a", "s3://-b/k", "s3://u:p@b/k", "http://h/a", "a\0b", "s3://bk/a\0b", "/x/a\0b",
    "é/ü.png",
    "~/a",
    "a\nb", "s3://bk/a\nb", " a",
]  # fmt: skip


@pytest.mark.parametrize("base", ["/lists", "/lists/tonight", "/", "s3://lists/tonight", "s3://lists"])
@pytest.mark.parametrize("allow", [(), ("s3://data",), ("/data", "s3://bk/"), ("s3a://data/", "/")])
def test_many_entries_get_the_answers_of_the_rules(base, allow):
    rules = tuple(allowed_uris._location(root) for root in allow)
    expected = []
    for name in NAMES:
        location = allowed_uris.resolve_uri(base, name)
        expected.append(location if location and allowed_uris.is_allowed(location, base, rules) else None)
    assert allowed_uris.allowed_locations(pa.array(NAMES), base, allow).to_pylist() == expected


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("s3a://bk/k", "s3://bk/k"), ("S3N://bk/k", "s3://bk/k"), ("file:///x/a%20b", "/x/a b"), ("file:/x/a", "/x/a"),
        ("//x/y", "/x/y"), ("s3://bk", None), ("s3:///k", None), ("file:///x/%2e%2e/a", None), ("file:///%ff", None),
        ("/", None),
    ],
)  # fmt: skip
def test_schemes_of_hadoop_and_of_files(name, location):
    assert allowed_uris.resolve_uri("/lists", name) == location
    if name[0] in "f/":
        assert allowed_uris.resolve_uri("s3://lists", name) is None


def fill(store, count):
    for k in range(count):
        store.put(f"d/{k % 3}/{k:04d}.png", b"x" * (k % 7))


def test_many_names_of_few_folders_are_listed(s3_uri, requests, monkeypatch):
    store = open_store(s3_uri)
    fill(store, 300)
    names = [f"{s3_uri}/d/{k % 3}/{k:04d}.png" for k in range(0, 320)]
    random.Random(1).shuffle(names)
    requests.clear()
    monkeypatch.setattr(object_lookup, "NAMES_PER_THREAD", 50)
    found = look_up(pa.array(names), Stores(store))
    assert found["uri"].to_pylist() == names
    expected = {row["uri"]: row for table in store.list() for row in table.to_pylist()}
    for row in found.to_pylist():
        assert row == expected.get(row["uri"], {"uri": row["uri"], "etag": ABSENT, "size_bytes": 0})
    assert requests.count("head_object") <= 32
    assert len(requests) <= 60


def test_names_far_apart_are_asked_about_one_by_one(s3_uri, requests, monkeypatch):
    store = open_store(s3_uri)
    fill(store, 240)
    monkeypatch.setattr(object_lookup, "LIST_FROM", 2)
    page = storage_s3.S3Store._page
    monkeypatch.setattr(storage_s3.S3Store, "_page", lambda self, a: page(self, {**a, "MaxKeys": 2}))
    names = [f"{s3_uri}/d/{k % 3}/{k:04d}.png" for k in range(0, 240, 5)]
    requests.clear()
    found = look_up(pa.array(names), Stores(store))
    assert not pc.any(pc.equal(found["etag"], ABSENT)).as_py()
    assert requests.count("head_object") > 40
    assert requests.count("list_objects_v2") < 8


def test_without_the_right_to_list_every_name_gets_a_head(s3_uri, requests, monkeypatch):
    store = open_store(s3_uri)
    fill(store, 70)

    def denied(self, arguments):
        raise AccessDeniedError("no")

    monkeypatch.setattr(storage_s3.S3Store, "_page", denied)
    names = [f"{s3_uri}/d/{k % 3}/{k:04d}.png" for k in range(80)]
    requests.clear()
    found = look_up(pa.array(names), Stores(store))
    assert requests.count("head_object") == 80
    assert pc.sum(pc.equal(found["etag"], ABSENT)).as_py() == 10


def test_names_of_several_buckets_and_folders(s3_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(object_lookup, "LIST_FROM", 1)
    store = open_store(s3_uri)
    fill(store, 5)
    store.put("dir/", b"x")
    (tmp_path / "a").write_bytes(b"1")
    names = [f"{tmp_path}/a", "s3://no-such-bucket-here/x", f"{s3_uri}/d/0/0000.png", f"{s3_uri}/dir/", f"{s3_uri}/é",
             f"{tmp_path}/{'x' * 300}"]  # fmt: skip
    found = dict(zip(names, look_up(pa.array(names), Stores(open_store(str(tmp_path)))).to_pylist(), strict=True))
    absent = [row["uri"] for row in found.values() if row["etag"] == ABSENT]
    assert sorted(absent) == sorted([names[1], names[4], names[5]])


def test_a_manifest_is_sorted_in_byte_order(tmp_path):
    names = ["é", "a", "Z", "a-b", "a/b", "z"]
    table = listing(tmp_path, "uri,etag,size\n" + "".join(f"s3://bk/{n},0,1\n" for n in names))
    uris = table["uri"].to_pylist()
    assert uris == sorted(uris, key=str.encode)
    assert np.all(np.array(uris) == np.array(sorted(uris)))


def test_an_own_output_is_a_manifest(tmp_path):
    part = pa.table({"uri": ["s3://bk/a"], "etag": ["0a"], "size_bytes": [5], "score": pa.array([0.5], pa.float32())})
    (tmp_path / "out.parquet").mkdir()
    pq.write_table(part, tmp_path / "out.parquet" / "part-g0001-00000.parquet")
    (table,) = inputs.list_inputs(f"{tmp_path}/out.parquet", "uri")
    assert table.to_pylist() == [{"uri": "s3://bk/a", "etag": "0a", "size_bytes": 5, "input_score": "0.5"}]
