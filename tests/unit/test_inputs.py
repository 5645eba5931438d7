"""Manifest inputs: each row gets the etag and size of its own object, however many rows are asked about at a time."""

import pytest

from cnn_ray import inputs, object_lookup
from cnn_ray.errors import DataError
from cnn_ray.storage import open_store


def manifest(folder, names):
    path = folder / "m.csv"
    path.write_text("uri,brand\n" + "".join(f"{name},{k}\n" for k, name in enumerate(names)))
    return str(path)


def test_rows_keep_their_own_etag_size_and_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(object_lookup, "HEADS_AHEAD", 2)
    for k, name in enumerate("edcba"):
        (tmp_path / name).write_bytes(b"x" * k)
    (table,) = inputs.list_inputs(manifest(tmp_path, ["e", "gone", "c", "../out", "a", "b", "d"]), "uri")
    rows = {row["uri"].removeprefix(f"{tmp_path}/"): row for row in table.to_pylist()}
    assert list(rows) == ["../out", "a", "b", "c", "d", "e", "gone"]
    assert [rows[name]["size_bytes"] for name in "edcba"] == [0, 1, 2, 3, 4]
    assert all(rows[name]["etag"].endswith(f"-{k}") for k, name in enumerate("edcba"))
    assert (rows["gone"]["etag"], rows["../out"]["etag"]) == (object_lookup.ABSENT, object_lookup.NOT_ALLOWED)
    assert [rows[name]["input_brand"] for name in ("e", "gone", "d")] == ["0", "1", "6"]


def test_two_names_of_one_object_are_refused(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/b twice"):
        list(inputs.list_inputs(manifest(tmp_path, ["a", "b", "c", "./b", "a/../a2"]), "uri"))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_says_that_a_folder_is_complete_is_no_image(tmp_path, place, request):
    uri = str(tmp_path) if place == "local" else request.getfixturevalue("s3_uri")
    store = open_store(uri)
    images = {"_hash-that-begins-so": b"x", "a.png": b"", "b_SUCCESS": b"x", "c/_d.png": b"x"}
    for name, data in {**images, "_SUCCESS": b"{}", "c/_SUCCESS": b"", "_DONE": b"", "c/_started_1": b""}.items():
        store.put(name, data)
    listed = [uri for table in inputs.list_inputs(uri, "uri") for uri in table["uri"].to_pylist()]
    assert listed == sorted(store.uri_of(name) for name in images)


@pytest.mark.parametrize("scheme", ["s3a", "S3N", "S3", "s3"])
def test_other_names_of_s3_are_s3(scheme):
    from cnn_ray.config import ScoreConfig

    assert open_store(f"{scheme}://bucket/p").uri == "s3://bucket/p"
    given = ScoreConfig.model_validate(
        {
            "model": "m@1",
            "input_uri": f"{scheme}://in/x",
            "output_uri": f"{scheme}://out",
            "allow_uris": [f"{scheme}://a"],
        }
    )
    assert (given.input_uri, given.output_uri, given.allow_uris) == ("s3://in/x", "s3://out", ("s3://a",))
