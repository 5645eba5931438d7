"""The fault proxy as a process: an HTTP server in front of an S3 server that counts, delays, breaks and remembers.

Usage: proxy_server.py UPSTREAM_URL. Prints its own URL, then serves until it is ended. Steer it with `chaos.proxy`:
`POST /-/settings` takes the fields of `Settings`, `GET /-/counters` answers what was counted, `POST /-/reset` forgets.

Kinds of requests: get (an object below `input_path`), read (any other object), put, list, head, other.
Which request is hit depends on the seed, the request and how often it was sent before, not on the order of threads: the
same seed and requests meet the same faults. PUTs of one key go upstream one by one, because S3's are atomic.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

RESET_ON_CLOSE = b"\1\0\0\0\0\0\0\0"  # struct linger: on, 0 s
HEAD_BYTES = 64 * 1024


@dataclass
class Settings:
    """What a test wants. Rates are per request; `faults` is {kind: {fault: rate}}, the kind "all" holds for every one.

    Faults: slow_down (503), internal (500), reset, truncated, stall (half the body, then `stall_s`), expired (400),
    lost (done upstream, then a reset). `expired` and `outage` hold for every request while they are set; `outage_after`
    begins an outage after so many more requests. `trip` sends a signal at one request: {kind, nth, when, pid, signal}.
    """

    seed: int = 0
    faults: dict[str, dict[str, float]] = field(default_factory=dict)
    latency_s: float = 0.0
    stall_s: float = 0.2
    outage: bool = False
    outage_after: int | None = None
    expired: bool = False
    trip: dict[str, Any] | None = None
    input_path: str = ""


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    head: list[bytes]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def raw_head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} -", *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def xml_error(status: int, code: str) -> Answer:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
    return Answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)


def plain(value: object) -> Answer:
    body = json.dumps(value).encode()
    return Answer(200, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))], body)


ERRORS = {
    "slow_down": xml_error(503, "SlowDown"),
    "internal": xml_error(500, "InternalError"),
    "expired": xml_error(400, "ExpiredToken"),
}


class Proxy:
    """The server: one task per connection, connections are kept alive."""

    def __init__(self, upstream: str) -> None:
        self.host, self.port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self.settings = Settings()
        self.counters: Counter[str] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.objects: dict[str, Answer] = {}
        self.locks: dict[str, asyncio.Lock] = {}
        self.flying = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while (request := await read_request(reader, writer)) is not None and await self.serve(request, writer):
                pass
        writer.close()

    async def serve(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        if request.path.startswith("/-/"):
            return await send(self.control(request), request, writer)
        kind = self.kind(request)
        self.counters[f"{kind}.requests"] += 1
        self.flying += 1
        self.counters["most_in_flight"] = max(self.counters["most_in_flight"], self.flying)
        try:
            return await self.disturbed(kind, request, writer)
        finally:
            self.flying -= 1

    async def disturbed(self, kind: str, request: Request, writer: asyncio.StreamWriter) -> bool:
        settings = self.settings
        tripped = self.trip(kind)
        if tripped == "before":
            self.pull()
        if settings.outage_after is not None:
            settings.outage_after -= 1
            settings.outage = settings.outage or settings.outage_after < 0
        fault = "reset" if settings.outage else "expired" if settings.expired else self.draw(kind, request)
        if fault:
            self.counters[f"{kind}.{fault}"] += 1
            self.counters["faults"] += 1
        if kind == "get" and settings.latency_s:
            await asyncio.sleep(settings.latency_s)
        if fault == "reset":
            return reset(writer)
        answer = ERRORS.get(fault) or await self.answer(kind, request)
        if tripped == "after":
            self.pull()
        if fault == "lost":
            return reset(writer)
        if fault in ("truncated", "stall") and len(answer.body) > 1:
            half = len(answer.body) // 2
            writer.write(answer.raw_head() + answer.body[:half])
            await writer.drain()
            self.counters[f"{kind}.body_bytes"] += half
            if fault == "truncated":
                return False
            await asyncio.sleep(settings.stall_s)
            writer.write(answer.body[half:])
            await writer.drain()
            self.counters[f"{kind}.body_bytes"] += len(answer.body) - half
            return True
        if request.method != "HEAD":
            self.counters[f"{kind}.body_bytes"] += len(answer.body)
        return await send(answer, request, writer)

    def kind(self, request: Request) -> str:
        if request.method == "PUT":
            return "put"
        if request.method == "HEAD":
            return "head"
        if request.method != "GET":
            return "other"
        if "list-type=2" in request.target or request.path.count("/") < 2:
            return "list"
        root = self.settings.input_path
        return "get" if root and request.path.startswith(root) else "read"

    def draw(self, kind: str, request: Request) -> str:
        rates = {**self.settings.faults.get("all", {}), **self.settings.faults.get(kind, {})}
        if not rates:
            return ""
        self.sent[request.method, request.target] += 1
        nth = self.sent[request.method, request.target]
        chance = random.Random(f"{self.settings.seed} {request.method} {request.target} {nth}").random()
        for fault, rate in rates.items():
            chance -= rate
            if chance < 0:
                return fault
        return ""

    def trip(self, kind: str) -> str:
        wire = self.settings.trip
        if wire is None or wire["kind"] not in (kind, "all"):
            return ""
        wire["nth"] -= 1
        return wire["when"] if wire["nth"] == 0 else ""

    def pull(self) -> None:
        wire = self.settings.trip
        if wire is not None:
            self.counters["tripped"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(wire["pid"], wire["signal"])

    async def answer(self, kind: str, request: Request) -> Answer:
        if kind == "get" or (kind == "head" and request.path.startswith(self.settings.input_path or "\0")):
            return await self.from_memory(request)
        if kind == "put":
            async with self.locks.setdefault(request.path, asyncio.Lock()):
                return await self.ask_upstream(request)
        return await self.ask_upstream(request)

    async def from_memory(self, request: Request) -> Answer:
        """The object below `input_path`, which nobody changes: asked for once, then answered from memory."""
        found = self.objects.get(request.path)
        if found is None:
            bare = [line for line in request.head if not line.lower().startswith((b"if-", b"range"))]
            found = await self.ask_upstream(Request("GET", request.path, request.headers, bare, b""))
            if found.status != 200:
                return found
            keep = ("etag", "last-modified", "content-type")
            headers = [(name, value) for name, value in found.headers if name.lower() in keep]
            found = self.objects[request.path] = Answer(200, headers, found.body)
        etag = {name.lower(): value for name, value in found.headers}.get("etag", "")
        if request.headers.get("if-match", etag).strip('"') not in (etag.strip('"'), "*"):
            return xml_error(412, "PreconditionFailed")
        if request.headers.get("if-none-match", "").strip('"') == etag.strip('"'):
            return Answer(304, [("ETag", etag)], b"")
        return ranged(found, request.headers.get("range"))

    async def ask_upstream(self, request: Request) -> Answer:
        """The upstream's answer. HTTP/1.0, so that it never comes in chunks."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        try:
            head = [
                f"{request.method} {request.target} HTTP/1.0".encode("latin-1"),
                *request.head,
                b"Connection: close",
            ]
            writer.write(b"\r\n".join(head) + b"\r\n\r\n" + request.body)
            raw_head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.read(-1)
        finally:
            writer.close()
        lines = raw_head.decode("latin-1").split("\r\n")
        parsed = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:] if line)]
        headers = [(name, value) for name, value in parsed if name.lower() not in ("connection", "content-length")]
        length = {name.lower(): value for name, value in parsed}.get("content-length")
        headers.append(("Content-Length", length if length and request.method == "HEAD" else str(len(body))))
        return Answer(int(lines[0].split(" ")[1]), headers, body)

    def control(self, request: Request) -> Answer:
        if request.path == "/-/settings":
            changes = json.loads(request.body)
            unknown = set(changes) - {one.name for one in fields(Settings)}
            if unknown:
                return Answer(400, [("Content-Length", "0")], b"")
            for name, value in changes.items():
                setattr(self.settings, name, value)
        elif request.path == "/-/reset":
            self.counters.clear()
            self.sent.clear()
        return plain(dict(self.counters))


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *head = raw[:-4].split(b"\r\n")
    method, target, _ = first.decode("latin-1").split(" ")
    pairs = (line.decode("latin-1").partition(":") for line in head)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    dropped = (b"connection:", b"expect:", b"keep-alive:")
    return Request(method, target, headers, [line for line in head if not line.lower().startswith(dropped)], body)


async def send(answer: Answer, request: Request, writer: asyncio.StreamWriter) -> bool:
    writer.write(answer.raw_head() + (b"" if request.method == "HEAD" else answer.body))
    await writer.drain()
    return request.headers.get("connection", "").lower() != "close"


def ranged(found: Answer, asked: str | None) -> Answer:
    """The whole object, or the part of it that a Range header names ("bytes=a-b", "bytes=a-", "bytes=-n")."""
    total = len(found.body)
    headers = [*found.headers, ("Accept-Ranges", "bytes")]
    if not asked:
        return Answer(200, [*headers, ("Content-Length", str(total))], found.body)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(total - int(last), 0)
    stop = min(int(last) + 1, total) if first and last else total
    if start >= total:
        return xml_error(416, "InvalidRange")
    part = found.body[start:stop]
    span = ("Content-Range", f"bytes {start}-{stop - 1}/{total}")
    return Answer(206, [*headers, span, ("Content-Length", str(len(part)))], part)


def reset(writer: asyncio.StreamWriter) -> bool:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()
    return False


async def main() -> None:
    proxy = Proxy(sys.argv[1])
    server = await asyncio.start_server(proxy.connection, "127.0.0.1", 0, limit=HEAD_BYTES, backlog=512)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
