"""Training reads manifests as scoring does: every cell is text, and what lacks a value is named by its row."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn_ray.config import DataConfig
from cnn_ray.errors import DataError
from cnn_ray.labelled_rows import read_rows


@pytest.mark.parametrize("name", ["m.csv", "m.TSV.gz", "m.ndjson", "m.parquet"])
def test_labels_and_locations_are_text_in_every_format(tmp_path, name):
    rows = [{"uri": "0007", "label": "01"}, {"uri": "s3a://bucket/x", "label": "1e5"}]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith("ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        cut = "\t" if "TSV" in name else ","
        text = "\ufeff" + "".join(
            f"{cut.join(row)}\r\n" for row in [["uri", "label"], *(list(r.values()) for r in rows)]
        )
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    root, found = read_rows(DataConfig(uri=str(path)))
    assert (root, found.uris, found.names) == (str(tmp_path), [f"{tmp_path}/0007", "s3://bucket/x"], ["01", "1e5"])


@pytest.mark.parametrize("text", ["uri,label\na,cat\n,dog\n", "uri,label\na,cat\nb,\n"])
def test_a_missing_value_is_named_by_its_row(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=r"row 2 \(line 3\)"):
        read_rows(DataConfig(uri=str(tmp_path / "m.csv")))


def test_an_inventory_has_no_labels(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="S3 Inventory"):
        read_rows(DataConfig(uri=str(tmp_path / "manifest.json")))
