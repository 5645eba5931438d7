"""BentoML: `defaults` with one thread a worker, or `tuned` with as many threads as cores; no batching, which lost.

Run by `bentoml serve`, which imports this file: the mode comes in an environment variable.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import bentoml
import serve_engine
from bentoml.validators import ContentType

TUNED = os.environ.get("BENCH_MODE") == "tuned"
OPTIONS: dict[str, Any] = {"threads": serve_engine.CORES} if TUNED else {}


@bentoml.service(name="bench", logging={"access": {"enabled": False}}, **OPTIONS)
class Service:
    """One image a call."""

    def __init__(self) -> None:
        self.engine = serve_engine.load(streams=serve_engine.CORES if TUNED else 1)

    @bentoml.api
    def predict(self, image: Annotated[Path, ContentType("image/*")], /) -> dict[str, Any]:
        return self.engine.answer(self.engine.scores(self.engine.decode(image.read_bytes())))
