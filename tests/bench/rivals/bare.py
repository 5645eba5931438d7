"""The bare loop of `floor` and `opencv_floor`: decode threads that run ahead, and a predictor in the main thread.

Imports nothing of ours: both environments run it. Besides marks (seconds since the epoch, images scored) it gives the
CPU time of an image exactly, without imports, model loading and what was decoded before the first result: that of
decoding from the threads' own clocks, and that of predicting from the process's clock between the first and the last
result, less what decoding took of it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]


class _Decoder:
    """`read` with its thread's CPU time added up."""

    def __init__(self, read: Callable[[Path], np.ndarray]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self.cpu_s = 0.0
        self.images = 0

    def __call__(self, path: Path) -> np.ndarray:
        start = time.thread_time()
        pixels = self._read(path)
        taken = time.thread_time() - start
        with self._lock:
            self.cpu_s += taken
            self.images += 1
        return pixels


def run(
    paths: list[Path],
    read: Callable[[Path], np.ndarray],
    load: Callable[[], Predict],
    *,
    threads: int,
    ahead: int,
    batch_size: int,
) -> dict[str, Any]:
    """{"marks": [[time, images], ...], "decode_ms": CPU ms per image, "predict_ms": the same}.

    `read` gives uint8 [H, W, 3]; up to `ahead` images wait decoded; the model loads while the first are decoded.
    """
    decode = _Decoder(read)
    remaining = iter(paths)
    marks: list[list[float]] = []
    clocks: list[tuple[float, float]] = []
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[np.ndarray]] = deque()

        def read_ahead() -> None:
            waiting.extend(pool.submit(decode, p) for p in itertools.islice(remaining, ahead - len(waiting)))

        read_ahead()
        predict = load()
        rows = 0
        while waiting:
            batch = np.stack([waiting.popleft().result() for _ in range(min(batch_size, len(waiting)))])
            read_ahead()
            rows += len(predict(batch))
            marks.append([time.time(), rows])
            clocks.append((time.process_time(), decode.cpu_s))
    whole = clocks[-1][0] - clocks[0][0]
    decoding = clocks[-1][1] - clocks[0][1]
    return {
        "marks": marks,
        "decode_ms": 1000 * decode.cpu_s / decode.images,
        "predict_ms": 1000 * (whole - decoding) / (marks[-1][1] - marks[0][1]),
    }
