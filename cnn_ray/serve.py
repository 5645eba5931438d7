"""The Ray Serve application of one model: TensorFlow Serving's REST protocol in, scores of `cnn_ray.predictor` out.

One deployment. A request is parsed and its images are decoded in threads; the images of all requests in flight are
gathered by `serve.batch` into one call of the model, which runs in a thread of its own, so the event loop only waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response

from cnn_ray import protocol
from cnn_ray.artifact import load_artifact
from cnn_ray.config import ServeConfig
from cnn_ray.errors import ConfigError, UnavailableError
from cnn_ray.images import ImageCaps, decode
from cnn_ray.predictor import cpu_count, load_predictor
from cnn_ray.ray_session import connected
from cnn_ray.records import RowFailure

logger = logging.getLogger(__name__)

T = TypeVar("T")

APP_NAME = "cnn_ray"
READY_DEADLINE_S = 60.0


@serve.deployment(name="Endpoint")
class Endpoint:
    """Answers HTTP requests about one model version."""

    def __init__(self, config: ServeConfig) -> None:
        """A replica that has answered one warm-up batch, so that Serve sends requests only to a warm model.

        Raises:
            ArtifactError: the model is missing or damaged, or this node lacks the engine or precision.
        """
        self._config = config
        self._artifact = load_artifact(config.models_uri, config.model)
        self._predictor = load_predictor(
            self._artifact,
            engine=config.engine,
            precision=config.precision,
            num_threads=config.num_threads,
            use_gpu=config.num_gpus > 0,
            one_stream=True,
        )
        self._caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
        self._decoders = ThreadPoolExecutor(cpu_count() + 1, thread_name_prefix="decode")
        self._predictors = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._predict_rows.set_max_batch_size(config.max_batch_size)  # pyright: ignore[reportAttributeAccessIssue]
        self._predict_rows.set_batch_wait_timeout_s(config.batch_wait_timeout_s)  # pyright: ignore[reportAttributeAccessIssue]
        self._check_predictor()
        logger.info("%s on %s %s is ready", self._artifact.reference, self._predictor.engine, self._predictor.precision)

    async def __call__(self, request: Request) -> Response:
        """The HTTP answer; every error is {"error": ...}, and what went wrong inside is only logged."""
        try:
            status, body = 200, await self._answer(request)
        except protocol.RequestError as error:
            status, body = error.http_status, protocol.build_error(str(error))
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            status, body = 500, protocol.build_error("Internal error. Next: see the log of the server.")
        return Response(body, status, media_type="application/json")

    async def check_health(self) -> None:
        """Returns when the model still answers; Serve replaces a replica in which this raises or hangs.

        Raises:
            RuntimeError: the scores are not numbers.
        """
        await asyncio.get_running_loop().run_in_executor(self._predictors, self._check_predictor)

    async def _answer(self, request: Request) -> bytes:
        route = protocol.parse_route(request.method, request.url.path)
        protocol.check_model(route, self._artifact.name, self._artifact.version)
        if route.action == "status":
            return protocol.build_status(self._artifact.version)
        body = await _read_body(request, self._config.max_body_bytes)
        parsed = await self._in_decoder(
            lambda: protocol.parse_predict(
                body, size_px=self._artifact.size_px, max_instances=self._config.max_instances
            )
        )
        rows = list(parsed.inputs) if isinstance(parsed.inputs, np.ndarray) else await self._decode(parsed.inputs)
        scores = np.stack(await asyncio.gather(*(self._predict_rows(row) for row in rows)))
        return protocol.build_predictions(parsed, self._artifact.labels, scores)

    async def _decode(self, images: tuple[bytes, ...]) -> list[npt.NDArray[np.uint8]]:
        size_px, caps = self._artifact.size_px, self._caps
        decoded = await asyncio.gather(
            *(self._in_decoder(lambda data=data: decode(data, size_px, caps)) for data in images)
        )
        rows: list[npt.NDArray[np.uint8]] = []
        for index, image in enumerate(decoded):
            if isinstance(image, RowFailure):
                raise protocol.row_error(index, image)
            rows.append(image.pixels)
        return rows

    @serve.batch
    async def _predict_rows(self, rows: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.float32]]:
        """Scores float32 [C] of each row; called with one row uint8 [H, W, 3], run with those of all requests."""
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._predictors, lambda: self._predictor.predict(np.stack(rows))))

    async def _in_decoder(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    def _check_predictor(self) -> None:
        scores = self._predictor.predict(np.zeros((1, *self._artifact.size_px, 3), np.uint8))
        if not np.isfinite(scores).all():
            raise RuntimeError(f"{self._artifact.reference} answers a black image with {scores.tolist()}")


async def _read_body(request: Request, max_body_bytes: int) -> bytes:
    protocol.check_body_size(protocol.declared_size(request.headers.get("content-length")), max_body_bytes)
    body = bytearray()
    async for chunk in request.stream():
        protocol.check_body_size(len(body) + len(chunk), max_body_bytes)
        body += chunk
    return bytes(body)


def build_app(config: ServeConfig) -> Application:
    """The Serve application of the configured model. An alias is resolved here, once, so all replicas answer alike.

    Raises:
        ArtifactError: no such model.
    """
    artifact = load_artifact(config.models_uri, config.model)
    local = "://" not in config.models_uri
    models_uri = str(Path(config.models_uri).resolve()) if local else config.models_uri  # replicas have their own cwd
    pinned = config.model_copy(update={"model": artifact.reference, "models_uri": models_uri})
    return Endpoint.options(
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "initial_replicas": max(config.min_replicas, 1),  # a model that does not load fails the deployment
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
    ).bind(pinned)


def run_server(config: ServeConfig, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGINT or SIGTERM, then has shut down what it started.

    Uses the cluster of RAY_ADDRESS, or starts a Ray of its own on this machine. `on_ready` gets the base URL once a
    predict would be answered. Call it in the main thread, where signals arrive.

    Raises:
        ArtifactError: no such model; nothing was started.
        ConfigError: the port is taken; nothing was started.
        UnavailableError: the endpoint did not get ready.
    """
    app = build_app(config)
    port = _free_port(config.host, config.port)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _running_app(app, config.host, port):
            _wait_until_answered(config.host, port, f"/v1/models/{config.model.partition('@')[0]}")
            if on_ready is not None:
                on_ready(f"http://{_client_host(config.host)}:{port}")
            threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


@contextlib.contextmanager
def _running_app(app: Application, host: str, port: int) -> Iterator[None]:
    with connected(logging_level=logging.WARNING):
        _deploy(app, host, port)
        try:
            yield
        finally:
            serve.delete(APP_NAME)  # waits for the requests in flight


def _deploy(app: Application, host: str, port: int) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:  # what Serve makes of an error in a replica's __init__; its log has the cause
        raise UnavailableError(
            f"Expected the endpoint to start. Received: {_first_line(error)} "
            "Next: see the replica's log in /tmp/ray/session_latest/logs/serve."
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Expected a free address to listen on. Received: {host}:{port} ({error.strerror}). "
                f"Next: give another port, or 0 for any free one."
            ) from None
        return probe.getsockname()[1]


def _client_host(host: str) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{shown}]" if ":" in shown else shown


def _wait_until_answered(host: str, port: int, path: str) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while True:
        connection = http.client.HTTPConnection(_client_host(host).strip("[]"), port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException) as error:
            logger.debug("not answering yet: %s", error)
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"Expected an answer from http://{host}:{port}{path} within {READY_DEADLINE_S:.0f} s. "
                "Received: none. Next: see the logs in /tmp/ray/session_latest/logs/serve."
            )
        time.sleep(0.1)
