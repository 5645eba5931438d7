"""The whole line on real data: train on labelled screenshots, score real files by every way, and compare the ways.

    python tests/bench/acceptance.py --data ../shared/data [--work FOLDER]

DATA holds `screens/` (manifest.csv with file, label, group), `raw/` (real files, some unreadable) and
`backbones/mobilenetv2*.h5`. Prints one line per check, exits with 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import pyarrow.dataset

from cnn_ray import outputs
from cnn_ray.storage import open_store

TRAIN = """
name: screens
models_uri: {work}/models
runs_uri: {work}/runs
data: {{uri: {data}/screens/manifest.csv, uri_column: file, label_column: label, group_column: group}}
model: {{architecture: MobileNetV2, weights: {weights}, input_size_px: 160, dropout: 0.2}}
train: {{epochs: 5, learning_rate: 0.001}}
positive_label: phishing
"""


def check(what: str, good: bool) -> None:
    print(f"{'ok  ' if good else 'FAIL'} {what}", flush=True)
    if not good:
        sys.exit(1)


def cnn_ray(*arguments: object) -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "cnn_ray.cli", *(str(a) for a in arguments)]
    done = subprocess.run(command, check=False)
    check(
        f"cnn-ray {' '.join(str(a) for a in arguments[:4])} ... ({time.monotonic() - start:.1f} s)",
        done.returncode == 0,
    )


def start_s3() -> str:
    """Endpoint of a moto server in this process; the environment points there."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import boto3

    boto3.client("s3").create_bucket(Bucket="acceptance")
    return "s3://acceptance"


def upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put_file(path.relative_to(folder).as_posix(), path)


def tables(output: object) -> tuple[pyarrow.Table, pyarrow.Table]:
    partition = f"{output}/model=screens/version=1"
    return outputs.read(partition), outputs.read_quarantine(partition)


def same_but_for_place(one: tuple, two: tuple) -> bool:
    def rows(table: pyarrow.Table) -> list[dict]:
        found = table.drop_columns(["etag"]).to_pylist()
        return sorted([{**row, "uri": row["uri"].rpartition("/")[2]} for row in found], key=lambda row: row["uri"])

    return all(rows(a) == rows(b) for a, b in zip(one, two, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    data, work = options.data.resolve(), options.work or Path(tempfile.mkdtemp(prefix="acceptance-"))
    work.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    weights = next((data / "backbones").glob("mobilenetv2*.h5"))
    (work / "train.yaml").write_text(TRAIN.format(work=work, data=data, weights=weights))
    cnn_ray("train", "--config", work / "train.yaml")
    model = ("--model", "screens@1", "--models-uri", work / "models")
    for runner in ("local", "ray"):
        cnn_ray("score", data / "raw", work / runner, "--runner", runner, "--shard-size", "32", *model)
    local, ray = tables(work / "local"), tables(work / "ray")
    uris = sorted(local[0]["uri"].to_pylist() + local[1]["uri"].to_pylist())
    check(f"each of {len(uris)} files once", uris == sorted(str(p) for p in (data / "raw").iterdir()))
    for row in local[1].to_pylist():
        print(f"     {row['code']}: {Path(row['uri']).name} ({row['detail']})")
    check("local and Ray runners give equal tables", all(a.equals(b) for a, b in zip(local, ray, strict=True)))
    by_duckdb = duckdb.from_parquet(f"{work}/local/**/part-*.parquet").count("*").fetchall()[0][0]
    by_pyarrow = pyarrow.dataset.dataset(work / "local", partitioning="hive").to_table().num_rows
    check(f"DuckDB and pyarrow read {local[0].num_rows} rows", by_duckdb == by_pyarrow == local[0].num_rows)

    bucket = start_s3()
    upload(data / "raw", f"{bucket}/raw")
    upload(work / "models", f"{bucket}/models")
    remote_model = ("--model", "screens@1", "--models-uri", f"{bucket}/models")
    for runner in ("local", "ray"):
        output = f"{bucket}/{runner}"
        cnn_ray("score", f"{bucket}/raw", output, "--runner", runner, "--shard-size", "32", *remote_model)
        same = same_but_for_place(local, tables(output))
        check(f"S3 with the {runner} runner equals the folder but for etag and prefix", same)


if __name__ == "__main__":
    main()
