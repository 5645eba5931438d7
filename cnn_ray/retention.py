"""Old partitions removed, manifest first: whoever trusts manifests sees a whole run or none.

What a partition held is kept in its tombstone, `_pruned.json`, which says how far the removal is: `removing` before the
first manifest is deleted, `emptying` once no manifest and no plan is left, `removed` at the end. A removal that dies is
finished by the next one; a run that began in between, as its plan or manifest shows, is left alone.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import date as Date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cnn_ray.errors import BusyError, NotFoundError, PlanError
from cnn_ray.lease import Lease, living_holder
from cnn_ray.manifests import Manifest
from cnn_ray.nightly_status import TOMBSTONE
from cnn_ray.outputs import Partition
from cnn_ray.storage import Store, open_store

DELETE_THREADS = 16
LEASE_S = 60.0

_HEAD = re.compile(r"((?:.*/)?model=[^/]+/version=\d+)/(?:_manifest-g\d{4}\.json|_pruned\.json)")
_DATE = re.compile(r"/date=(\d{4}-\d{2}-\d{2})/")
_OURS = re.compile(r"part-g\d{4}-\d+\.parquet|_(?:plan|quarantine|superseded)/.+|_report\.html")
"""What is deleted after manifests and plans; files of other names are somebody else's and stay."""


class Tombstone(BaseModel):
    """What is left of a removed partition: how far the removal is, and its newest manifest. `manifests` are the SHA-256
    of those that were there when the removal began."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    status: Literal["removing", "emptying", "removed"]
    since: str
    manifests: dict[str, str]
    newest: dict[str, Any]

    def is_of(self, manifests: dict[str, str]) -> bool:
        """Whether the removal is under way and these manifests are some of those that it deletes."""
        return self.status != "removed" and manifests.items() <= self.manifests.items()


@dataclass(frozen=True)
class Removable:
    """A partition that is old enough. `resumes`: its removal has begun; rows and bytes are then those it had."""

    uri: str
    date: str
    finished_at: str
    rows: int
    size_bytes: int
    resumes: bool


def removable(output_uri: str, keep_days: int, today: Date) -> list[Removable]:
    """The finished partitions below OUTPUT whose date and whose end are both more than `keep_days` before today, and
    those whose removal has begun. Unfinished ones and those that somebody works on are not among them.

    Raises:
        PlanError: a manifest is damaged.
        StorageError: storage refused.
    """
    store = open_store(output_uri)
    heads = {match[1] for key in store.keys() if (match := _HEAD.fullmatch(key))}
    found = [_judged(store.uri_of(head), keep_days, today) for head in sorted(heads)]
    return [one for one in found if one is not None]


def remove(one: Removable) -> bool:
    """Whether the partition is gone now; False where somebody works on it, or a new run has begun in it.

    Raises:
        StorageError: storage refused; the next removal goes on from there.
    """
    partition = Partition(one.uri)
    store = partition.store
    try:
        with Lease(store, LEASE_S):
            tombstone = _tombstone(store)
            manifests = _digests(store)
            if tombstone is None or not tombstone.is_of(manifests):
                if one.resumes or not manifests:
                    return False
                tombstone = _begun(partition, manifests)
            if tombstone.status == "removing":
                for name in (*sorted(manifests), *store.keys("_plan-g")):  # the newest manifest last: it is the truth
                    store.delete(name)
                tombstone = _put(store, tombstone, "emptying")
            if store.keys("_plan-g") or store.keys("_manifest-g"):
                return False
            with ThreadPoolExecutor(DELETE_THREADS, thread_name_prefix="delete") as pool:
                list(pool.map(store.delete, [key for key in store.keys() if _OURS.fullmatch(key)]))
            _put(store, tombstone, "removed")
            return True
    except BusyError:
        return False


def _judged(uri: str, keep_days: int, today: Date) -> Removable | None:
    partition = Partition(uri)
    if living_holder(partition.store) is not None:
        return None
    manifest = partition.newest_manifest()
    tombstone = _tombstone(partition.store)
    if tombstone is not None and tombstone.is_of(_digests(partition.store)):
        return _described(uri, Manifest.model_validate(tombstone.newest), resumes=True)
    if manifest is None:
        return None
    dates = [Date.fromisoformat(found) for found in _DATE.findall(f"{uri}/")]
    newest = max([*dates, datetime.fromisoformat(manifest.finished_at).date()])
    return _described(uri, manifest, resumes=False) if (today - newest).days > keep_days else None


def _described(uri: str, manifest: Manifest, *, resumes: bool) -> Removable:
    dates = _DATE.findall(f"{uri}/")
    size_bytes = sum(ref.size_bytes for ref in (*manifest.parts, *manifest.quarantine, *manifest.superseded))
    return Removable(uri, dates[0] if dates else "", manifest.finished_at, manifest.planned, size_bytes, resumes)


def _tombstone(store: Store) -> Tombstone | None:
    try:
        return Tombstone.model_validate_json(store.get(TOMBSTONE))
    except NotFoundError:
        return None
    except ValidationError as error:
        raise PlanError(
            f"Expected a whole {store.uri_of(TOMBSTONE)}. Received: {error.errors()[0]['msg']}. "
            "Next: look at what is left in the partition and delete it by hand."
        ) from None


def _digests(store: Store) -> dict[str, str]:
    return {name: hashlib.sha256(store.get(name)).hexdigest() for name in store.keys("_manifest-g")}


def _begun(partition: Partition, manifests: dict[str, str]) -> Tombstone:
    """The tombstone, in place before anything is deleted."""
    manifest = partition.newest_manifest()
    newest = {} if manifest is None else manifest.model_dump(mode="json")
    since = datetime.now(UTC).isoformat(timespec="seconds")
    tombstone = Tombstone(status="removing", since=since, manifests=manifests, newest=newest)
    return _put(partition.store, tombstone, "removing")


def _put(store: Store, tombstone: Tombstone, status: Literal["removing", "emptying", "removed"]) -> Tombstone:
    moved = tombstone.model_copy(update={"status": status})
    store.put(TOMBSTONE, moved.model_dump_json(indent=2).encode())
    return moved
