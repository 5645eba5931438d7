"""cv2.imdecode + cv2.resize INTER_AREA and OpenVINO in f32, in the bare loop of `floor`.

How OpenVINO is driven is a copy of our predictor as it stood before this comparison was set up (one image a request, as
many streams as cores, freed memory kept), so that what we change later does not change the rival.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bare
import cv2
import numpy as np


def load(path: str, cores: int) -> bare.Predict:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # nobody is called at home
    import openvino

    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 * 1024**2)
    libc.mallopt(-1, 512 * 1024**2)
    options = {
        "NUM_STREAMS": cores,
        "INFERENCE_NUM_THREADS": cores,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    graph = core.read_model(path)
    graph.reshape([1, *list(graph.inputs[0].partial_shape)[1:]])
    compiled = core.compile_model(graph, "CPU", options)
    local = threading.local()
    pool = ThreadPoolExecutor(cores)

    def infer(image: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return np.array(local.request.infer({0: image}, share_inputs=True)[0], np.float32)

    return lambda pixels: np.concatenate(list(pool.map(infer, (pixels[k : k + 1] for k in range(len(pixels))))))


def main() -> None:
    given = json.loads(sys.argv[1])
    side = (given["size_px"], given["size_px"])
    cores = len(os.sched_getaffinity(0))
    cv2.setNumThreads(1)  # the threads are ours

    def read(path: Path) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise ValueError(f"{path}: not an image to OpenCV")
        return cv2.resize(image, side, interpolation=cv2.INTER_AREA)

    found = bare.run(
        sorted(Path(given["images"]).iterdir()),
        read,
        lambda: load(given["ir"], cores),
        threads=cores,
        ahead=given["ahead"],
        batch_size=given["batch_size"],
    )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
