"""A manifest's cells are the text that stands in the file, in each format, and its errors name the row."""

import csv
import datetime
import gzip
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn_ray import manifest_files, manifest_text
from cnn_ray.errors import DataError, NotFoundError
from cnn_ray.manifest_files import is_manifest, manifest_exists, read_manifest


def rows_of(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_manifest(str(path), "uri").table.to_pylist()


def refused(folder, name, data):
    with pytest.raises(DataError) as caught:
        rows_of(folder, name, data)
    return str(caught.value)


CELLS = [
    "007",
    "0x1F",
    "98765432109876543211",
    "1e5",
    "10:15",
    "2026-11-27T10:00:00Z",
    "true",
    "NA",
    "null",
    "",
    "1.50",
]


@pytest.mark.parametrize("name", ["m.csv", "M.CSV", "m.tsv", "m.csv.gz", "m.Tsv.Gz"])
def test_a_cell_stays_the_text_that_it_is(tmp_path, name):
    delimiter = "\t" if "tsv" in name.lower() else ","
    text = "".join(
        f"{delimiter.join(row)}\r\n" for row in [["uri", "cell"], *([f"a{k}", c] for k, c in enumerate(CELLS))]
    )
    data = gzip.compress(text.encode()) if name.lower().endswith("gz") else text.encode()
    assert is_manifest(f"x/{name}")
    assert [row["cell"] for row in rows_of(tmp_path, name, data)] == CELLS


def test_line_breaks_in_quotes_at_any_size(tmp_path):
    rows = [[f"a{k}", f'page {k}\r\nof "team",\n{"x" * (k % 97)}'] for k in range(30_000)]
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\r\n").writerows([["uri", "note"], *rows])
    assert len(stream.getvalue()) > 2 << 20
    assert [list(row.values()) for row in rows_of(tmp_path, "m.csv", stream.getvalue())] == rows


@pytest.mark.parametrize("seed", range(20))
def test_csv_is_read_as_python_reads_it(tmp_path, seed):
    draw = random.Random(seed)
    width = draw.randint(1, 4)
    cells = ["a", "", "x\ny", 'q"q', "c,c", "ééé", "\r\n", "007", "\r", " s ", '"', '""', "\ufeff", "x" * 300]
    rows = [[draw.choice(cells) * draw.randint(1, 3) for _ in range(width)] for _ in range(draw.randint(1, 300))]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL if seed % 2 else csv.QUOTE_MINIMAL, lineterminator="\r\n")
    writer.writerows([[f"h{k}" for k in range(width)], *rows])
    assert [list(row.values()) for row in rows_of(tmp_path, "m.csv", stream.getvalue())] == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('uri,size\na,5" screen\nb,"x"\n', [("a", '5" screen'), ("b", "x")]),
        ("uri,x\na,1\n\n\nb,2\n\n", [("a", "1"), ("b", "2")]),
        ("\n\nuri,x\r\na,1\r\n", [("a", "1")]),
        ("\ufeffuri,x\na,ü\n", [("a", "ü")]),
        ('\ufeff"uri",x\na,1', [("a", "1")]),
        ("uri,x\ra,1\rb,2", [("a", "1"), ("b", "2")]),
        ('uri,x\na,""\nb,""""\n', [("a", ""), ("b", '"')]),
        ("uri,\na,1\n", [("a", "1")]),
        ("uri,x\n", []),
    ],
)
def test_what_writers_of_csv_do(tmp_path, text, rows):
    assert [tuple(row.values()) for row in rows_of(tmp_path, "m.csv", text)] == rows


def test_long_cells_are_no_error(tmp_path):
    long = "x" * 300_000
    assert rows_of(tmp_path, "m.csv", f'uri,x\na,{long}\nb,"{long}"\nc,1"\n')[1]["x"] == long


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("uri,tag,tag\na,x,y\n", ("'tag'", "columns 2, 3")),
        ("uri,x\na,1\nb,2,3\n", ("2 cells", "Received: 3", "line 3")),
        ('uri,x\na,"1\n2"\nb\n', ("Received: 1", "line 4")),
        ('uri,x\na,"1\nb,2\nc,3\n', ("never closes", "line 2")),
        ('uri,x\na,"say \\"hi\\" now"\n', ("line 2", "double")),
        ("", ("empty",)),
        ("\n\n", ("empty",)),
        ("uri,x\na,é\n".encode("latin-1"), ("UTF-8", "0xE9", "line 2", "Latin-1")),
        ("uri,x\na,1\n".encode("utf-16"), ("UTF-16",)),
        ("uri,x\na,1\n".encode("utf-16-le"), ("UTF-16",)),
        ("uri,x\na,1\n".encode("utf-32"), ("UTF-32",)),
        (b"PK\x03\x04...", ("Excel",)),
        (b"PAR1....", ("Parquet",)),
        (gzip.compress(b"uri\na\n" * 1000)[:-20], ("gzip",)),
        (gzip.compress(b"uri\na\n")[:-8] + b"12345678", ("gzip",)),
    ],
)
def test_what_is_no_csv_is_refused_with_its_place(tmp_path, data, words):
    message = refused(tmp_path, "m.csv", data)
    assert all(word in message for word in words), message


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_text, "TAME_BYTES", 1 << 20)
    packed = gzip.compress(b"uri\n" + b"a" * (32 << 20))
    assert "unpack or split" in refused(tmp_path, "m.csv.gz", packed)
    several = gzip.compress(b"uri\na\n") + gzip.compress(b"b\n")
    assert [row["uri"] for row in rows_of(tmp_path, "m.csv.gz", several)] == ["a", "b"]


def test_json_values_are_text(tmp_path):
    lines = (
        '{"uri":"0007","n":1.50,"big":98765432109876543211,"b":true,"t":"2026-11-27T10:00:00Z","o":{"a":[1,2.0,"x"]}}\n'
        '\r\n{"uri":"0008","n":"spring","new":null,"e":1e400}\r\n'
    )
    first, second = rows_of(tmp_path, "m.jsonl", lines)
    assert first == {
        "uri": "0007", "n": "1.50", "big": "98765432109876543211", "b": "true", "t": "2026-11-27T10:00:00Z",
        "o": '{"a":[1,2.0,"x"]}', "new": None, "e": None,
    }  # fmt: skip
    assert (second["n"], second["e"], second["b"]) == ("spring", "1e400", None)


@pytest.mark.parametrize("name", ["m.ndjson", "m.JSONL.GZ"])
def test_other_names_of_json_lines(tmp_path, name):
    data = b'{"uri":"a"}\n'
    assert rows_of(tmp_path, name, gzip.compress(data) if name.endswith("GZ") else data) == [{"uri": "a"}]


@pytest.mark.parametrize(
    "line",
    ['{"uri":7}', '{"uri":true}', '{"uri":["a"]}', '{"uri":{"a":1}}', '["a"]', '"a"', "7", '{"uri":"a"', "{'uri':'a'}",
     '{"uri":"a","uri":"b"}', '{"uri":"a","x":"\\ud800"}', "[" * 100_000],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    message = refused(tmp_path, "m.jsonl", f'{{"uri":"a"}}\n\n{line}\n')
    assert "row 2 (line 3)" in message
    assert "Next:" in message


def test_json_lines_without_a_line(tmp_path):
    assert "empty file" in refused(tmp_path, "m.jsonl", "\n\n")


def test_parquet_values_are_text(tmp_path):
    utc = datetime.datetime(2026, 11, 27, 10, 0, 0, 120_000, datetime.UTC)
    table = pa.table(
        {
            "uri": pa.array(["a"]).dictionary_encode(),
            "int": pa.array([2**63 - 1]),
            "float": [0.5],
            "bool": [False],
            "time": pa.array([utc.replace(tzinfo=None)], pa.timestamp("ns")),
            "zone": pa.array([utc], pa.timestamp("us", "Europe/Berlin")),
            "whole": pa.array([utc.replace(microsecond=0)], pa.timestamp("ms", "UTC")),
            "date": [utc.date()],
            "bytes": [b"\x00\xff"],
            "list": [[1, 2]],
            "struct": [{"a": "é", "t": utc}],
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "decimal": pa.array(["1.20"]).cast(pa.decimal128(10, 2)),
            "null": pa.nulls(1),
            "large": pa.array(["x"], pa.large_string()),
            "half": pa.array([0.5], pa.float32()).cast(pa.float16()),
            "duration": pa.array([90], pa.duration("s")),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    read = read_manifest(str(tmp_path / "m.parquet"), "uri").table
    assert set(read.schema.types) == {pa.string()}
    assert read.to_pylist() == [
        {
            "uri": "a", "int": "9223372036854775807", "float": "0.5", "bool": "false", "time": "2026-11-27T10:00:00.12",
            "zone": "2026-11-27T10:00:00.12Z", "whole": "2026-11-27T10:00:00Z", "date": "2026-11-27", "bytes": "00ff",
            "list": "[1,2]", "struct": '{"a":"é","t":"2026-11-27T10:00:00.120000+00:00"}', "map": '{"k":1}',
            "decimal": "1.20", "null": None, "large": "x", "half": "0.5", "duration": "90",
        }
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[b"a.png"], [7], [None], [True], [["a"]]])
def test_a_parquet_column_of_locations_is_text(tmp_path, values):
    pq.write_table(pa.table({"uri": values}), tmp_path / "m.parquet")
    with pytest.raises(DataError, match="row 1"):
        read_manifest(str(tmp_path / "m.parquet"), "uri")


def test_a_parquet_file_that_is_none(tmp_path):
    assert "Parquet" in refused(tmp_path, "m.parquet", b"uri\na\n")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["uri", "x", "x"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="'x' in columns 2, 3"):
        read_manifest(str(tmp_path / "twice.parquet"), "uri")


def spark_folder(folder):
    for key, names in {
        "day=1/part-0.snappy.parquet": ["a", "b"],
        "day=__HIVE_DEFAULT_PARTITION__/part-1.parquet": ["c"],
    }.items():
        path = folder / key
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"uri": names, "n": list(range(len(names)))}), path)
    for junk in ("_SUCCESS", ".part-0.parquet.crc", "_temporary/part-9.parquet", "notes.txt"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"x")


@pytest.mark.parametrize("name", ["m.parquet", "m.parquet/", "m.parquet/*.parquet"])
def test_a_folder_as_spark_writes_it(tmp_path, name):
    spark_folder(tmp_path / "m.parquet")
    uri = f"{tmp_path}/{name}"
    assert is_manifest(uri)
    assert manifest_exists(uri)
    manifest = read_manifest(uri, "uri")
    assert manifest.table.to_pylist() == [
        {"uri": "a", "n": "0", "day": "1"}, {"uri": "b", "n": "1", "day": "1"}, {"uri": "c", "n": "0", "day": None},
    ]  # fmt: skip
    assert manifest.place(1) == "row 2 of day=1/part-0.snappy.parquet"
    assert manifest.place(2).startswith("row 1 of day=__HIVE")


def test_a_folder_in_a_bucket(s3_uri, tmp_path):
    from cnn_ray.storage import open_store

    spark_folder(tmp_path / "m")
    store = open_store(s3_uri)
    for path in (tmp_path / "m").rglob("*"):
        if path.is_file():
            store.put(f"m/{path.relative_to(tmp_path / 'm')}", path.read_bytes())
    assert read_manifest(f"{s3_uri}/m/*.parquet", "uri").table["uri"].to_pylist() == ["a", "b", "c"]
    with pytest.raises(NotFoundError):
        read_manifest(f"{s3_uri}/none.parquet", "uri")
    with pytest.raises(NotFoundError):
        read_manifest(f"{s3_uri}/none/*.parquet", "uri")


@pytest.mark.parametrize(
    "uri", ["screens", "screens/", "s3://b/csv", "x.json", "a.csv/", "a.png", "s3://b/manifest.json/"]
)
def test_what_is_no_manifest_by_its_name(uri):
    assert not is_manifest(uri)


def test_a_bound_on_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_files, "MOST_COLUMNS", 3)
    lines = "".join(f'{{"uri":"a{k}","c{k}":1}}\n' for k in range(4))
    assert "at most 3 columns" in refused(tmp_path, "m.jsonl", lines)
