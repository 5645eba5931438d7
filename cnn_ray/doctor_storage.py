"""The doctor's look at storage: it answers, keeps what it is given, and refuses what it must refuse.

Everything that scoring promises stands on put-if-absent, so a server that ignores `If-None-Match` is an error here and
lost rows there. Probes lie under `_doctor/` of the output and are removed again.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cnn_ray.doctor_finding import Finding, error, ok, warning
from cnn_ray.errors import (
    ArchivedError,
    CnnRayError,
    ConfigError,
    DamagedError,
    EncodedError,
    NotFoundError,
    ServerLacksError,
    StorageError,
    TooLargeError,
)
from cnn_ray.manifest_files import is_manifest, manifest_exists
from cnn_ray.storage import S3Store, Store, open_store

PROBE_FOLDER = "_doctor"
PROBE_BYTES = 300_000
SKEW_ERROR_S = 15 * 60
"""S3 refuses signatures from clocks that are further off."""
SKEW_WARNING_S = 20
"""A lease of a minute is judged by the clocks of two machines."""


def input_finding(uri: str) -> Finding:
    """Whether the images can be listed, or the manifest be read."""
    check = "input"
    try:
        if is_manifest(uri):
            if manifest_exists(uri):
                return ok(check, f"{uri} is there")
            return error(check, f"there is no {uri}", "check input_uri and --date")
        store = open_store(uri)
        if isinstance(store, S3Store):
            return _s3_input_finding(store, check)
        if not os.access(store.uri, os.R_OK | os.X_OK) or not Path(store.uri).is_dir():
            return error(check, f"{store.uri} is no readable folder", "check input_uri, --date and the folder's mode")
        return ok(check, f"{store.uri} is readable")
    except CnnRayError as failure:
        return _failed(check, failure)


def _s3_input_finding(store: S3Store, check: str) -> Finding:
    """Whether the first object can be listed and read: the one permission is often there without the other."""
    listed = next(iter(store.list()), None)
    if listed is None:
        return ok(check, f"{store.uri} answers; nothing is there")
    uri, etag = (str(listed[name][0].as_py()) for name in ("uri", "etag"))
    key = uri[len(store.uri) + 1 :]
    try:
        store.check_etag(key)
        store.get(key, if_match=etag, max_bytes=PROBE_BYTES)
    except (TooLargeError, ConfigError, EncodedError, DamagedError):
        pass  # what is wrong with one image is no affair of the storage
    except ArchivedError as failure:
        return warning(check, *_parts(failure))
    return ok(check, f"{store.uri} answers, {key} can be read")


def output_findings(uri: str, check: str = "output") -> list[Finding]:
    """Whether the location can be written, really refuses a second put-if-absent and a put-if-match of an old version,
    and gives back the bytes that it was given."""
    try:
        store = open_store(uri)
        store.check_writable()
        with _probe(store) as key:
            return [_conditional_finding(store, check), *_round_trip_findings(store, key, check)]
    except CnnRayError as failure:
        return [_failed(check, failure)]


def clock_finding(said: str | None, now: datetime) -> Finding:
    """Whether this machine's clock and the server's Date header agree."""
    if said is None:
        return warning("clock", "the server tells no time", "see that NTP runs here: leases and signatures need it")
    skew_s = (now - parsedate_to_datetime(said)).total_seconds()
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the storage"
    if abs(skew_s) > SKEW_ERROR_S:
        return error("clock", text, "set the clock (timedatectl set-ntp true): S3 refuses such signatures")
    if abs(skew_s) > SKEW_WARNING_S:
        return warning("clock", text, "set the clock (timedatectl set-ntp true): leases are judged by it")
    return ok("clock", text)


def read_clock_finding(uri: str) -> Finding:
    """The clock against the server of a location; local folders have our own clock."""
    try:
        store = open_store(uri)
        if not isinstance(store, S3Store):
            return ok("clock", "local storage, one clock")
        return clock_finding(store.server_date(), datetime.now(UTC))
    except CnnRayError as failure:
        return _failed("clock", failure)


def arrow_finding(uri: str, check: str, *, needed: bool) -> Finding:
    """Whether a file written by pyarrow, as Ray Train writes checkpoints, comes back as it was.

    Arrow's S3 client sends bodies in chunks with a checksum behind; servers that do not know that (s3rver, others of
    their age) store the chunk headers as part of the file. `needed` says that such a writer is used.
    """
    try:
        store = open_store(uri)
        if not isinstance(store, S3Store):
            return ok(check, "local storage")
        payload = random.Random(0).randbytes(PROBE_BYTES)
        with _probe(store) as key:
            said = _write_by_arrow(store.uri_of(key), payload)
            if said is not None:
                return (error if needed else warning)(
                    check, f"pyarrow cannot write {uri}: {said}", "check the AWS settings"
                )
            if store.get(key) == payload:
                return ok(check, "a chunked upload comes back whole")
        return (error if needed else warning)(
            check,
            f"the server of {uri} corrupts uploads in chunks",
            "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required on all nodes, or a newer server",
        )
    except CnnRayError as failure:
        return _failed(check, failure)


def _write_by_arrow(uri: str, payload: bytes) -> str | None:
    """None when pyarrow wrote the object, else what it said."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(uri)
        with system.open_output_stream(path) as stream:
            stream.write(payload)
    except (OSError, pa.ArrowException) as failure:
        return type(failure).__name__
    return None


@contextmanager
def _probe(store: Store) -> Iterator[str]:
    """A key that nobody has; afterwards it is gone, whatever happened."""
    key = f"{PROBE_FOLDER}/{secrets.token_hex(8)}"
    try:
        yield key
    finally:
        with contextlib.suppress(StorageError):
            store.delete(key)
        if not isinstance(store, S3Store):
            with contextlib.suppress(OSError):
                (Path(store.uri) / PROBE_FOLDER).rmdir()


def _conditional_finding(store: Store, check: str) -> Finding:
    try:
        store.check_conditional_writes()
    except ServerLacksError as failure:
        said, mend = _parts(failure)
        return error(check, f"{store.uri}: {said.partition(' Received: ')[2]}", mend)
    except CnnRayError as failure:
        return _failed(check, failure)
    return ok(check, f"{store.uri} is writable, and put-if-absent and put-if-match hold")


def _round_trip_findings(store: Store, key: str, check: str) -> list[Finding]:
    payload = random.Random(1).randbytes(PROBE_BYTES)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(payload)
        for way in ("bytes", "a file"):
            if way == "bytes":
                store.put(key, payload)
            else:
                store.put_file(key, Path(file.name))
            try:
                came = store.get(key)
            except NotFoundError:
                came = None
            if came != payload:
                mend = "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required, or another server"
                return [error(check, f"{store.uri} gives back other bytes than were put as {way}", mend)]
    return [ok(check, f"{PROBE_BYTES:,} bytes come back as they were put")]


def _failed(check: str, failure: CnnRayError) -> Finding:
    return error(check, *_parts(failure))


def _parts(failure: CnnRayError) -> tuple[str, str]:
    said, _, mend = str(failure).partition(" Next: ")
    return said, mend or "see the message"
