"""Decoder processes: the answers of cnn_ray.images.decode, and what a crash, a hang or a kill costs."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from factories import image_bytes

from cnn_ray import decoders
from cnn_ray.decoders import Decoders
from cnn_ray.errors import UnavailableError
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.records import QuarantineCode, RowFailure

SIZE = (24, 32)
CAPS = ImageCaps(max_pixels=10_000, max_bytes=100_000)
HOOK = """
import os, signal, time
from cnn_ray import images
real = images.decode
def decode(data, size_px, caps):
    if data.startswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"HANG"):
        time.sleep(60)
    return real(data, size_px, caps)
images.decode = decode
"""


@pytest.fixture
def pool() -> Iterator[Decoders]:
    made = Decoders(SIZE, CAPS, 2)
    yield made
    made.close()


@pytest.fixture
def crashing_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """Its children die of files that begin with CRASH and hang on those that begin with HANG."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path)
    made = Decoders(SIZE, CAPS, 2)
    yield made
    made.close()


def ask(pool: Decoders, data: bytes) -> tuple[np.ndarray, tuple[int, int] | RowFailure]:
    pixels = np.zeros((*SIZE, 3), np.uint8)
    return pixels, pool.decode(data, pixels)


def pids(pool: Decoders) -> list[int]:
    return [child._process.pid for child in pool._children]


def test_answers_are_those_of_decode(pool):
    good = [image_bytes(seed, format=("PNG", "JPEG")[seed % 2]) for seed in range(20)]
    bad = [b"", b"no image", good[0][:50], image_bytes(1, (200, 100)), bytes(CAPS.max_bytes + 1)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda data: ask(pool, data), good + bad))
    for data, (pixels, answer) in zip(good + bad, answers, strict=True):
        expected = decode(data, SIZE, CAPS)
        if isinstance(expected, DecodedImage):
            assert (pixels == expected.pixels).all()
            assert answer == (expected.width_px, expected.height_px)
        else:
            assert answer == expected


def test_a_file_that_crashes_its_decoder_costs_itself_alone(crashing_pool):
    files = [image_bytes(seed) for seed in range(12)]
    files[5] = b"CRASH"
    with ThreadPoolExecutor(4) as threads:
        answers = [answer for _, answer in threads.map(lambda data: ask(crashing_pool, data), files)]
    assert answers[5] == RowFailure(QuarantineCode.DECODER_CRASH, "the decoder ended with SIGSEGV")
    assert [answers[k] for k in range(12) if k != 5] == [(40, 30)] * 11


def test_a_file_that_takes_for_ever_is_given_up(crashing_pool, monkeypatch):
    assert ask(crashing_pool, image_bytes(0))[1] == (40, 30)
    monkeypatch.setattr(decoders, "ANSWER_S", 0.5)
    _, answer = ask(crashing_pool, b"HANG")
    assert isinstance(answer, RowFailure)
    assert answer.code == QuarantineCode.DECODER_CRASH
    assert "no answer" in answer.detail
    monkeypatch.setattr(decoders, "ANSWER_S", 60)
    assert ask(crashing_pool, image_bytes(0))[1] == (40, 30)


def test_kills_from_outside_cost_no_file(pool):
    killer_done = threading.Event()

    def kill() -> None:
        for _ in range(4):
            for pid in pids(pool)[:1]:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        killer_done.set()

    threading.Thread(target=kill).start()
    answers = []
    while not killer_done.is_set() or len(answers) < 20:
        answers.append(ask(pool, image_bytes(len(answers) % 9))[1])
    assert set(answers) == {(40, 30)}


def test_children_have_no_credentials_and_limits(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    pool = Decoders(SIZE, CAPS, 1)
    ask(pool, image_bytes(0))
    (pid,) = pids(pool)
    assert b"hidden-value" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = {line[:25].strip(): line[26:46].strip() for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    assert limits["Max core file size"] == limits["Max file size"] == "0"
    assert int(limits["Max address space"]) < 8 * 1024**3
    pool.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_closed_pool_answers_nobody(pool):
    pool.close()
    with pytest.raises(UnavailableError, match="closed pool"):
        ask(pool, image_bytes(0))


def test_a_pool_closed_in_the_middle_leaves_nobody_waiting(monkeypatch):
    """Between question and answer the pool is closed and other files are opened: nobody may wait for those."""
    asked, closed = threading.Event(), threading.Event()
    write = decoders._Child._write

    def write_and_wait(self, data: bytes) -> None:
        write(self, data)
        asked.set()
        closed.wait(10)

    monkeypatch.setattr(decoders._Child, "_write", write_and_wait)
    pool = Decoders(SIZE, CAPS, 1)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, pool, image_bytes(0))
        assert asked.wait(10)
        pool.close()
        pipes = [os.pipe() for _ in range(8)]
        closed.set()
        start = time.monotonic()
        # the child may have answered before it was killed
        try:
            assert answer.result(20)[1] == (40, 30)
        except UnavailableError:
            assert pool._closed
        assert time.monotonic() - start < 5
    for descriptors in pipes:
        for descriptor in descriptors:
            os.close(descriptor)
