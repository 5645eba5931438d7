"""One OUTPUT with several dates, models and versions, read as one table by the readers that people use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from factories import write_images

from cnn_ray import outputs, score
from cnn_ray.config import ScoreConfig
from cnn_ray.records import SCORE_SCHEMA

DAYS = ("2026-11-21", "2026-11-22")
MODELS = (("small", 1), ("small", 2), ("other", 1))
Rows = list[tuple[Any, ...]]
KEYS = ("run_date", "model_name", "model_version", "uri")


def copy_model(models: Path, name: str, version: int) -> None:
    """Copy `small@1` as another model or version; its digests stay those of the same files."""
    target = models / name / str(version)
    shutil.copytree(models / "small" / "1", target)
    described = json.loads((target / "artifact.json").read_text())
    (target / "artifact.json").write_text(json.dumps(described | {"name": name, "version": version}))


@pytest.fixture(scope="module")
def night(tmp_path_factory, small_models) -> tuple[Path, Rows]:
    """OUTPUT and its rows: two dates, three models, quarantined rows, a report, and a manifest input with columns."""
    folder = tmp_path_factory.mktemp("readers")
    shutil.copytree(small_models, folder / "models")
    for name, version in MODELS[1:]:
        copy_model(folder / "models", name, version)
    source = write_images(folder / "in", 6, bad=1)
    names = [path.name for path in sorted(source.iterdir())]
    (source / "shots.csv").write_text("uri,campaign\n" + "".join(f"{name},{k:03}\n" for k, name in enumerate(names)))
    rows: Rows = []
    for day in DAYS:
        for name, version in MODELS:
            settings = ScoreConfig(
                model=f"{name}@{version}",
                models_uri=str(folder / "models"),
                input_uri=str(source / "shots.csv"),
                output_uri=str(folder / "out"),
                date=day,  # pyright: ignore[reportArgumentType]
                runner="local",
                shard_size=4,
                max_quarantine_rate=1,
                report=name == "other",
            )
            table = outputs.read(score.run_score(settings).partition_uri)
            rows += [tuple(row[key] for key in KEYS) for row in table.to_pylist()]
    assert len(rows) == len(DAYS) * len(MODELS) * 6
    return folder / "out", sorted(rows)


def by_pandas(out: Path) -> pa.Table:
    return pa.Table.from_pandas(pandas.read_parquet(out))


def by_polars_directory(out: Path) -> pa.Table:
    return polars.read_parquet(out / "**" / "part-*.parquet", hive_partitioning=True).to_arrow()


def by_polars_glob(out: Path) -> pa.Table:
    return polars.read_parquet(f"{out}/**/part-*.parquet").to_arrow()


def by_duckdb(options: str) -> Callable[[Path], pa.Table]:
    return lambda out: duckdb.sql(f"select * from read_parquet('{out}/**/part-*.parquet'{options})").to_arrow_table()


READERS: dict[str, Callable[[Path], pa.Table]] = {
    "pandas": by_pandas,
    "pyarrow.parquet": lambda out: pyarrow.parquet.read_table(out),
    "pyarrow.dataset": lambda out: pyarrow.dataset.dataset(out).to_table(),
    "pyarrow.dataset hive": lambda out: pyarrow.dataset.dataset(out, partitioning="hive").to_table(),
    "polars glob": by_polars_glob,
    "polars hive": by_polars_directory,
    "duckdb": by_duckdb(""),
    "duckdb hive": by_duckdb(", hive_partitioning = true"),
    "duckdb without hive": by_duckdb(", hive_partitioning = false"),
    "duckdb union_by_name": by_duckdb(", union_by_name = true"),
}


def plain(field_type: pa.DataType) -> pa.DataType:
    """Return the type without what readers choose for themselves: large or view strings and lists."""
    if pa.types.is_large_string(field_type) or pa.types.is_string_view(field_type):
        return pa.string()
    if pa.types.is_list(field_type) or pa.types.is_large_list(field_type):
        return pa.list_(plain(field_type.value_type))
    return field_type


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_one_table_with_exact_types(night, reader):
    out, rows = night
    table = READERS[reader](out)
    columns = [table[key].to_pylist() for key in KEYS]
    assert sorted(zip(*columns, strict=True)) == rows
    for field in SCORE_SCHEMA:
        assert plain(table.schema.field(field.name).type) == plain(field.type), field.name
    assert sorted(set(table["input_campaign"].to_pylist())) == [f"{k:03}" for k in range(1, 7)]
    assert {row[0] for row in rows} == {date.fromisoformat(day) for day in DAYS}


@pytest.mark.parametrize("reader", ["pandas", "pyarrow.dataset hive", "polars hive", "duckdb", "duckdb hive"])
def test_readers_with_hive_partitions_see_the_folders_as_columns(night, reader):
    table = READERS[reader](night[0])
    assert {str(name) for name in table["model"].to_pylist()} == {"small", "other"}
    assert {int(version) for version in table["version"].to_pylist()} == {1, 2}
    assert {str(day)[:10] for day in table["date"].to_pylist()} == set(DAYS)


def spark_partition_columns(out: Path) -> list[dict[str, str]]:
    """Return the partition columns of each file as Spark finds them.

    Spark SQL guide, "Partition Discovery", and `PartitioningUtils.parsePartitions`: data files are those whose path
    below the root has no component that begins with "_" or ".". Each component NAME=VALUE of a file's folder is a
    column. All folders must have the same names in the same order, or the read fails with "Conflicting directory
    structures detected".
    """
    found = []
    for path in out.rglob("*"):
        parts = path.relative_to(out).parts
        if path.is_file() and not any(part.startswith(("_", ".")) for part in parts):
            found.append({name: unquote(value) for name, _, value in (part.partition("=") for part in parts[:-1])})
    return found


def test_spark_finds_one_set_of_partition_columns_and_no_column_twice(night):
    out, _ = night
    found = spark_partition_columns(out)
    assert {tuple(columns) for columns in found} == {("date", "model", "version")}
    in_files = {name for path in out.rglob("part-*.parquet") for name in pyarrow.parquet.read_schema(path).names}
    assert not in_files & {"date", "model", "version"}


def test_all_part_files_have_one_schema(night):
    schemas = [pyarrow.parquet.read_schema(path).remove_metadata() for path in night[0].rglob("part-*.parquet")]
    assert all(schema.equals(schemas[0]) for schema in schemas)


def test_nights_with_other_columns_are_read_together_with_one_option(night, tmp_path):
    """The columns of a manifest input may differ from night to night; the fixed ones never do."""
    out = tmp_path / "out"
    shutil.copytree(night[0], out)
    source = write_images(tmp_path / "in", 3)
    names = [path.name for path in sorted(source.iterdir())]
    (source / "shots.csv").write_text("uri,ticket\n" + "".join(f"{name},9{k:020}\n" for k, name in enumerate(names)))
    settings = ScoreConfig(
        model="small@1",
        models_uri=str(night[0].parent / "models"),
        input_uri=str(source / "shots.csv"),
        output_uri=str(out),
        date="2026-11-23",  # pyright: ignore[reportArgumentType]
        runner="local",
        report=False,
    )
    score.run_score(settings)
    expected = len(night[1]) + 3
    files = f"{out}/**/part-*.parquet"
    assert len(pandas.read_parquet(out)) == expected
    assert pyarrow.parquet.read_table(out).num_rows == expected
    assert pyarrow.dataset.dataset(out, partitioning="hive").count_rows() == expected
    joined = duckdb.sql(f"select * from read_parquet('{files}', union_by_name = true)").to_arrow_table()
    scanned = polars.scan_parquet(files, missing_columns="insert", extra_columns="ignore").collect()
    assert joined.num_rows == len(scanned) == expected
    assert {"input_campaign", "input_ticket"} <= set(joined.column_names)


def test_the_compacted_file_is_read_by_all(night, tmp_path):
    from cnn_ray.runs import compact_run

    out, _ = night
    path = compact_run(f"{out}/date={DAYS[0]}/model=small/version=1", str(tmp_path / "flat"))
    counts = {
        len(pandas.read_parquet(tmp_path / "flat")),
        pyarrow.parquet.read_table(path).num_rows,
        len(polars.read_parquet(path)),
        len(duckdb.sql(f"select * from '{path}'").fetchall()),
    }
    assert counts == {6}
