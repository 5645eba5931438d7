"""Who works on a partition now. The lease only saves work: correctness comes from put-if-absent.

It is an object with an owner and an expiry, moved by compare-and-swap and renewed by a heartbeat thread. A holder that
died on this host is recognised by its process and replaced at once; one that died elsewhere is replaced at expiry.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from cnn_ray.errors import BusyError, NotFoundError, StorageError
from cnn_ray.storage import Store

log = logging.getLogger(__name__)

LEASE = "_lease.json"


class Holder(BaseModel):
    """What _lease.json says. Times are seconds since 1970, UTC; `process` tells a reused pid from the holder's own."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    host: str
    pid: int
    process: str
    since_s: float
    expires_s: float

    def alive(self, now_s: float) -> bool:
        """Whether the holder may still be at work."""
        if self.host == socket.gethostname() and _process_identity(self.pid) != self.process:
            return False
        return now_s < self.expires_s


class Lease:
    """A held lease, to be used as a context manager: renewed while inside, released at the end.

    Raises:
        BusyError: somebody else holds it; the message says who and since when.
    """

    def __init__(self, store: Store, duration_s: float) -> None:
        self._store = store
        self._duration_s = duration_s
        self._since_s = time.time()
        self._token: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease-heartbeat", daemon=True)

    def __enter__(self) -> Lease:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._token is not None:
            try:
                self._token = self._store.put_if_match(LEASE, self._document(expires_s=0), self._token)
            except StorageError as failure:  # it expires by itself
                log.warning("The lease could not be released, it expires in %.0f s: %s", self._duration_s, failure)

    def _take(self) -> None:
        while True:
            try:
                raw, token = self._store.get_versioned(LEASE)
            except NotFoundError:
                if self._store.put_if_absent(LEASE, self._document()):
                    self._token = self._store.get_versioned(LEASE)[1]
                    return
                continue
            holder = _parse(raw)
            if holder is not None and holder.alive(time.time()):
                raise BusyError(_busy_message(holder, self._store))
            self._token = self._store.put_if_match(LEASE, self._document(), token)
            if self._token is not None:
                return

    def _document(self, expires_s: float | None = None) -> bytes:
        pid = os.getpid()
        return (
            Holder(
                host=socket.gethostname(),
                pid=pid,
                process=_process_identity(pid) or "",
                since_s=self._since_s,
                expires_s=time.time() + self._duration_s if expires_s is None else expires_s,
            )
            .model_dump_json(indent=2)
            .encode()
        )

    def _renew_until_stopped(self) -> None:
        while self._token is not None and not self._stop.wait(self._duration_s / 4):
            try:
                self._token = self._store.put_if_match(LEASE, self._document(), self._token)
            except StorageError as failure:
                log.warning("The lease could not be renewed, trying again: %s", failure)
                continue
            if self._token is None:
                log.warning("Another run took this partition over; both may work on, each part is written once only.")


def _parse(raw: bytes) -> Holder | None:
    try:
        return Holder.model_validate_json(raw)
    except ValidationError:
        return None  # a damaged lease blocks nobody


def _busy_message(holder: Holder, store: Store) -> str:
    since = datetime.fromtimestamp(holder.since_s, UTC).isoformat(timespec="seconds")
    left_s = max(holder.expires_s - time.time(), 0)
    return (
        f"Expected a free partition {store.uri}. Received: process {holder.pid} on {holder.host} works on it "
        f"since {since}. Next: wait for it and run again; if it died, its lease ends in {left_s:.0f} s."
    )


def _process_identity(pid: int) -> str | None:
    """Boot and start time of a running process, None where there is none; empty where the system cannot tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None if Path("/proc").is_dir() else ""
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"
