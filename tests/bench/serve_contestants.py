"""The servers of the serve bench: how each is started, and when it answers. Also our parts under bare uvicorn.

All get the same published IR in f32 and all cores of the machine, one worker or replica each, and answer a raw image
body with label, score and scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from material import LABELS, REFERENCE, Material
from processes import running
from rivals import environment

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
UNDER_UVICORN = ("uvicorn_ours", "ours_alone")
OURS_PATH = "/v1/models/bench:predict"
MOST_ONGOING = 512
"""So that no contestant refuses a request at 128 connections: refusing is measured in tests/chaos/serve_faults.py."""


@dataclass(frozen=True)
class Contestant:
    """A server: what it is, and which of the rivals' scripts (None: ours) starts it in which mode."""

    name: str
    what: str
    script: str | None = None
    mode: str = ""

    @property
    def path(self) -> str:
        """Where it takes images."""
        return OURS_PATH if self.name.startswith("ours") else "/predict"


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "uvicorn_threads", "uvicorn + Starlette, decode and predict in two threads", "serve_uvicorn", "threads"
        ),
        Contestant(
            "uvicorn_inline", "the same in the event loop, both cores for the one image", "serve_uvicorn", "inline"
        ),
        Contestant("uvicorn_ours", "uvicorn with our decode and predictor in two threads"),
        Contestant("ours_alone", "cnn_ray.endpoint under bare uvicorn, without Ray"),
        Contestant("litserve", "LitServe with its defaults", "serve_litserve", "defaults"),
        Contestant("litserve_tuned", "LitServe: two workers of one thread, fast_queue", "serve_litserve", "tuned"),
        Contestant("litserve_batched", "LitServe: batches of 16, fast_queue", "serve_litserve", "batched"),
        Contestant("bentoml", "BentoML with its defaults", "serve_bentoml", "defaults"),
        Contestant("bentoml_tuned", "BentoML: two threads a worker", "serve_bentoml", "tuned"),
        Contestant("ray_serve", "Ray Serve as documented: serve.batch", "serve_ray", "default"),
        Contestant("ray_serve_haproxy", "the same behind Ray's HAProxy", "serve_ray", "haproxy"),
        Contestant("ours", "cnn-ray serve"),
        Contestant("ours_haproxy", "cnn-ray serve --haproxy", mode="haproxy"),
    )
}


@contextlib.contextmanager
def serving(contestant: Contestant, material: Material, log: Path) -> Iterator[str]:
    """URL that takes images, from the first answer with 200 on until the block ends.

    Raises:
        RuntimeError: it did not answer; the text holds the end of its log.
    """
    port = free_port()
    given = {"ir": str(material.servable / "openvino" / "model.xml"), "size_px": material.size_px}
    text = json.dumps({**given, "labels": list(LABELS), "port": port})
    command, extra = _command(contestant, material, text, port)
    with running(command, log, {**extra, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}) as process:
        image = min(Path(material.images).iterdir())
        wait_until_answered(process, port, contestant.path, image, log)
        yield f"http://127.0.0.1:{port}{contestant.path}"


def _command(contestant: Contestant, material: Material, text: str, port: int) -> tuple[list[str], dict[str, str]]:
    if contestant.name in UNDER_UVICORN:
        command = [sys.executable, str(Path(__file__).resolve()), contestant.name, str(port), material.to_json()]
        return command, {"PYTHONPATH": str(ROOT)}
    if contestant.script is None:
        return serve_command(material, port, haproxy=contestant.mode == "haproxy"), {"PYTHONPATH": str(ROOT)}
    python = environment.interpreter(environment.SERVE_FOLDER, environment.SERVE_REQUIREMENTS)
    extra = {"BENCH_GIVEN": text, "BENCH_MODE": contestant.mode, "BENTOML_DO_NOT_TRACK": "True"}
    extra |= {"RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()), "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port())}
    folder = environment.HERE
    if contestant.script == "serve_bentoml":
        command = [str(Path(python).with_name("bentoml")), "serve", "serve_bentoml:Service", "--host", "127.0.0.1"]
        return [*command, "--port", str(port), "--working-dir", str(folder)], {**extra, "PYTHONPATH": str(folder)}
    return [python, str(folder / f"{contestant.script}.py"), text, contestant.mode], extra


def serve_command(material: Material, port: int, *more: str, haproxy: bool = False) -> list[str]:
    """`cnn-ray serve` as typed, with one replica."""
    command = [sys.executable, "-m", "cnn_ray.cli", "serve", "--model", REFERENCE, "--models-uri", material.models]
    command += ["--engine", "openvino", "--precision", "f32", "--port", str(port), "--max-replicas", "1"]
    command += ["--max-ongoing-requests", str(MOST_ONGOING), *more]
    return [*command, "--haproxy"] if haproxy else command


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_answered(process: subprocess.Popen[bytes], port: int, path: str, image: Path, log: Path) -> None:
    """Returns when the image got an answer with 200.

    Raises:
        RuntimeError: the process ended, or START_S passed; the text holds the end of its log.
    """
    deadline = time.monotonic() + START_S
    kind = "image/png" if image.suffix == ".png" else "image/jpeg"
    answer = "no connection"
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("POST", path, image.read_bytes(), {"Content-Type": kind})
            response = connection.getresponse()
            answer = f"{response.status} {response.read()[:200]!r}"
            if response.status == 200:
                return
        except (OSError, http.client.HTTPException) as error:
            answer = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        time.sleep(0.2)
    end = log.read_bytes()[-1500:].decode(errors="replace")
    raise RuntimeError(f"Expected an answer on port {port}{path}. Received: {answer}. Its log ends:\n{end}")


def under_uvicorn(name: str, port: int, material: Material) -> None:
    """Serves one of UNDER_UVICORN until SIGTERM."""
    import uvicorn

    app = our_endpoint(material) if name == "ours_alone" else our_parts(material)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def our_endpoint(material: Material) -> Any:
    """The ASGI application that `cnn-ray serve` puts behind Ray."""
    from cnn_ray.config import ServeConfig
    from cnn_ray.endpoint import Endpoint

    return Endpoint(
        ServeConfig(
            model=REFERENCE,
            models_uri=material.models,
            engine="openvino",
            precision="f32",
            max_ongoing_requests=MOST_ONGOING,
        )
    )


def our_parts(material: Material) -> Any:
    """Our decode and predictor in what the rival `uvicorn` is: no Ray, batching, limits, keys, metrics or log."""
    import numpy as np
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from cnn_ray.artifact import load_artifact
    from cnn_ray.images import DecodedImage, ImageCaps, decode
    from cnn_ray.predictor import cpu_count, load_predictor

    artifact = load_artifact(material.models, REFERENCE)
    predictor = load_predictor(artifact, engine="openvino", precision="f32", serving=True)
    pool, caps = ThreadPoolExecutor(cpu_count()), ImageCaps()

    def work(body: bytes) -> dict[str, Any]:
        image = decode(body, artifact.size_px, caps)
        if not isinstance(image, DecodedImage):
            raise ValueError(image.code)
        scores = predictor.predict(image.pixels[None])[0]
        best = int(np.argmax(scores))
        named = {label: float(score) for label, score in zip(artifact.labels, scores, strict=True)}
        return {"label": artifact.labels[best], "score": float(scores[best]), "scores": named}

    async def predict(request: Request) -> JSONResponse:
        body = await request.body()
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, work, body))

    return Starlette(routes=[Route("/predict", predict, methods=["POST"])])


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    under_uvicorn(sys.argv[1], int(sys.argv[2]), Material.from_json(sys.argv[3]))
