# pyright: strict
"""Rows of many requests -> calls of the model that are as large as the load makes them.

A call takes what waits when the model gets free. So a lone request never waits for company, and under load the calls
grow by themselves (natural batching; Crankshaw et al., "Clipper", NSDI 2017, adapts the size for the same reason). Rows
whose request was cancelled are left out.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
Scores: TypeAlias = NDArray[np.float32]


@dataclass(slots=True)
class _Row:
    pixels: Pixels
    scores: asyncio.Future[Scores]
    since: float


class Batcher:
    """Calls of one model; for use in one event loop."""

    def __init__(
        self,
        predict: Callable[[Pixels], Scores],
        *,
        max_batch_size: int,
        concurrency: int,
        wait_s: float,
        observe: Callable[[int, float], None],
    ) -> None:
        """
        Args:
            predict: uint8 [N, H, W, 3] -> float32 [N, C]; up to `concurrency` calls run at the same time in threads.
            wait_s: how long a call that is not full waits for more rows.
            observe: is told of each call: its rows and seconds.
        """
        self._predict = predict
        self._max_batch_size = max_batch_size
        self._free = concurrency
        self._wait_s = wait_s
        self._observe = observe
        self._waiting: deque[_Row] = deque()
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="predict")
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Rows that wait for a call."""
        return len(self._waiting)

    async def scores(self, rows: Iterable[Pixels]) -> Scores:
        """Scores float32 [N, C] of the rows, uint8 [H, W, 3] each; at least one.

        Cancelling it takes its rows out of the queue. Whatever `predict` raises is raised here.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        mine = [_Row(pixels, loop.create_future(), now) for pixels in rows]
        self._waiting.extend(mine)
        self._start_calls()
        try:
            return np.stack([await row.scores for row in mine])
        except asyncio.CancelledError:
            gone = {id(row) for row in mine}
            self._waiting = deque(row for row in self._waiting if id(row) not in gone)
            raise
        finally:
            for row in mine:  # a failed row leaves the others without anybody who waits
                if not row.scores.cancel() and not row.scores.cancelled():
                    row.scores.exception()

    def _start_calls(self) -> None:
        while self._free and self._waiting:
            early_s = self._waiting[0].since + self._wait_s - time.monotonic()
            if self._wait_s and early_s > 0 and len(self._waiting) < self._max_batch_size:
                self._call_later(early_s)
                return
            batch = self._take(min(self._max_batch_size, math.ceil(len(self._waiting) / self._free)))
            if batch:
                self._call(batch)

    def _take(self, count: int) -> list[_Row]:
        batch: list[_Row] = []
        while self._waiting and len(batch) < count:
            row = self._waiting.popleft()
            if not row.scores.done():
                batch.append(row)
        return batch

    def _call_later(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._start_calls()

    def _call(self, batch: list[_Row]) -> None:
        self._free -= 1
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._threads, self._run, [row.pixels for row in batch])
        call.add_done_callback(lambda done: self._finish(batch, done))

    def _run(self, rows: list[Pixels]) -> tuple[Scores, float]:
        start = time.perf_counter()
        scores = self._predict(rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows))
        return scores, time.perf_counter() - start

    def _finish(self, batch: list[_Row], done: asyncio.Future[tuple[Scores, float]]) -> None:
        self._free += 1
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            scores, seconds = done.result()
            self._observe(len(batch), seconds)
        else:
            scores = None
        for position, row in enumerate(batch):
            if row.scores.done():
                continue
            if scores is None:
                row.scores.set_exception(error or RuntimeError("no scores"))
            else:
                row.scores.set_result(scores[position])
        self._start_calls()
