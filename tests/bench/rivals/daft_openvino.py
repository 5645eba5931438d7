"""Daft with the same OpenVINO IR in f32: glob -> download -> decode -> resize -> class UDF over batches.

What was tried is in ../README.md. One instance of the class, since two of them in one process crash inside OpenVINO or
hang; it computes as many images at a time as there are cores. The pixels reach numpy without a copy.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

os.environ |= {"DAFT_ANALYTICS_ENABLED": "0", "DO_NOT_TRACK": "1", "SCARF_NO_ANALYTICS": "true"}
os.environ.setdefault("RUST_MIN_STACK", str(32 * 1024**2))  # OpenVINO compiles on a thread of Daft's

import daft
import numpy as np
from daft import DataType, col
from daft.functions import decode_image, image_to_tensor, resize

GIVEN = json.loads(sys.argv[1])
SIDE = GIVEN["size_px"]


@daft.cls(max_concurrency=1)
class Scorer:
    """The compiled model, loaded once."""

    def __init__(self, path: str) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino

        cores = len(os.sched_getaffinity(0))
        core = openvino.Core()
        graph = core.read_model(path)
        graph.reshape([1, *list(graph.inputs[0].partial_shape)[1:]])
        options = {"NUM_STREAMS": cores, "INFERENCE_NUM_THREADS": cores, "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = core.compile_model(graph, "CPU", {**options, "ENABLE_CPU_PINNING": False})
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(cores)

    @daft.method.batch(return_dtype=DataType.tensor(DataType.float32(), (2,)), batch_size=GIVEN["batch_size"])
    def scores(self, images: daft.Series) -> daft.Series:
        pixels = images.to_arrow().storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, SIDE, SIDE, 3)
        single = (pixels[k : k + 1] for k in range(len(pixels)))
        return daft.Series.from_numpy(np.concatenate(list(self._pool.map(self._infer, single))))

    def _infer(self, image: np.ndarray) -> np.ndarray:
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        return np.array(self._local.request.infer({0: image}, share_inputs=True)[0], np.float32)


def main() -> None:
    images = decode_image(col("path").download(), mode="RGB")
    pixels = image_to_tensor(resize(images, SIDE, SIDE))
    scored = daft.from_glob_path(GIVEN["images"] + "/*").select("path", Scorer(GIVEN["ir"]).scores(pixels).alias("s"))
    rows, marks = 0, []
    for part in scored.iter_partitions():
        rows += len(part)
        marks.append([time.time(), rows])
    sys.stdout.write(json.dumps({"marks": marks}) + "\n")


if __name__ == "__main__":
    main()
