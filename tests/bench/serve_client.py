"""Load for one URL from a process of its own: closed loop or open loop, every answer's status, time and scores kept.

    python tests/bench/serve_client.py URL BODIES --connections 32 --seconds 8
    python tests/bench/serve_client.py URL BODIES --rate 60 --connections 256 --seconds 20 --retry --expected FILE

BODIES is a folder of PNG and JPEG files; each is one request body, in turns. The last line of output is the summary
as JSON. Closed loop: every connection sends its next request when it has its answer. Open loop (`--rate`): requests are
due at fixed times, whoever is late; the latency counts from when a request was due, so a stall is not hidden. SIGTERM
ends it early, with its summary.

The documented client retry (`--retry`), which is safe because a prediction changes nothing: on 429, 502, 503, 504 and
on a connection that breaks, wait Retry-After seconds and 0.1 s doubled each time, half of it random, and send again.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import random
import signal
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools

RETRYABLE = {429, 502, 503, 504}
ATTEMPTS = 8
FIRST_WAIT_S = 0.1
BROKEN = 0
"""Stands for a status where the connection broke before an answer."""
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Answer:
    """One request as its sender saw it: seconds from the start of the load, and whether a 200 had the right scores."""

    sent_s: float
    latency_s: float
    status: int
    attempts: int
    wrong: bool
    retry_after: bool
    version: str | None


@dataclass(frozen=True)
class Body:
    """One request, ready to be written, and the scores that each version must answer."""

    name: str
    request: bytes


class Connection(asyncio.Protocol):
    """A keep-alive connection that carries one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[None] | None = None
        self.retry_after: str | None = None
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(exc or ConnectionResetError("closed before the answer"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_exception(ConnectionError(f"no HTTP: {error}"))
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        waiting, self._waiting = self._waiting, None
        if not self._parser.should_keep_alive():
            self.close()
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> int:
        """The status; the body and Retry-After lie in the attributes.

        Raises:
            ConnectionError: the connection broke before the answer was complete.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("closed")
        self._parser = httptools.HttpResponseParser(self)
        self.body, self.retry_after = b"", None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._waiting
        return self._parser.get_status_code()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Checker:
    """Compares answers with what each version must say; answers seen before cost one look-up."""

    def __init__(self, expected: dict[str, dict[str, list[float]]] | None) -> None:
        self._expected = expected
        self._good: dict[tuple[str, bytes], str | None] = {}

    def check(self, name: str, body: bytes) -> tuple[bool, str | None]:
        """(whether the answer is wrong, the version that it names)."""
        if (name, body) in self._good:
            return False, self._good[name, body]
        try:
            version, scores = scores_of(json.loads(body))
        except (ValueError, KeyError, TypeError, IndexError):
            return True, None
        if self._expected is not None:
            wanted = self._expected.get(version or next(iter(self._expected)), {}).get(name)
            if wanted is None or float32(scores) != float32(wanted):
                return True, version
        self._good[name, body] = version
        return False, version


def float32(scores: list[float]) -> bytes:
    """Their bits: an answer may write a float32 with as many digits as it likes."""
    return struct.pack(f"{len(scores)}f", *scores)


def scores_of(document: Any) -> tuple[str | None, list[float]]:
    """(version or None, scores in label order) of an answer in our form or in TensorFlow Serving's."""
    if "predictions" in document:
        return None, [float(score) for score in document["predictions"][0]["scores"]]
    version = document.get("version")
    scores = document["scores"]
    return None if version is None else str(version), [float(scores[label]) for label in sorted(scores)]


class Load:
    """What one run of the load needs and what it has seen."""

    def __init__(self, url: str, bodies: list[Body], checker: Checker, *, retry: bool, timeout_s: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._turn: Iterator[Body] = itertools.cycle(bodies)
        self._checker = checker
        self._attempts = ATTEMPTS if retry else 1
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._random = random.Random(1)
        self.answers: list[Answer] = []
        self.late = 0
        self.stopped = False
        self.start = 0.0
        self.start_unix_s = 0.0

    def stop(self) -> None:
        """No request is sent from now on; those in flight are still waited for."""
        self.stopped = True

    async def closed(self, connections: int, seconds: float) -> None:
        """As fast as the answers come, over so many connections."""
        self._begin()
        end = self.start + seconds

        async def one() -> None:
            while not self.stopped and (now := time.perf_counter()) < end:
                await self._ask(next(self._turn), now)

        await asyncio.gather(*(one() for _ in range(connections)))

    async def open(self, rate: float, most: int, seconds: float) -> None:
        """`rate` requests a second over as many connections as that takes; beyond `most` they are counted as late."""
        self._begin()
        running: set[asyncio.Task[None]] = set()
        for number in range(int(rate * seconds)):
            if self.stopped:
                break
            due = self.start + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if len(running) >= most:
                self.late += 1
                continue
            task = asyncio.create_task(self._ask(next(self._turn), due))
            running.add(task)
            task.add_done_callback(running.discard)
        while running:
            await asyncio.wait(running)

    def _begin(self) -> None:
        self.start, self.start_unix_s = time.perf_counter(), time.time()

    async def _ask(self, body: Body, due: float) -> None:
        status, connection, attempt = BROKEN, None, 0
        for attempt in range(1, self._attempts + 1):
            if attempt > 1:
                await asyncio.sleep(self._pause(attempt, connection))
            status, connection = await self._once(body)
            if status != BROKEN and status not in RETRYABLE:
                break
        wrong, version = False, None
        if status == 200 and connection is not None:
            wrong, version = self._checker.check(body.name, connection.body)
        told = connection is not None and connection.retry_after is not None
        done = time.perf_counter()
        self.answers.append(Answer(due - self.start, done - due, status, attempt, wrong, told, version))

    def _pause(self, attempt: int, connection: Connection | None) -> float:
        backoff = FIRST_WAIT_S * 2 ** (attempt - 2)
        told = connection.retry_after if connection is not None else None
        least = float(told) if told is not None and told.isdigit() else 0.0
        return least + backoff * self._random.uniform(0.5, 1)

    async def _once(self, body: Body) -> tuple[int, Connection | None]:
        connection = None
        try:
            connection = await self._connection()
            async with asyncio.timeout(self._timeout_s):
                status = await connection.ask(body.request)
        except (OSError, TimeoutError):
            if connection is not None:
                connection.close()
            return BROKEN, None
        if connection.usable:
            self._idle.append(connection)
        return status, connection

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return made

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def read_bodies(folder: Path, url: str, form: str, headers: dict[str, str]) -> list[Body]:
    """Each image file of the folder as a whole request: `image` sends the file, `json` TensorFlow Serving's b64 row."""
    parts = urlsplit(url)
    fixed = "".join(f"{name}: {value}\r\n" for name, value in {"Host": parts.netloc, **headers}.items())
    bodies = []
    for path in sorted(folder.iterdir()):
        raw, kind = path.read_bytes(), TYPES[path.suffix.lower()]
        if form == "json":
            raw, kind = tf_serving_row(raw), "application/json"
        head = f"POST {parts.path} HTTP/1.1\r\n{fixed}Content-Type: {kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
        bodies.append(Body(path.name, head.encode("latin-1") + raw))
    return bodies


def tf_serving_row(image: bytes) -> bytes:
    """The body of `:predict` with one encoded image."""
    return json.dumps({"instances": [{"b64": base64.b64encode(image).decode("ascii")}]}).encode()


def summary(load: Load, warm_up_s: float, seconds: float, cpu_s: float) -> dict[str, Any]:
    """Counts of all requests, rate and latencies of those sent after the warm-up."""
    measured = [answer for answer in load.answers if answer.sent_s >= warm_up_s]
    good = sorted(answer.latency_s for answer in measured if answer.status == 200)
    finished = [
        a for a in load.answers if a.status == 200 and warm_up_s <= a.sent_s + a.latency_s <= warm_up_s + seconds
    ]
    return {
        "requests": len(load.answers),
        "statuses": dict(sorted(Counter(str(answer.status) for answer in load.answers).items())),
        "broken": sum(answer.status == BROKEN for answer in load.answers),
        "wrong": sum(answer.wrong for answer in load.answers),
        "retried": sum(answer.attempts > 1 for answer in load.answers),
        "not_told_when": sum(a.status in (429, 503) and not a.retry_after for a in load.answers),
        "late": load.late,
        "versions": dict(Counter(answer.version for answer in load.answers if answer.version is not None)),
        "start_unix_s": load.start_unix_s,
        "rate": len(finished) / seconds,
        "p50_ms": 1000 * statistics.median(good) if good else None,
        "p99_ms": 1000 * good[min(len(good) - 1, int(0.99 * len(good)))] if good else None,
        "max_ms": 1000 * good[-1] if good else None,
        "client_cpu_ms": 1000 * cpu_s / max(len(load.answers), 1),
    }


async def drive(arguments: argparse.Namespace) -> Load:
    headers = dict(header.split(": ", 1) for header in arguments.header)
    bodies = read_bodies(arguments.bodies, arguments.url, arguments.form, headers)
    checker = Checker(json.loads(arguments.expected.read_text()) if arguments.expected else None)
    load = Load(arguments.url, bodies, checker, retry=arguments.retry, timeout_s=arguments.timeout)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, load.stop)
    seconds = arguments.warm_up + arguments.seconds
    if arguments.rate:
        await load.open(arguments.rate, arguments.connections, seconds)
    else:
        await load.closed(arguments.connections, seconds)
    load.close()
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path, help="folder of PNG and JPEG files")
    parser.add_argument("--form", choices=("image", "json"), default="image", help="how a file is sent")
    parser.add_argument("--connections", type=int, default=1, help="open loop: at most so many at a time")
    parser.add_argument("--rate", type=float, default=0, help="open loop: requests a second")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--warm-up", type=float, default=1, help="seconds before the measured ones")
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a request counts as broken")
    parser.add_argument("--retry", action="store_true", help="the documented client retry")
    parser.add_argument("--header", action="append", default=[], help="'Name: value', for instance the API key")
    parser.add_argument("--expected", type=Path, help="JSON: version -> file name -> scores")
    parser.add_argument("--log", type=Path, help="every request as a line of JSON")
    arguments = parser.parse_args()
    started_s = time.process_time()
    load = asyncio.run(drive(arguments))
    cpu_s = time.process_time() - started_s
    if arguments.log:
        arguments.log.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in load.answers))
    sys.stdout.write(json.dumps(summary(load, arguments.warm_up, arguments.seconds, cpu_s)) + "\n")


if __name__ == "__main__":
    main()
