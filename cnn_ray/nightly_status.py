"""What each date of a look-back window owes, as the partitions say, and `_nightly.json`, where nightly leaves word.

The partitions are the truth: a date is done because its manifest is there, running because its lease is renewed. The
status object adds what no partition can tell: why a date is still owed, how it differs from the night before, and how
the last call ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date as Date
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cnn_ray.errors import NotFoundError, PlanError
from cnn_ray.lease import LEASE, living_holder
from cnn_ray.manifests import Manifest
from cnn_ray.outputs import Partition
from cnn_ray.partitions import partition_uri
from cnn_ray.storage import Store, open_store

STATUS = "_nightly.json"
TOMBSTONE = "_pruned.json"
"""What is left of a partition that was removed for its age; such a date owes nothing."""
NO_SCREENSHOTS = "complete without a screenshot"
"""A date whose marker is there and whose input is empty: it owes nothing, and no partition can say so."""
NO_IMAGE = "no image in its input (empty_date: done)"
"""A date that is over without an image, where the configuration says that this is its end."""
KEEP_DAYS = 400
FORMAT = 1

State = Literal["done", "owed", "running", "failed"]

_HEAD = re.compile(r"version=(\d+)/(?:_(plan|manifest)-g(\d{4})\.json|(_lease\.json|_pruned\.json))")


@dataclass(frozen=True, slots=True)
class DateState:
    """What one date owes. `is_open` says that a plan waits for its manifest; `version` is the one that was found."""

    date: Date
    state: State
    detail: str
    version: int | None = None
    is_open: bool = False
    manifest: Manifest | None = None


class DateRecord(BaseModel):
    """What the last attempt at a date came to, as _nightly.json keeps it. `at` is UTC."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    state: State
    detail: str
    exit_code: int
    version: int | None
    drift: tuple[str, ...] = ()
    at: str


class CallRecord(BaseModel):
    """One call of nightly: when, where, with which version; how it ended is None while it runs, or was killed."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    reference: str
    host: str
    started_at: str
    finished_at: str | None = None
    exit_code: int | None = None


class ModelRecord(BaseModel):
    """What is known of one model's nights."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    last_call: CallRecord | None = None
    dates: dict[str, DateRecord] = {}


class NightlyStatus(BaseModel):
    """The whole of _nightly.json: several models may share an OUTPUT."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    format: int = FORMAT
    models: dict[str, ModelRecord] = {}


@dataclass
class _Version:
    """What the names in one version's folder tell."""

    plan: int = 0
    manifest: int = 0
    has_lease: bool = False
    is_pruned: bool = False

    @property
    def is_finished(self) -> bool:
        return 0 < self.manifest >= self.plan


def state_of(output_uri: str, date: Date, model: str, version: int, *, any_version: bool) -> DateState:
    """What the date owes to this version of the model; `any_version`: one that another has finished owes nothing.

    A live lease on any version counts as running, so that two versions never work on one date.

    Raises:
        PlanError: a manifest is damaged.
        StorageError: storage refused.
    """
    uri = partition_uri(output_uri, date, model, version)
    folder = open_store(uri.rpartition("/")[0])
    versions = _versions(folder)
    considered = [version, *sorted(set(versions) - {version}, reverse=True)] if any_version else [version]
    failed: DateState | None = None
    for number in considered:
        known = versions.get(number, _Version())
        if known.is_pruned and not known.manifest:
            return DateState(date, "done", "removed for its age", number)
        if known.is_finished:
            manifest = Partition(folder.uri_of(f"version={number}")).read_manifest(known.manifest)
            if manifest is not None and manifest.status == "complete":
                return DateState(date, "done", told_of(manifest), number, manifest=manifest)
            if manifest is not None and number == version:
                failed = DateState(date, "failed", f"{manifest.status}: {told_of(manifest)}", number, manifest=manifest)
    return _busy(folder, date, versions) or failed or _owed(date, version, versions.get(version, _Version()))


def read_status(output_uri: str) -> NightlyStatus:
    """What nightly runs have left below OUTPUT; an empty one where there is none.

    Raises:
        PlanError: the object is damaged.
    """
    store = open_store(output_uri)
    try:
        return _parsed(store, store.get(STATUS))
    except NotFoundError:
        return NightlyStatus()


def record(output_uri: str, model: str, change: Callable[[ModelRecord], ModelRecord]) -> None:
    """Afterwards the status object has the change of one model; those of other calls at the same time are kept.

    Raises:
        PlanError: the object is damaged.
        StorageError: storage refused.
    """
    store = open_store(output_uri)
    while True:
        try:
            raw, token = store.get_versioned(STATUS)
            status = _parsed(store, raw)
        except NotFoundError:
            store.put_if_absent(STATUS, _bytes(NightlyStatus()))
            continue
        mine = change(status.models.get(model, ModelRecord()))
        changed = status.model_copy(update={"models": {**status.models, model: _without_old(mine)}})
        if store.put_if_match(STATUS, _bytes(changed), token) is not None:
            return


def _versions(folder: Store) -> dict[int, _Version]:
    found: dict[int, _Version] = {}
    for key in folder.keys("version="):
        match = _HEAD.fullmatch(key)
        if match is None:
            continue
        known = found.setdefault(int(match[1]), _Version())
        match match[2], match[4]:
            case "plan", _:
                known.plan = max(known.plan, int(match[3]))
            case "manifest", _:
                known.manifest = max(known.manifest, int(match[3]))
            case _, str(name) if name == LEASE:
                known.has_lease = True
            case _:
                known.is_pruned = True
    return found


def _busy(folder: Store, date: Date, versions: dict[int, _Version]) -> DateState | None:
    for number, known in sorted(versions.items()):
        holder = living_holder(open_store(folder.uri_of(f"version={number}"))) if known.has_lease else None
        if holder is not None:
            return DateState(date, "running", f"process {holder.pid} on {holder.host} works on it", number)
    return None


def _owed(date: Date, version: int, known: _Version) -> DateState:
    if known.plan > known.manifest:
        return DateState(date, "owed", f"unfinished: generation {known.plan} is open", version, is_open=True)
    return DateState(date, "owed", "no run yet")


def told_of(manifest: Manifest) -> str:
    """A run in one line."""
    told = f"{manifest.scored:,} scored, {manifest.quarantined:,} quarantined, {manifest.flagged:,} flagged"
    return told + (f", {sum(manifest.left_out.values()):,} left out" if manifest.left_out else "")


def _parsed(store: Store, raw: bytes) -> NightlyStatus:
    try:
        return NightlyStatus.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise PlanError(
            f"Expected a whole {store.uri_of(STATUS)}. Received: {first['msg']}. Next: delete it; no result is in it."
        ) from None


def _bytes(status: NightlyStatus) -> bytes:
    return status.model_dump_json(indent=2).encode()


def _without_old(known: ModelRecord) -> ModelRecord:
    if len(known.dates) <= KEEP_DAYS:
        return known
    newest = max(Date.fromisoformat(day) for day in known.dates)
    kept = {day: one for day, one in known.dates.items() if newest - Date.fromisoformat(day) < timedelta(KEEP_DAYS)}
    return known.model_copy(update={"dates": kept})
