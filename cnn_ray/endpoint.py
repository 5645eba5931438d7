"""The endpoint as an ASGI application, without Ray: keys, limits, deadlines, metrics and log around every answer.

Every error is {"error": ...} with the status of its class; what went wrong inside is only logged. Ray Serve puts
replicas of it behind its ingress (`cnn_ray.serve`); any ASGI server runs it alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import quote

from cnn_ray import open_inference, protocol
from cnn_ray.access_log import AccessEntry, log_access, open_access_log, request_id
from cnn_ray.answers import Answer, Answers, Call, Figures
from cnn_ray.auth import KeyRing, is_local_request
from cnn_ray.config import ServeConfig
from cnn_ray.encoded_bodies import ACCEPTED, encoding_of, inflate
from cnn_ray.endpoint_metrics import CONTENT_TYPE as METRICS_TYPE
from cnn_ray.endpoint_metrics import EndpointMetrics, Snapshot, render
from cnn_ray.errors import CnnRayError
from cnn_ray.gateway import RETRY_AFTER_S, SERVED_BY
from cnn_ray.images import ImageCaps
from cnn_ray.page_files import page_file
from cnn_ray.request_errors import EncodingError, ForbiddenError
from cnn_ray.served_models import ImageDecoder, ServedModels

logger = logging.getLogger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]


TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Ray Serve's own header for a client's deadline."""
CLIENT_GONE = 499
BODIES_IN_MEMORY = 4
"""Times max_body_bytes that all bodies in flight may have together."""


class Endpoint:
    """Answers HTTP requests about the configured models; an ASGI application for one event loop."""

    def __init__(self, config: ServeConfig, metrics_text: Callable[[], Awaitable[bytes]] | None = None) -> None:
        """An endpoint whose models are warm. `metrics_text` is what /metrics answers; by default what this endpoint
        counted itself.

        Raises:
            ArtifactError: a model is missing or damaged, or this node lacks the engine or precision.
            ConfigError: the key file is none.
            StorageError: the key file cannot be read.
        """
        self.config = config
        self.metrics = EndpointMetrics()
        self.models = ServedModels(config, observe=self.metrics.predicted)
        self.models.load()
        self._keys = None if config.api_keys_uri is None else KeyRing.load(config.api_keys_uri)
        caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
        self._decoder = ImageDecoder(caps, observe=self.metrics.decoded)
        self._metrics_text = metrics_text or self._own_metrics_text
        figures = Figures(self._metrics_text, self.metrics.last_ms)
        self._answers = Answers(config, self.models, self._decoder, figures)
        self._working = 0
        self._body_bytes = 0
        self._openapi: bytes | None = None
        if config.access_log:
            open_access_log()
        self._count_models()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            answer = await self.answer(scope, receive)
            headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in answer.headers.items()]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})

    async def answer(self, scope: Scope, receive: Receive) -> Answer:
        """The answer to an ASGI request, whatever it is; counted and logged."""
        start = time.perf_counter()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # as it was sent: what is percent-encoded is part of a name, never of the path's grammar
        raw_path = scope.get("raw_path") or quote(scope["path"], safe="/:").encode()
        call = Call(scope["method"], raw_path.partition(b"?")[0].decode("latin-1"), headers)
        name = request_id(headers.get("x-request-id"))
        self.metrics.started()
        status = CLIENT_GONE  # where cancelled: the client is gone, and nobody reads an answer
        try:
            answer = await self._answer(call, receive)
            status = answer.status
            return _finished(answer, call, name)
        finally:
            seconds = time.perf_counter() - start
            self.metrics.finished(call.action, status, seconds, call.model, call.version)
            if self.config.access_log:
                log_access(_entry(call, scope, name, status, seconds))

    def check(self) -> None:
        """Returns when every model in memory still answers.

        Raises:
            RuntimeError: one does not.
        """
        for model in self.models.loaded:
            model.check()

    async def follow(self) -> None:
        """Afterwards aliases and API keys are those of the store; call it every alias_poll_s."""
        await self.models.follow()
        if self._keys is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._keys.refresh)
        self._count_models()

    def snapshot(self) -> Snapshot:
        """What this endpoint counted until now; picklable."""
        self.metrics.waiting(self.models.waiting)
        return self.metrics.snapshot()

    def close(self) -> None:
        """The decoders have ended."""
        self._decoder.close()

    async def _own_metrics_text(self) -> bytes:
        return render({"": self.snapshot()})

    def _count_models(self) -> None:
        self.metrics.loaded((model.artifact.name, model.artifact.version) for model in self.models.loaded)
        self.metrics.failed(self.models.failed())

    async def _answer(self, call: Call, receive: Receive) -> Answer:
        try:
            async with asyncio.timeout(self._deadline_s(call)):
                return await self._routed(call, receive)
        except protocol.RequestError as error:
            return self._refusal(error)
        except TimeoutError:
            late = protocol.DeadlineError("Expected an answer in time. Received: none yet. Next: ask for less at once.")
            return self._refusal(late)
        except CnnRayError as error:
            logger.error("%s %s failed: %s", call.method, call.path[:200], error)
            again = {"Retry-After": str(RETRY_AFTER_S)} if error.retryable else None
            message = "The model cannot be used now. Next: see the log of the server."
            return _error(503 if error.retryable else 500, message, again)
        except Exception:
            logger.exception("%s %s failed", call.method, call.path[:200])
            return _error(500, "Internal error. Next: see the log of the server.")

    def _refusal(self, error: protocol.RequestError) -> Answer:
        headers: dict[str, str] = {}
        if isinstance(error, protocol.OverloadedError):
            self.metrics.rejected("overload")
            headers["Retry-After"] = str(RETRY_AFTER_S)
        elif isinstance(error, protocol.UnauthorizedError):
            self.metrics.rejected("unauthorized")
            headers["WWW-Authenticate"] = "Bearer"
        elif isinstance(error, EncodingError):
            headers["Accept-Encoding"] = ACCEPTED
        elif isinstance(error, protocol.MethodError):
            headers["Allow"] = error.allow
        return _error(error.http_status, str(error), headers)

    def _deadline_s(self, call: Call) -> float:
        text = call.headers.get(TIMEOUT_HEADER)
        most = self.config.request_timeout_s
        if text is None:
            return most
        try:
            asked = float(text)
        except ValueError:
            return most
        # a tenth less than asked: Ray's own deadline runs too, and its answer is not ours
        return min(most, 0.9 * asked) if 0 < asked < math.inf else most

    def _refuse_strangers(self, call: Call) -> None:
        """Refuses web pages that a browser on this machine has open, where nothing else keeps them out: an endpoint
        without keys is for this machine alone."""
        if self._keys is not None or self.config.allow_anonymous:
            return
        if not is_local_request(call.headers):
            raise ForbiddenError(
                "Expected a request of this machine: there are no API keys. Received: another host or origin. "
                "Next: start with API keys, or with allow_anonymous."
            )

    async def _routed(self, call: Call, receive: Receive) -> Answer:
        self._refuse_strangers(call)
        known = self._for_people(call)
        if known is not None:
            return known
        if call.path == "/metrics":
            call.action = "metrics"
            _only_get(call)
            self._authorize(call, is_open=self.config.open_metrics)
            return Answer(200, await self._metrics_text(), METRICS_TYPE)
        if call.path == "/openapi.json":
            call.action = "openapi"
            _only_get(call)
            self._authorize(call)
            return Answer(200, self._openapi_body())
        if call.path == "/v2" or call.path.startswith("/v2/"):
            route = open_inference.parse_route(call.method, call.path)
            health = route.action in ("live", "ready")
            call.action = "health" if health else route.action
            self._authorize(call, is_open=health)
            return await self._worked(call, receive, lambda: self._answers.open_inference(call, route))
        self._authorize(call)
        asked = protocol.parse_route(call.method, call.path)
        call.action = asked.action
        return await self._worked(call, receive, lambda: self._answers.tensorflow(call, asked))

    def _for_people(self, call: Call) -> Answer | None:
        if not self.config.page:
            return None
        file = page_file(call.path, names=self.models.names, needs_key=self._keys is not None)
        if file is None:
            return None
        call.action = "page"
        _only_get(call)
        return Answer(200, file.body, file.content_type, dict(file.headers))

    def _authorize(self, call: Call, *, is_open: bool = False) -> None:
        if self._keys is None:
            return
        call.key = self._keys.name_of(call.headers.get("authorization"))
        if call.key is None and not is_open:
            raise protocol.UnauthorizedError(
                "Expected a valid API key. Next: send the header Authorization: Bearer KEY."
            )

    def _openapi_body(self) -> bytes:
        if self._openapi is None:
            from cnn_ray.openapi import build_openapi

            document = build_openapi(self.models.names, self.config, auth=self._keys is not None)
            self._openapi = json.dumps(document).encode()
        return self._openapi

    async def _worked(self, call: Call, receive: Receive, answer: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, made while this request counts against the replica's limits."""
        if call.method != "POST":
            return await answer()
        if self._working >= self.config.max_ongoing_requests:
            raise protocol.OverloadedError(
                f"{self._working} requests are being answered, at most {self.config.max_ongoing_requests} can be."
            )
        self._working += 1
        try:
            await self._read_body(call, receive)
            return await answer()
        finally:
            self._working -= 1
            self._body_bytes -= len(call.body)
            self.metrics.waiting(self.models.waiting)

    async def _read_body(self, call: Call, receive: Receive) -> None:
        """Afterwards call.body is the whole body, counted in the bytes of all bodies in flight."""
        most = self.config.max_body_bytes
        encoding = encoding_of(call.headers.get("content-encoding"))
        declared = protocol.declared_size(call.headers.get("content-length"))
        protocol.check_body_size(declared, most)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise protocol.RequestError("The body ended early.")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    protocol.check_body_size(size, most)
                    if self._body_bytes + len(chunk) > BODIES_IN_MEMORY * most:
                        raise protocol.OverloadedError("Too many bytes are being received.")
                    self._body_bytes += len(chunk)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise protocol.BodyTimeoutError(
                f"Expected the body within {self.config.body_timeout_s:g} s. Received: {size} bytes."
            ) from None
        finally:
            call.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if encoding is not None:
            plain = await asyncio.to_thread(inflate, call.body, encoding, most)
            self._body_bytes += len(plain) - len(call.body)
            call.body = plain


def _only_get(call: Call) -> None:
    if call.method not in ("GET", "HEAD"):
        raise protocol.MethodError(f"Expected GET or HEAD for {call.path[:100]}. Received: {call.method[:100]}.")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    closing = {"Connection": "close"} if status in (408, 413) else {}  # the rest of the body is not waited for
    return Answer(status, protocol.build_error(message), headers={**(headers or {}), **closing})


def _finished(answer: Answer, call: Call, name: str) -> Answer:
    headers = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "X-Request-ID": name,
        "X-Content-Type-Options": "nosniff",
        SERVED_BY: "cnn_ray",
        **answer.headers,
    }
    return Answer(answer.status, b"" if call.method == "HEAD" else answer.body, answer.content_type, headers)


def _entry(call: Call, scope: Scope, name: str, status: int, seconds: float) -> AccessEntry:
    client = scope.get("client")
    return AccessEntry(
        request_id=name,
        method=call.method,
        path=call.path,
        status=status,
        action=call.action,
        model=call.model,
        version=call.version,
        key=call.key,
        client=None if client is None else str(client[0]),
        body_bytes=len(call.body),
        instances=call.instances,
        total_ms=seconds * 1e3,
        decode_ms=call.decode_s * 1e3,
        predict_ms=call.predict_s * 1e3,
    )


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        kind = str(message["type"])
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
