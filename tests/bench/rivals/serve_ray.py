"""Plain Ray Serve as documented: one deployment, decode in the handler, `@serve.batch` around predict."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
if sys.argv[2:] == ["haproxy"]:
    os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1"}

import numpy as np
import ray
import serve_engine
from ray import serve
from starlette.requests import Request

MODEL = serve_engine.given()


@serve.deployment(num_replicas=1, max_ongoing_requests=512)
class Model:
    """One replica."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.engine = serve_engine.Engine(model["ir"], model["size_px"], model["labels"], serve_engine.CORES)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return self.engine.batch(images)

    async def __call__(self, request: Request) -> dict[str, Any]:
        return self.engine.answer(await self.batch(self.engine.decode(await request.body())))


def main() -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": MODEL["port"]})
    serve.run(Model.bind(MODEL), route_prefix="/predict", logging_config={"enable_access_log": False})
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
