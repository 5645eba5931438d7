"""What a manifest may name: its own folder, what --allow-uris says, and nothing by a link or by http."""

import pyarrow.parquet as pq
import pytest
from factories import image_bytes

from cnn_ray import allowed_uris, inputs
from cnn_ray.config import ScoreConfig
from cnn_ray.object_lookup import DENIED, NOT_ALLOWED
from cnn_ray.records import LISTING_SCHEMA

LOCAL, BUCKET = "/lists", "s3://lists/tonight"


@pytest.mark.parametrize(
    ("location", "base", "allow", "allowed"),
    [
        ("s3://lists/tonight/a.png", BUCKET, (), True),
        ("s3://lists/other/a.png", BUCKET, (), True),
        ("s3://secrets/a.png", BUCKET, (), False),
        ("s3://lists-of-others/a.png", BUCKET, (), False),
        ("s3://secrets/a.png", LOCAL, (), True),
        ("/anywhere/a.png", LOCAL, (), True),
        ("s3://screens/a.png", BUCKET, ("s3://screens",), True),
        ("s3://screens2/a.png", BUCKET, ("s3://screens",), False),
        ("s3://screens/2026/a.png", BUCKET, ("s3://screens/2026/",), True),
        ("s3://screens/2025/a.png", BUCKET, ("s3://screens/2026",), False),
        ("s3://lists/tonight/a.png", BUCKET, ("s3://screens",), True),
        ("s3://lists/other/a.png", BUCKET, ("s3://screens",), False),
        ("s3://secrets/a.png", LOCAL, ("s3://screens",), False),
        ("/lists/a.png", LOCAL, ("/data",), True),
        ("/data/a.png", LOCAL, ("/data",), True),
        ("/database/a.png", LOCAL, ("/data",), False),
        ("/etc/passwd", LOCAL, ("/data",), False),
        ("/etc/passwd", LOCAL, ("s3://screens",), False),
    ],
)
def test_locations(location, base, allow, allowed):
    assert allowed_uris.is_allowed(location, base, allow) is allowed


@pytest.mark.parametrize(
    "name",
    [
        "http://h/a.png",
        "https://h/a.png",
        "file://host/etc/passwd",
        "ftp://h/a",
        "../a.png",
        "a/../../b",
        "s3://b/../c",
    ],
)
@pytest.mark.parametrize("base", [LOCAL, BUCKET])
def test_no_other_scheme_and_no_path_out_of_the_folder(name, base):
    assert allowed_uris.resolve_uri(base, name) is None


def etags(folder, names, allow=()):
    (folder / "m.csv").write_text("uri\n" + "\n".join(names) + "\n")
    (table,) = inputs.list_inputs(str(folder / "m.csv"), "uri", allow)
    return dict(zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True))


def test_links_do_not_lead_out_of_what_is_allowed(tmp_path):
    lists, data, secret = (tmp_path / name for name in ("lists", "data", "secret"))
    for folder in (lists, data, secret):
        folder.mkdir()
        (folder / "a.png").write_bytes(image_bytes(1))
    (lists / "link.png").symlink_to(secret / "a.png")
    (lists / "folder").symlink_to(secret)
    (data / "link.png").symlink_to(secret / "a.png")
    (data / "folder").symlink_to(secret)
    names = ["a.png", "link.png", "folder/a.png", f"{data}/a.png", f"{data}/link.png", f"{data}/folder/a.png"]
    found = etags(lists, [*names, f"{secret}/a.png"], (str(data),))
    refused = {NOT_ALLOWED, DENIED}
    assert found[f"{lists}/a.png"] not in refused
    assert found[f"{data}/a.png"] not in refused
    assert {uri for uri, etag in found.items() if etag in refused} == {
        f"{lists}/link.png",
        f"{lists}/folder/a.png",
        f"{data}/link.png",
        f"{data}/folder/a.png",
        f"{secret}/a.png",
    }


def test_links_out_of_an_input_folder_are_not_listed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.png").write_bytes(image_bytes(1))
    (tmp_path / "in" / "a.png").write_bytes(image_bytes(2))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret" / "s.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "secret")
    tables = list(inputs.list_inputs(str(tmp_path / "in"), "uri"))
    assert [uri for table in tables for uri in table["uri"].to_pylist()] == [f"{tmp_path}/in/a.png"]
    assert tables[0].schema == LISTING_SCHEMA


def test_signed_urls_are_refused_without_their_signature_and_stay_different(tmp_path):
    names = [f"https://b.s3.amazonaws.com/a.png?X-Amz-Signature={sign}" for sign in ("fe5f80f77d", "0123456789")]
    found = etags(tmp_path, names)
    assert set(found.values()) == {NOT_ALLOWED}
    assert len(found) == 2
    assert not [uri for uri in found if "fe5f80f77d" in uri or "0123456789" in uri]
    assert found == etags(tmp_path, names), "the same name every night"


def test_a_run_sets_aside_what_is_not_allowed(tmp_path, s3_uri, small_models):
    from cnn_ray.outputs import Partition, read_quarantine
    from cnn_ray.score import run_score
    from cnn_ray.storage import open_store

    store = open_store(s3_uri)
    store.put("a.png", image_bytes(1))
    store.put(
        "m.csv", f"uri\na.png\n{s3_uri}/../x\ns3://another-bucket/b.png\nhttps://h/c.png?key=qwertyuiop\n".encode()
    )
    secret = "AKIAIOSFODNN7EXAMPLE"  # whoever names a folder like that
    config = ScoreConfig(
        model="small@1",
        models_uri=small_models,
        input_uri=f"{s3_uri}/m.csv",
        output_uri=str(tmp_path / "out" / secret),
        precision="f32",
        max_quarantine_rate=1,
        report=True,
    )
    result = run_score(config)
    assert result.manifest.codes == {"uri_not_allowed": 3}
    assert Partition(result.partition_uri).read_manifest(1) is not None
    rows = read_quarantine(result.partition_uri)
    assert rows.num_rows == 3
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    tables = [str(pq.read_table(path).to_pylist()) for path in files if path.suffix == ".parquet"]
    texts = [path.read_text() for path in files if path.suffix != ".parquet"]
    assert len(tables) >= 3
    assert not [text for text in (*tables, *texts) if secret in text]
    assert result.manifest.config["output_uri"] == f"{tmp_path}/out/***"
    assert any("https://h/c.png?***" in text for text in tables)
    assert not [text for text in (*tables, *texts) if "qwertyuiop" in text]
