# pyright: strict
"""A middleware for Ray Serve's own HTTP proxies: what they answer by themselves gets the form of our answers.

Ray words overload, time-outs and lost replicas as plain text, and a lost replica as 500. Here they become {"error"}
with a status that says whether to try again, and a request whose replica died before it answered is sent to another
one: scoring has no side effects, so a second try is safe. Bodies are bounded, because Ray's proxies read them whole.
Ray takes the middleware from RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH where its nodes are started; `cnn-ray serve`
sets that for a local Ray.

While the endpoint starts and while it drains, new requests get 503 with Retry-After and Connection: close. `cnn-ray
serve` says when by a file that exists exactly while requests are to be answered. On a cluster there is no such file:
there a path that Ray does not know is 404 only if Ray knows some path.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cnn_ray.access_log import AccessEntry, log_access, open_access_log, request_id
from cnn_ray.log_stream import open_error_log

if TYPE_CHECKING:
    from starlette.middleware import Middleware

logger = logging.getLogger(__name__)

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

IMPORT_PATH = "cnn_ray.gateway:middlewares"
IMPORT_PATH_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MAX_REQUESTS_VARIABLE = "CNN_RAY_GATEWAY_MAX_REQUESTS"
MAX_BODY_VARIABLE = "CNN_RAY_GATEWAY_MAX_BODY_BYTES"
OPEN_VARIABLE = "CNN_RAY_GATEWAY_OPEN_FILE"
"""Names the file that exists while requests are answered; without the variable they always are."""
ACCESS_LOG_VARIABLE = "CNN_RAY_GATEWAY_ACCESS_LOG"
"""1: what is refused here has a line in the access log."""
SERVED_BY = "x-served-by"
"""A header of every answer that a replica of ours made."""
RETRY_AFTER_S = 1
DISCARD_S = 2.0
"""How long the body of a request that is refused with 503 is read: a connection that is closed before would be reset
under the client, which then never sees the answer."""
MAX_REPLAYED_BYTES = 8 * 1024**2
"""A larger body is not kept for a second try."""
BODIES_IN_MEMORY = 16
"""Times the largest body that one proxy holds at the same time: Ray's proxies read bodies as fast as they come."""

_NEVER = re.compile(rb"(?!)")
_READ_BY_RAY = {
    b"x-request-id": re.compile(rb"[A-Za-z0-9._:-]{1,128}"),
    b"x-request-timeout-seconds": re.compile(rb"[0-9.]{1,16}"),
    b"x-request-disconnect-disabled": _NEVER,
    b"serve-multiplexed-model-id": _NEVER,
    b"x-session-id": _NEVER,
}
_HEALTH_PATH = "/-/healthz"
_ROUTES_PATH = "/-/routes"
_OWN_PATHS = (_HEALTH_PATH, _ROUTES_PATH)
_MESSAGES = {
    404: (404, "Nothing is served at this path."),
    408: (504, "Expected an answer in time. Received: none yet. Next: ask for less at once."),
    429: (429, "Too many requests are waiting. Next: try again."),
    503: (503, "No replica can answer now. Next: try again."),
}
_CLOSED = (503, "The endpoint is starting or shutting down. Next: try again.")
_LOST = (503, "The replica was lost before it answered. Next: try again.")


def middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves."""
    from starlette.middleware import Middleware

    return [Middleware(Gateway)]


class Gateway:
    """An ASGI application around Ray's."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._max_requests = int(os.environ.get(MAX_REQUESTS_VARIABLE, "1024"))
        self._max_body_bytes = int(os.environ.get(MAX_BODY_VARIABLE, str(64 * 1024**2)))
        self._open_file = Path(os.environ[OPEN_VARIABLE]) if OPEN_VARIABLE in os.environ else None
        # HAProxy asks each replica for its health by this path, and finds out itself who may answer clients.
        self._health_is_for_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
        self._requests = 0
        self._bytes = 0
        open_error_log()
        self._logs_access = os.environ.get(ACCESS_LOG_VARIABLE) == "1"
        if self._logs_access:
            open_access_log()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection or request (the ASGI interface)."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1003})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        own = scope["path"] in _OWN_PATHS
        if own and self._health_is_for_haproxy:
            return await self._app(scope, receive, send)
        if self._open_file is not None and not self._open_file.exists():
            return await self._refuse_unread(scope, receive, send)
        if own:
            return await self._own_answer(scope, receive, send)
        if scope["method"] != "POST":
            return await self._forward(scope, receive, send)
        if self._requests >= self._max_requests:
            return await self._refuse(scope, send, *_MESSAGES[429])
        self._requests += 1
        try:
            return await self._forward(scope, receive, send)
        finally:
            self._requests -= 1

    async def _own_answer(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer for Ray's health: a proxy without any route is not healthy, whatever it says itself."""
        if scope["path"] == _HEALTH_PATH and not await self._knows_routes(scope):
            return await self._refuse(scope, send, *_CLOSED)
        return await self._app(scope, receive, send)

    async def _knows_routes(self, scope: Message) -> bool:
        """Return whether Ray has any application: none before the first one is deployed and after the last is gone."""
        said: dict[str, Any] = {"status": 0, "body": b""}

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            said["status"] = message.get("status", said["status"])
            said["body"] += message.get("body", b"")

        asked: Message = {
            **scope,
            "path": _ROUTES_PATH,
            "raw_path": _ROUTES_PATH.encode(),
            "method": "GET",
            "headers": [],
        }
        await self._app(asked, receive, send)
        return said["status"] == 200 and said["body"].strip() not in (b"", b"{}")

    async def _refuse_unread(self, scope: Message, receive: Receive, send: Send) -> None:
        await _discard_body(scope, receive, self._max_body_bytes)
        await self._refuse(scope, send, *_CLOSED)

    async def _refuse(self, scope: Message, send: Send, status: int, message: str) -> None:
        await _send_error(send, status, message)
        if self._logs_access:
            log_access(_entry(scope, status))

    async def _forward(self, scope: Message, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": [header for header in scope["headers"] if _is_safe(*header)]}
        body = _Body(receive, self._reserve)
        try:
            await self._answer(scope, body, send)
        finally:
            self._bytes -= body.bytes

    async def _answer(self, scope: Message, body: _Body, send: Send) -> None:
        while True:
            answer = _Answer(send)
            try:
                await self._app(scope, body.receive, answer.send)
            except Exception:
                logger.exception("Ray's proxy failed")
                if answer.started:
                    raise  # the server ends the connection
                return await self._refuse(scope, send, 500, "Internal error. Next: see the log of the server.")
            if answer.started or body.gone:
                return None
            refusal = body.refusal or answer.refusal
            if refusal is None and body.replay():
                continue
            if refusal == _MESSAGES[404] and not await self._knows_routes(scope):
                refusal = _CLOSED
            return await self._refuse(scope, send, *(refusal or _LOST))

    def _reserve(self, size: int, whole: int) -> tuple[int, str] | None:
        """Takes `size` bytes more for a body that has `whole` with them, or says why not."""
        if whole > self._max_body_bytes:
            return 413, f"Expected a body of at most {self._max_body_bytes} bytes. Received: more. Next: send less."
        if self._bytes + size > BODIES_IN_MEMORY * self._max_body_bytes:
            return _MESSAGES[429]
        self._bytes += size
        return None


class _Body:
    """The request's messages: counted, and kept while they are few so that they can be received a second time."""

    def __init__(self, receive: Receive, reserve: Callable[[int, int], tuple[int, str] | None]) -> None:
        self._receive = receive
        self._reserve = reserve
        self._kept: list[Message] = []
        self._again: list[Message] = []
        self._tried_again = False
        self.bytes = 0
        self.gone = False
        self.refusal: tuple[int, str] | None = None

    async def receive(self) -> Message:
        """The next message; where the body is refused the client is as good as gone for whoever reads it."""
        if self._again:
            return self._again.pop(0)
        message = await self._receive()
        if message["type"] != "http.request":
            self.gone = self.refusal is None
            return message
        size = len(message.get("body", b""))
        self.refusal = self._reserve(size, self.bytes + size)
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        self.bytes += size
        if self.bytes <= MAX_REPLAYED_BYTES:
            self._kept.append(message)
        return message

    def replay(self) -> bool:
        """Whether `receive` gives everything again from now on; true once."""
        if self._tried_again or self.bytes > MAX_REPLAYED_BYTES:
            return False
        self._tried_again = True
        self._again = list(self._kept)
        return True


class _Answer:
    """Passes on what a replica of ours answers, and holds back what Ray says by itself."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.refusal: tuple[int, str] | None = None

    async def send(self, message: Message) -> None:
        """The ASGI `send` for Ray's proxy."""
        if message["type"] == "http.response.start" and not self.started:
            status = int(message["status"])
            ours = any(bytes(name).lower() == SERVED_BY.encode() for name, _ in message["headers"])
            if status < 400 or ours:
                self.started = True
            elif status < 500 or status == 503:
                self.refusal = _MESSAGES.get(status, (status, "The request cannot be answered."))
        if self.started:
            await self._send(message)


def _is_safe(name: bytes, value: bytes) -> bool:
    """Whether Ray may read the header: it decodes some as UTF-8 without a net, echoes any X-Request-ID and makes one
    where there is none, and lets a client pick its replica or keep a request that nobody waits for."""
    known = _READ_BY_RAY.get(name.lower().replace(b"_", b"-"))
    return known is None or known.fullmatch(value) is not None


async def _send_error(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (429, 503):
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if status in (413, 503):  # the rest of the body is not waited for; another server may be reached anew
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _discard_body(scope: Message, receive: Receive, most_bytes: int) -> None:
    """Read the body that a client is sending, at most `most_bytes` and DISCARD_S seconds of it; one that waits for
    `100 Continue` before it sends is not asked to."""
    if any(name.lower() == b"expect" for name, _ in scope["headers"]):
        return
    left = most_bytes
    try:
        async with asyncio.timeout(DISCARD_S):
            while left >= 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _entry(scope: Message, status: int) -> AccessEntry:
    """Return what the access log says of a request that no replica has seen."""
    headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
    client = scope.get("client")
    return AccessEntry(
        request_id=request_id(headers.get(b"x-request-id", b"").decode("latin-1") or None),
        method=scope["method"],
        path=scope["path"],
        status=status,
        client=None if client is None else str(client[0]),
    )
