"""Who works on a partition now. The lease only saves work: correctness comes from put-if-absent.

It is an object with an owner and an expiry, moved by compare-and-swap and renewed by a heartbeat thread. A holder that
died on this machine is recognised by its process and replaced at once. Elsewhere the expiry decides; it is written by
one clock and read by another, so a holder that looks expired is watched for two heartbeats first: one that still renews
its lease is alive, whatever the clocks say.
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

from cnn_ray.errors import BusyError, CnnRayError, NotFoundError
from cnn_ray.storage import Store

log = logging.getLogger(__name__)

LEASE = "_lease.json"
HEARTBEATS = 4
"""Renewals in the time that a lease lasts: three may fail."""
MOST_SKEW_S = 900.0
"""S3 refuses clocks that are further off than this. What expired longer ago is not worth watching."""
RELEASE_S = 5.0
"""How long the end of a run waits for the lease's release: while storage is away, it expires by itself."""


class Holder(BaseModel):
    """What _lease.json says. Times are seconds since 1970, UTC; `process` tells a reused pid from the holder's own."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    host: str
    pid: int
    process: str
    since_s: float
    expires_s: float
    duration_s: float = 60.0

    @property
    def released(self) -> bool:
        """Whether the holder gave the lease back."""
        return self.expires_s <= 0

    def same_as(self, other: Holder) -> bool:
        """Whether both are documents of one held lease."""
        mine, others = ((h.host, h.pid, h.process, h.since_s) for h in (self, other))
        return mine == others

    def died_here(self) -> bool:
        """Whether the holder was a process of this machine and is gone; False where this machine cannot know."""
        machine = self.process.rpartition(":")[0]
        if self.host != socket.gethostname() or not machine or machine != _machine():
            return False
        return process_identity(self.pid) != self.process

    def expiry_is_plausible(self, now_s: float) -> bool:
        """Whether the expiry is one that a living holder with a good clock would have written."""
        return now_s < self.expires_s <= now_s + 2 * self.duration_s

    def long_expired(self, now_s: float) -> bool:
        """Whether the lease ended longer ago than clocks can differ."""
        return self.expires_s + MOST_SKEW_S < now_s


class Lease:
    """A held lease, to be used as a context manager: renewed while inside, released at the end.

    Losing it (a process that was stopped, storage that was away) stops nothing: the run goes on, and each part is still
    written once only.

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
        self._thread.join(RELEASE_S)
        if self._thread.is_alive():
            log.log(
                logging.WARNING if error is None else logging.DEBUG,  # the error says more
                "The lease is not released yet; it expires in %.0f s at the latest.",
                self._duration_s,
            )

    def _take(self) -> None:
        while self._token is None:
            try:
                raw, token = self._store.get_versioned(LEASE)
            except NotFoundError:
                if self._store.put_if_absent(LEASE, self._document()):
                    self._token = self._token_if_ours()
                continue
            self._refuse_living(raw, token)
            self._token = self._store.put_if_match(LEASE, self._document(), token)

    def _refuse_living(self, raw: bytes, token: str) -> None:
        """Returns where the lease with this token may be taken; that may need two heartbeats of watching.

        Raises:
            BusyError: the holder lives.
        """
        holder, now_s = _parse(raw), time.time()
        if holder is None or holder.released or holder.died_here() or holder.long_expired(now_s):
            return
        if not holder.expiry_is_plausible(now_s):
            watch_s = min(2 * holder.duration_s / HEARTBEATS, 2 * self._duration_s)
            log.warning("Process %d on %s looks gone; watching its lease for %.0f s.", holder.pid, holder.host, watch_s)
            time.sleep(watch_s)
            raw, newer = self._store.get_versioned(LEASE)
            holder = _parse(raw)
            if newer == token or holder is None or holder.released:
                return
        raise BusyError(_busy_message(holder, self._store))

    def _document(self, expires_s: float | None = None) -> bytes:
        pid = os.getpid()
        return (
            Holder(
                host=socket.gethostname(),
                pid=pid,
                process=process_identity(pid) or "",
                since_s=self._since_s,
                expires_s=time.time() + self._duration_s if expires_s is None else expires_s,
                duration_s=self._duration_s,
            )
            .model_dump_json(indent=2)
            .encode()
        )

    def _renew_until_stopped(self) -> None:
        """Heartbeats until the block ends, then the release: one thread, so that no heartbeat follows the release."""
        while not self._stop.wait(self._duration_s / HEARTBEATS):
            if not self._put(None):
                return
        self._put(0)

    def _put(self, expires_s: float | None) -> bool:
        """Whether the lease is still ours, as far as storage can tell."""
        if self._token is None:
            return False
        try:
            token = self._store.put_if_match(LEASE, self._document(expires_s), self._token)
            if token is None and (moved := self._token_if_ours()) is not None:
                token = self._store.put_if_match(LEASE, self._document(expires_s), moved)
            self._token = token
        except CnnRayError as failure:  # the next heartbeat tries again; nobody else is hurt
            log.log(
                logging.DEBUG if self._stop.is_set() else logging.WARNING,
                "The lease could not be renewed: %s",
                failure,
            )
            return True
        if self._token is None:
            log.warning("Another run took this partition over; both may work on, each part is written once only.")
        return self._token is not None

    def _token_if_ours(self) -> str | None:
        """Token of the lease where it is this very one: a heartbeat whose answer was lost has another than we know."""
        try:
            raw, token = self._store.get_versioned(LEASE)
        except NotFoundError:
            return None
        holder, ours = _parse(raw), _parse(self._document())
        return token if holder is not None and ours is not None and holder.same_as(ours) else None


def living_holder(store: Store) -> Holder | None:
    """Who works on the partition as its lease says now, None where nobody does.

    One look: a holder elsewhere whose lease has just expired counts as gone here, and is watched by who takes it over.
    """
    try:
        holder = _parse(store.get(LEASE))
    except NotFoundError:
        return None
    if holder is None or holder.released or holder.died_here():
        return None
    return holder if holder.expiry_is_plausible(time.time()) else None


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


def process_identity(pid: int) -> str | None:
    """Machine and start time of a running process, None where there is none; empty where the system cannot tell.

    A process that ended and was not waited for (Z) is gone too, although its pid is still there.
    """
    machine = _machine()
    if not machine:
        return ""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    after_name = stat.rpartition(")")[2].split()
    return None if after_name[0] in "ZX" else f"{machine}:{after_name[19]}"


def _machine() -> str:
    """This boot of this machine and its set of pids, because containers may share a host name; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""
