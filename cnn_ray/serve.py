"""The Ray Serve application: replicas of `cnn_ray.endpoint` behind Ray's ingress, added and taken away with the load.

A second deployment, the board, adds up what the replicas count, because a scrape of /metrics reaches one of many.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from cnn_ray import gateway, haproxy
from cnn_ray.artifact import load_artifact
from cnn_ray.auth import KeyRing, require_keys
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import RETRY_AFTER_S, Endpoint
from cnn_ray.endpoint_metrics import MetricsBoard
from cnn_ray.errors import ConfigError, UnavailableError
from cnn_ray.log_stream import SOCKET_VARIABLE, open_error_log, shown_log
from cnn_ray.placement import Share, require_resources, watched_placement
from cnn_ray.ray_session import connected, logs_folder
from cnn_ray.storage_options import use_storage_options

logger = logging.getLogger(__name__)

APP_NAME = "cnn_ray"
READY_DEADLINE_S = 60.0
CLOSING_S = 0.5
"""After SIGTERM requests are taken for so long: what clients had sent before is read by then, and is in flight."""
REPORT_S = 2.0
"""How often a replica tells the board what it counted."""
RAY_VARIABLES = {
    # Ray runs its workers at niceness 15: right for a night's job, but whoever asks here waits for the answer.
    "RAY_worker_niceness": "0",
    # One event loop per replica instead of two, and no handing of each message from one to the other.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # The proxy talks gRPC to the replicas, which is lighter than calls of Ray's actors.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""Variables of the environment that a Ray which is started for serving gets."""


@serve.deployment(name="Board", num_replicas=1, ray_actor_options={"num_cpus": 0})
class Board:
    """The counts of all replicas."""

    def __init__(self) -> None:
        """Nobody has reported yet."""
        self._board = MetricsBoard()

    async def report(self, replica: str, snapshot: object) -> None:
        """The replica's counts are these now."""
        self._board.report(replica, snapshot)  # pyright: ignore[reportArgumentType]

    async def render(self) -> bytes:
        """All replicas' sums in Prometheus' text format."""
        return self._board.render()


@serve.deployment(name="Endpoint")
class Replica:
    """One replica of the endpoint."""

    def __init__(self, config: ServeConfig, board: DeploymentHandle) -> None:
        """A replica whose models are warm: Serve sends requests only to such.

        Raises:
            ArtifactError: a model is missing or damaged, or this node lacks the engine or precision.
            ConfigError: others reach the port, and there are no API keys.
        """
        open_error_log()
        use_storage_options(config)
        require_keys(_listening_host(config), config)
        self._board = board
        self._name = serve.get_replica_context().replica_id.unique_id
        self._endpoint = Endpoint(config, metrics_text=self._metrics_text)
        self._background = [
            asyncio.create_task(_every(config.alias_poll_s, self._endpoint.follow)),
            asyncio.create_task(_every(REPORT_S, self._report)),
        ]

    async def __call__(self, request: Request) -> Response:
        """The HTTP answer."""
        answer = await self._endpoint.answer(request.scope, request.receive)
        headers = {name: value for name, value in answer.headers.items() if name != "X-Request-ID"}  # Ray adds it too
        return Response(answer.body, answer.status, headers)

    async def check_health(self) -> None:
        """Returns when the models still answer; Serve replaces a replica in which this raises or hangs.

        Raises:
            RuntimeError: the scores are not numbers.
        """
        await asyncio.get_running_loop().run_in_executor(None, self._endpoint.check)

    async def _report(self) -> None:
        await self._board.report.remote(self._name, self._endpoint.snapshot())

    async def _metrics_text(self) -> bytes:
        await self._report()
        return await self._board.render.remote()


async def _every(seconds: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()  # pyright: ignore[reportGeneralTypeIssues]
        except Exception:
            logger.exception("%s failed; the next try is in %.0f s", work, seconds)


def _listening_host(config: ServeConfig) -> str:
    """The host that Ray's ingress listens on: `serve deploy` has it from its own file, not from our configuration."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    host = None if client is None else client.http_config.host
    return config.host if host is None else host


def build_app(config: ServeConfig) -> Application:
    """The Serve application of the configured models. Replicas follow an alias when it moves.

    Raises:
        ArtifactError: no such model.
    """
    use_storage_options(config)
    for reference in (config.model, *config.also):
        load_artifact(config.models_uri, reference)
    # replicas have their own working directory
    local = {name: _absolute(getattr(config, name)) for name in ("models_uri", "api_keys_uri")}
    replica = Replica.options(
        # The replica itself says no first, in the protocol's own words; Ray's queue is a second wall behind it.
        max_ongoing_requests=2 * config.max_ongoing_requests,
        max_queued_requests=config.max_ongoing_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
        logging_config={"enable_access_log": False},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "initial_replicas": max(config.min_replicas, 1),  # a model that does not load fails the deployment
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        },
    )
    return replica.bind(config.model_copy(update=local), Board.bind())


def _absolute(uri: str | None) -> str | None:
    return uri if uri is None or "://" in uri else str(Path(uri).resolve())


def run_server(config: ServeConfig, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is in flight, refuse what comes new, and end what was started.

    Uses the cluster of RAY_ADDRESS, or starts a Ray of its own on this machine. `on_ready` gets the base URL once a
    predict would be answered. Call it in the main thread, where signals arrive.

    Raises:
        ArtifactError: no such model; nothing was started.
        ConfigError: the port is taken, others reach it and there are no API keys, this machine lacks the CPUs or GPUs,
            or HAProxy is asked of a cluster that was started without; nothing is served.
        UnavailableError: the endpoint did not get ready.
    """
    use_storage_options(config)
    require_keys(config.host, config)
    if config.api_keys_uri is not None:
        KeyRing.load(config.api_keys_uri)
    _require_certificate(config)
    app = build_app(config)
    config = config.model_copy(update={"port": _free_port(config.host, config.port)})
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _ingress(config) as is_open, _running_app(app, config, is_open):
            is_open.set(True)
            _wait_until_answered(config)
            if on_ready is not None:
                on_ready(
                    f"{'http' if config.ssl_certfile is None else 'https'}://{_client_host(config.host)}:{config.port}"
                )
            threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_certificate(config: ServeConfig) -> None:
    """Return if the configured certificate and its key can be used: Ray's proxy would only fail to listen."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:
        raise ConfigError(
            "Expected a PEM certificate chain and its private key. "
            f"Received: {config.ssl_certfile} and {config.ssl_keyfile} ({error.strerror or error}). Next: correct them."
        ) from None


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


class _OpenSign:
    """Whether requests are to be answered: a file that the gateways of this machine look for."""

    def __init__(self, path: Path | None) -> None:
        """The sign at `path`, not set; None for a cluster, whose nodes share no file."""
        self._path = path

    def set(self, is_open: bool) -> None:
        """Let requests in, or have every new one refused with 503 from now on."""
        if self._path is None:
            return
        if is_open:
            self._path.touch()
        else:
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _ingress(config: ServeConfig) -> Iterator[_OpenSign]:
    """Inside, a Ray that is started takes the ingress that the configuration asks for: variables of its environment."""
    if os.environ.get("RAY_ADDRESS"):
        if config.haproxy:
            raise ConfigError(
                "Expected no haproxy with RAY_ADDRESS: the cluster's nodes choose it when they start. "
                "Received: haproxy. Next: leave it out, see README for the cluster's variables."
            )
        yield _OpenSign(None)
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cnn_ray-serve-")))
        log_socket = stack.enter_context(shown_log(folder))
        sign = folder / "open"
        proxy = haproxy.environment(stack.enter_context(haproxy.private_folder())) if config.haproxy else {}
        # What is too much anyway is refused in front, where that costs least: by the one proxy, or, behind HAProxy, by
        # the server in each replica.
        most = config.max_ongoing_requests * (1 if config.haproxy else config.max_replicas)
        variables = {
            gateway.MAX_REQUESTS_VARIABLE: str(most),
            gateway.IMPORT_PATH_VARIABLE: gateway.IMPORT_PATH,
            gateway.MAX_BODY_VARIABLE: str(config.max_body_bytes),
            gateway.OPEN_VARIABLE: str(sign),
            gateway.ACCESS_LOG_VARIABLE: "1" if config.access_log else "0",
            **({SOCKET_VARIABLE: log_socket} if log_socket is not None else {}),
            **RAY_VARIABLES,
            **proxy,
        }
        stack.enter_context(_environment(variables))
        yield _OpenSign(sign)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process has these variables of the environment; the processes that it starts keep them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _running_app(app: Application, config: ServeConfig, is_open: _OpenSign) -> Iterator[None]:
    share = Share(config.num_cpus, config.num_gpus, max(config.min_replicas, 1))
    with connected(logging_level=logging.WARNING) as local:
        if local:
            require_resources(share, "replica")
        with watched_placement(share, "replica"):
            _deploy(app, config)
        try:
            yield
        finally:
            time.sleep(CLOSING_S)
            is_open.set(False)
            serve.delete(APP_NAME)  # waits for the requests in flight


def _deploy(app: Application, config: ServeConfig) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    tls = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile} if config.ssl_certfile else {}
    try:
        # our own log has a line per request, and Ray's would be a second one in the proxy and a third in the replica
        quiet = {"enable_access_log": False}
        serve.start(http_options={"host": config.host, "port": config.port, **tls}, logging_config=quiet)
        serve.run(app, name=APP_NAME, route_prefix="/")
    except (RuntimeError, RayError) as error:  # what Serve makes of an error in a replica's __init__
        raise UnavailableError(
            f"Expected the endpoint to start. Received: {_first_line(error)} "
            f"Next: see the replica's log in {logs_folder()}/serve."
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


def _wait_until_answered(config: ServeConfig) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    host, path = _client_host(config.host).strip("[]"), "/v2/health/ready"
    while True:
        if config.ssl_certfile is None:
            connection = http.client.HTTPConnection(host, config.port, timeout=5)
        else:  # it is our own port on this machine, and its name is not in the certificate
            unchecked = ssl._create_unverified_context()  # noqa: S323
            connection = http.client.HTTPSConnection(host, config.port, timeout=5, context=unchecked)
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
                f"Expected an answer from {config.host}:{config.port}{path} within {READY_DEADLINE_S:.0f} s. "
                f"Received: none. Next: see the logs in {logs_folder()}/serve."
            )
        time.sleep(0.1)
