"""Bare uvicorn + Starlette without batching: `inline` in the event loop, or in `threads`, one image per core."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import serve_engine
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def main() -> None:
    threads = sys.argv[2] == "threads"
    engine = serve_engine.load(streams=serve_engine.CORES if threads else 1)  # inline: all cores for the one image
    pool = ThreadPoolExecutor(serve_engine.CORES)

    def work(body: bytes) -> dict[str, Any]:
        return engine.answer(engine.scores(engine.decode(body)))

    async def predict(request: Request) -> JSONResponse:
        body = await request.body()
        if threads:
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, work, body))
        return JSONResponse(work(body))

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=serve_engine.given()["port"], log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
