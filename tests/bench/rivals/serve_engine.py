"""What all rivals of the endpoint share: cv2 decode and resize, and OpenVINO in f32 as `opencv_floor` drives it.

Each rival's process gets one JSON on its command line: ir (path), size_px, labels, port.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

CORES = len(os.sched_getaffinity(0))
cv2.setNumThreads(1)  # the servers have threads of their own


def given() -> dict[str, Any]:
    """The JSON that the bench passes; in an environment variable where the command line belongs to a framework."""
    text = os.environ.get("BENCH_GIVEN") or sys.argv[1]
    return json.loads(text)


class Engine:
    """The published IR, computed image by image; safe to call from several threads at once.

    `streams` images are computed at a time, the threads divided among them.
    """

    def __init__(self, ir: str, size_px: int, labels: list[str], streams: int, threads: int = CORES) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # nobody is called at home
        import openvino

        options = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        core = openvino.Core()
        graph = core.read_model(ir)
        graph.reshape([1, *list(graph.inputs[0].partial_shape)[1:]])
        self._compiled = core.compile_model(graph, "CPU", options)
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(streams)
        self._side = (size_px, size_px)
        self._labels = labels

    def decode(self, raw: bytes) -> np.ndarray:
        """uint8 RGB [H, W, 3] of the model's size."""
        image = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise ValueError("not an image")
        return cv2.resize(image, self._side, interpolation=cv2.INTER_AREA)

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [C] of one decoded image, computed in the calling thread."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        return np.array(self._local.request.infer({0: pixels[None]}, share_inputs=True)[0][0], np.float32)

    def batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [C] of each decoded image."""
        return list(self._pool.map(self.scores, images))

    def decode_batch(self, bodies: list[bytes]) -> list[np.ndarray]:
        """Decoded images, as many at a time as there are cores."""
        return list(self._pool.map(self.decode, bodies))

    def answer(self, scores: np.ndarray) -> dict[str, Any]:
        """The document that every contestant answers."""
        best = int(scores.argmax())
        named = {label: float(score) for label, score in zip(self._labels, scores, strict=True)}
        return {"label": self._labels[best], "score": float(scores[best]), "scores": named}


def load(streams: int = CORES, threads: int = CORES) -> Engine:
    """The engine of the model that was given."""
    model = given()
    return Engine(model["ir"], model["size_px"], model["labels"], streams, threads)
