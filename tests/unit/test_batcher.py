"""Rows of many requests in calls of the model: who waits, who goes together, who is left out."""

from __future__ import annotations

import asyncio
import threading

import numpy as np

from cnn_ray.batcher import Batcher


def row(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


class Model:
    """Scores of a row are its value, twice; calls can be held."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        self.calls.append(pixels[:, 0, 0, 0].tolist())
        assert self.free.wait(10)
        if 255 in self.calls[-1]:
            raise ValueError("no scores")
        return np.repeat(pixels[:, 0, 0, :1].astype(np.float32), 2, axis=1)


def batcher(model: Model, observed: list[int] | None = None, **options) -> Batcher:
    settings = {"max_batch_size": 4, "concurrency": 1, "wait_s": 0.0, **options}
    return Batcher(model.predict, observe=lambda rows, seconds: (observed or []).append(rows), **settings)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_every_request_gets_the_scores_of_its_own_rows():
    async def run():
        model = Model()
        b = batcher(model)
        answers = await asyncio.gather(*(b.scores([row(n), row(n + 1)]) for n in range(0, 40, 2)))
        return model, answers

    model, answers = asyncio.run(run())

    for number, scores in enumerate(answers):
        np.testing.assert_array_equal(scores, np.float32([[2 * number] * 2, [2 * number + 1] * 2]))
    assert max(map(len, model.calls)) == 4
    assert sum(map(len, model.calls)) == 40


def test_what_comes_during_a_call_is_the_next_call():
    async def run():
        model = Model()
        model.free.clear()
        b = batcher(model)
        first = asyncio.create_task(b.scores([row(1)]))
        await until(lambda: model.calls)
        others = [asyncio.create_task(b.scores([row(n)])) for n in (2, 3, 4)]
        await until(lambda: b.waiting == 3)
        model.free.set()
        await asyncio.gather(first, *others)
        return model.calls

    assert asyncio.run(run()) == [[1], [2, 3, 4]]


def test_calls_share_what_waits_where_several_may_run():
    async def run():
        model = Model()
        await batcher(model, concurrency=2, max_batch_size=16).scores([row(n) for n in range(10)])
        return model.calls

    assert sorted(map(len, asyncio.run(run()))) == [5, 5]


def test_cancelled_requests_are_not_computed():
    async def run():
        model = Model()
        model.free.clear()
        b = batcher(model)
        first = asyncio.create_task(b.scores([row(1)]))
        await until(lambda: model.calls)
        gone = asyncio.create_task(b.scores([row(2), row(3)]))
        stays = asyncio.create_task(b.scores([row(4)]))
        await until(lambda: b.waiting == 3)
        gone.cancel()
        await asyncio.wait([gone])
        model.free.set()
        await asyncio.gather(first, stays)
        return model.calls

    assert asyncio.run(run()) == [[1], [4]]


def test_an_error_reaches_those_of_its_call_and_nobody_else():
    async def run():
        model = Model()
        b = batcher(model, max_batch_size=1)
        answers = await asyncio.gather(b.scores([row(255)]), b.scores([row(1)]), return_exceptions=True)
        return [*answers, await b.scores([row(2)])]

    failed, good, later = asyncio.run(run())

    assert isinstance(failed, ValueError)
    assert good.tolist() == [[1, 1]]
    assert later.tolist() == [[2, 2]]


def test_a_call_waits_for_company_where_it_was_told_to():
    async def run():
        model = Model()
        b = batcher(model, wait_s=5)
        tasks = []
        for n in (1, 2, 3, 4):
            tasks.append(asyncio.create_task(b.scores([row(n)])))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return model.calls

    assert asyncio.run(run()) == [[1, 2, 3, 4]]


def test_a_call_that_waited_long_enough_goes_as_it_is():
    async def run():
        model = Model()
        await batcher(model, wait_s=0.05).scores([row(1)])
        return model.calls

    assert asyncio.run(run()) == [[1]]
