# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""Finished runs, looked at: which there are, how two differ over the uris they share, and one as a single file."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cnn_ray.errors import ConfigError, NotFoundError, PlanError
from cnn_ray.manifests import Manifest
from cnn_ray.outputs import Partition, finished_manifest, live_rows
from cnn_ray.records import SCORE_SCHEMA
from cnn_ray.sorted_rows import in_step
from cnn_ray.storage import Store, open_store
from cnn_ray.tallies import psi, score_bins

COMPACT_NAME = "cnn_ray-scores.parquet"
"""Always the same, so that a newer generation replaces it; nobody else names a file so."""
ROW_GROUP_ROWS = 65_536
MOST_CHANGED = 10
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

_HEAD = re.compile(r"((?:.*/)?model=([^/]+)/version=(\d+))/_(plan|manifest)-g(\d{4})\.json")


@dataclass(frozen=True)
class RunSummary:
    """One partition in a list. `status` is that of its newest manifest, or `unfinished`; `open_generation` is one whose
    plan is there and whose manifest is not."""

    uri: str
    date: str
    model: str
    version: int
    status: str
    open_generation: int | None
    manifest: Manifest | None


class ChangedRow(BaseModel):
    """One row whose score moved far."""

    model_config = ConfigDict(frozen=True)
    uri: str
    label_a: str
    label_b: str
    score_a: float
    score_b: float


class RunDiff(BaseModel):
    """How two runs differ over the uris that both scored. `score` names what is compared: the score of that label, or
    `best label` where the two models have no positive label in common. Shifts are b - a."""

    model_config = ConfigDict(frozen=True)
    a: str
    b: str
    shared: int
    only_a: int
    only_b: int
    other_etag: int
    score: str
    label_changes: dict[str, dict[str, int]]
    changed_labels: int
    newly_flagged: int
    no_longer_flagged: int
    shift_mean: float | None
    shift_quantiles: dict[str, float]
    psi: float | None
    most_changed: tuple[ChangedRow, ...]


def list_runs(output_uri: str) -> list[RunSummary]:
    """All partitions below OUTPUT, sorted by location.

    Raises:
        NotFoundError: there is no such folder or bucket.
    """
    store = open_store(output_uri)
    heads: dict[str, dict[str, int]] = {}
    for key in store.keys():
        match = _HEAD.fullmatch(f"{store.uri}/{key}")
        if match is not None:
            newest = heads.setdefault(match[1], {"plan": 0, "manifest": 0})
            newest[match[4]] = max(newest[match[4]], int(match[5]))
    return [_summary(uri, newest) for uri, newest in sorted(heads.items())]


def _summary(uri: str, newest: dict[str, int]) -> RunSummary:
    manifest = Partition(uri).read_manifest(newest["manifest"]) if newest["manifest"] else None
    *_, name, version = re.sub(r"(model|version)=", "", uri).split("/")
    date = re.search(r"/date=([^/]+)/", uri)
    return RunSummary(
        uri=uri,
        date="" if date is None else date[1],
        model=name,
        version=int(version),
        status="unfinished" if manifest is None else manifest.status,
        open_generation=newest["plan"] if newest["plan"] > newest["manifest"] else None,
        manifest=manifest,
    )


def show_run(uri: str) -> Manifest:
    """The newest manifest of a partition, whatever its status.

    Raises:
        PlanError: there is none.
    """
    manifest = Partition(uri).newest_manifest()
    if manifest is None:
        raise PlanError(
            f"Expected a finished run in {uri}. Received: no manifest. Next: look for one with `cnn-ray runs list`."
        )
    return manifest


def diff_runs(uri_a: str, uri_b: str) -> RunDiff:
    """How the rows of two partitions differ over the uris that both scored.

    Streams both in order of uri; what grows with the rows is one float32 a shared row, for exact quantiles.

    Raises:
        PlanError: a run is not finished or damaged.
        QuarantineLimitError: a run is over its limit.
    """
    parts = [Partition(uri) for uri in (uri_a, uri_b)]
    manifests = [finished_manifest(part) for part in parts]
    positive = _common_positive(*manifests)
    streams = [
        live_rows(part.store, manifest.parts, manifest.superseded)
        for part, manifest in zip(parts, manifests, strict=True)
    ]
    sums = _DiffSums(manifests, positive)
    for rows_a, rows_b in in_step(streams):
        sums.add(rows_a, rows_b)
    return sums.result(parts[0].uri, parts[1].uri)


def _common_positive(a: Manifest, b: Manifest) -> str | None:
    return a.positive_label if a.positive_label == b.positive_label else None


class _DiffSums:
    """What a diff adds up while both runs are streamed."""

    def __init__(self, manifests: list[Manifest], positive: str | None) -> None:
        self._positive = positive
        self._index = [None if positive is None else m.label_names.index(positive) for m in manifests]
        self._seen = [0, 0]
        self._other_etag = 0
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._flags = [0, 0]
        self._shifts: list[NDArray[np.float32]] = []
        self._bins = [np.zeros(len(score_bins(np.zeros(0))), np.int64) for _ in manifests]
        self._most: list[ChangedRow] = []

    def add(self, a: pa.Table | None, b: pa.Table | None) -> None:
        """Counts the rows of one range of uris."""
        for k, rows in enumerate((a, b)):
            self._seen[k] += 0 if rows is None else rows.num_rows
        if a is None or b is None:
            return
        index = pc.index_in(a["uri"], value_set=b["uri"].combine_chunks())
        self._compare(a.filter(pc.is_valid(index)), b.take(index.drop_null()))

    def _compare(self, a: pa.Table, b: pa.Table) -> None:
        """Counts rows of the same uris."""
        self._other_etag += int(np.sum(_numpy(pc.not_equal(a["etag"], b["etag"]))))
        self._pairs.update(zip(a["label"].to_pylist(), b["label"].to_pylist(), strict=True))
        was, now = _numpy(a["flagged"]), _numpy(b["flagged"])
        self._flags[0] += int(np.sum(~was & now))
        self._flags[1] += int(np.sum(was & ~now))
        scores = [_scores(rows, k) for rows, k in zip((a, b), self._index, strict=True)]
        self._bins = [bins + score_bins(s) for bins, s in zip(self._bins, scores, strict=True)]
        shift = scores[1] - scores[0]
        self._shifts.append(shift)
        self._keep_most_changed(a, b, scores, shift)

    def _keep_most_changed(
        self, a: pa.Table, b: pa.Table, scores: list[NDArray[np.float32]], shift: NDArray[np.float32]
    ) -> None:
        for row in np.argsort(-np.abs(shift), kind="stable")[:MOST_CHANGED]:
            if shift[row] or a["label"][row] != b["label"][row]:
                self._most.append(
                    ChangedRow(
                        uri=a["uri"][row].as_py(),
                        label_a=a["label"][row].as_py(),
                        label_b=b["label"][row].as_py(),
                        score_a=float(scores[0][row]),
                        score_b=float(scores[1][row]),
                    )
                )
        self._most.sort(key=lambda one: (-abs(one.score_b - one.score_a), one.uri))
        del self._most[MOST_CHANGED:]

    def result(self, uri_a: str, uri_b: str) -> RunDiff:
        """The sums as a diff."""
        shifts = np.concatenate(self._shifts) if self._shifts else np.zeros(0, np.float32)
        matrix: dict[str, dict[str, int]] = {}
        for (before, now), count in sorted(self._pairs.items()):
            matrix.setdefault(before, {})[now] = count
        quantiles = np.quantile(shifts, QUANTILES) if len(shifts) else ()
        return RunDiff(
            a=uri_a,
            b=uri_b,
            shared=len(shifts),
            only_a=self._seen[0] - len(shifts),
            only_b=self._seen[1] - len(shifts),
            other_etag=self._other_etag,
            score=self._positive or "best label",
            label_changes=matrix,
            changed_labels=sum(count for (before, now), count in self._pairs.items() if before != now),
            newly_flagged=self._flags[0],
            no_longer_flagged=self._flags[1],
            shift_mean=float(shifts.mean(dtype=np.float64)) if len(shifts) else None,
            shift_quantiles={f"{q:.0%}": float(v) for q, v in zip(QUANTILES, quantiles, strict=False)},
            psi=psi(self._bins[0].tolist(), self._bins[1].tolist()) if len(shifts) else None,
            most_changed=tuple(self._most),
        )


def _numpy(column: Any) -> NDArray[Any]:
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()


def _scores(rows: pa.Table, positive: int | None) -> NDArray[np.float32]:
    if positive is None or not rows.num_rows:
        return rows["score"].to_numpy()
    return rows["scores"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)[:, positive]


def compact_run(uri: str, folder: str) -> str:
    """The location of the one Parquet file in FOLDER that holds exactly the live rows of the partition, sorted by uri.

    It appears, and replaces the one of an older generation, in a single rename or PUT: whoever reads FOLDER sees the
    old rows or the new ones. Its metadata name the partition, the generation and the manifest's digest.

    Raises:
        ConfigError: FOLDER lies in the partition, or holds other Parquet files.
        PlanError: the run is not finished or damaged.
        QuarantineLimitError: the run is over its limit.
    """
    partition = Partition(uri)
    manifest = finished_manifest(partition)
    target = open_store(folder)
    _refuse_folder(partition, target)
    metadata = {
        "cnn_ray.partition": partition.uri,
        "cnn_ray.generation": str(manifest.generation),
        "cnn_ray.manifest_sha256": partition.manifest_digest(manifest.generation),
    }
    schema = _schema(partition, manifest).with_metadata(metadata)
    with tempfile.TemporaryDirectory(prefix="cnn_ray-") as scratch:
        path = Path(scratch) / COMPACT_NAME
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in _row_groups(live_rows(partition.store, manifest.parts, manifest.superseded), schema):
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        target.put_file(COMPACT_NAME, path)
    return target.uri_of(COMPACT_NAME)


def _refuse_folder(partition: Partition, target: Store) -> None:
    if f"{target.uri}/".startswith(f"{partition.uri}/"):
        raise ConfigError(
            f"Expected a folder outside of the partition. Received: {target.uri}. Next: name another folder."
        )
    try:
        others = [key for key in target.keys() if key.endswith(".parquet") and key != COMPACT_NAME]
    except NotFoundError:
        others = []
    if others:
        raise ConfigError(
            f"Expected no other Parquet files in {target.uri}, which readers take as one table. Received: {others[0]}"
            f"{f' and {len(others) - 1} more' if others[1:] else ''}. Next: name a folder of its own."
        )


def _schema(partition: Partition, manifest: Manifest) -> pa.Schema:
    """The columns of all generations: each one has those of its input, the fixed ones are always the same."""
    first = {ref.generation: ref.name for ref in sorted(manifest.parts, key=lambda ref: ref.name, reverse=True)}
    schemas = [SCORE_SCHEMA, *(partition.read_part(name)[0].schema.remove_metadata() for name in first.values())]
    return pa.unify_schemas(schemas, promote_options="permissive")


def _row_groups(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(_conformed(table, schema))
        count += table.num_rows
        if count >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting, count = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
