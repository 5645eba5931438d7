# pyright: strict
"""A middleware for Ray Serve's own HTTP proxies: what they answer by themselves gets the form of our answers.

Ray words overload, time-outs and lost replicas as plain text, and a lost replica as 500. Here they become {"error"}
with a status that says whether to try again, and a request whose replica died before it answered is sent to another
one: scoring has no side effects, so a second try is safe. Bodies are bounded, because Ray's proxies read them whole.
Ray takes the middleware from RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH where its nodes are started; `cnn-ray serve`
sets that for a local Ray.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

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
SERVED_BY = "x-served-by"
"""A header of every answer that a replica of ours made."""
RETRY_AFTER_S = 1
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
_OWN_PATHS = ("/-/healthz", "/-/routes")
_MESSAGES = {
    404: (404, "Nothing is served at this path."),
    408: (504, "Expected an answer in time. Received: none yet. Next: ask for less at once."),
    429: (429, "Too many requests are waiting. Next: try again."),
    503: (503, "No replica can answer now. Next: try again."),
}
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
        self._requests = 0
        self._bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1003})
        if scope["type"] != "http" or scope["path"] in _OWN_PATHS:
            return await self._app(scope, receive, send)
        if scope["method"] != "POST":
            return await self._forward(scope, receive, send)
        if self._requests >= self._max_requests:
            return await _send_error(send, *_MESSAGES[429])
        self._requests += 1
        try:
            return await self._forward(scope, receive, send)
        finally:
            self._requests -= 1

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
                return await _send_error(send, 500, "Internal error. Next: see the log of the proxy.")
            if answer.started or body.gone:
                return None
            refusal = body.refusal or answer.refusal
            if refusal is not None or not body.replay():
                return await _send_error(send, *(refusal or _LOST))

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
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
