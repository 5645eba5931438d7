"""An ASGI application on a real port, for tests with clients that want one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from cnn_ray.endpoint import Endpoint

START_DEADLINE_S = 30.0


@contextlib.contextmanager
def running(endpoint: Endpoint) -> Iterator[str]:
    """HOST:PORT of the endpoint under uvicorn, in a thread of this process; closed at the end."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(endpoint, log_level="error"))  # pyright: ignore[reportArgumentType]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not server.started and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            yield "{}:{}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            thread.join()
            endpoint.close()
