"""The input pipeline: the same bits from memory or decoded anew, bounded memory, read ahead, errors that arrive."""

import io
import logging
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_ray.batches import READ_AHEAD, Batches, DecodedPixels, make_batches
from cnn_ray.errors import DataError
from cnn_ray.storage import open_store

SIZE = (24, 32)
IMAGE_BYTES = 24 * 32 * 3
ORDER = (7, 2)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def written(root: str, count: int, broken=()) -> list[str]:
    store = open_store(root)
    for k in range(count):
        store.put(f"{k:03}.png", b"no image" if k in broken else png(k))
    return [f"{store.uri}/{k:03}.png" for k in range(count)]


def epoch_of(root, uris, cache_images, threads, order=ORDER):
    """All batches of one epoch, each part as bytes."""
    count = len(uris)
    source = DecodedPixels(str(root), uris, SIZE, cache_bytes=cache_images * IMAGE_BYTES, threads=threads)
    batches = make_batches(source, np.arange(count, dtype=np.int32), np.arange(count) % 8, 8, 1)
    made = [tuple(part.tobytes() for part in batch) for batch in batches.epoch(batches.steps + 1, order)]
    source.close()
    return made


@pytest.mark.parametrize("order", [ORDER, None])
@pytest.mark.parametrize("broken", [(), (0, 13, 14)])
def test_a_batch_has_the_same_bits_for_any_memory_and_any_threads(tmp_path, order, broken):
    uris = written(str(tmp_path), 37, broken)
    expected = epoch_of(tmp_path, uris, 37, 1, order)
    assert len(expected) == 6
    for cache_images, threads in ((0, 1), (0, 5), (11, 3), (36, 2), (100, 4)):
        assert epoch_of(tmp_path, uris, cache_images, threads, order) == expected


def test_images_on_s3_are_read_as_from_a_folder(tmp_path, s3_uri):
    local, remote = written(str(tmp_path), 12), written(s3_uri, 12)
    assert epoch_of(s3_uri, remote, 4, 0) == epoch_of(tmp_path, local, 4, 0)


def test_unreadable_images_weigh_nothing_and_are_reported_once(tmp_path, caplog):
    uris = written(str(tmp_path), 16, broken=(3, 12))
    source = DecodedPixels(str(tmp_path), uris, SIZE, cache_bytes=8 * IMAGE_BYTES)
    batches = make_batches(source, np.arange(16, dtype=np.int32), np.arange(16) % 8, 8, 1)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            made = list(batches.epoch(2, (0, epoch)))
            unseen = {int(label) for _, labels, weights in made for label in labels[weights == 0]}
            assert unseen == {3, 12}
            assert all(pixels.reshape(8, -1).any(axis=1).all() for pixels, _, _ in made), "black images"
    source.close()
    assert [record.getMessage().split(" images")[0] for record in caplog.records] == ["left out: 2 of 16"]


@pytest.mark.parametrize("cache_images", [0, 6, 16])
def test_mostly_unreadable_images_are_an_error_for_any_memory(tmp_path, cache_images):
    uris = written(str(tmp_path), 16, broken=range(7, 16))
    with pytest.raises(DataError, match=r"9 of 16 images unreadable.*Next:"):
        epoch_of(tmp_path, uris, cache_images, 1)


@pytest.mark.parametrize("cache_images", [0, 6, 16])
def test_half_unreadable_is_not_an_error_wherever_they_lie(tmp_path, cache_images):
    """All of the kept images are unreadable, but not more than half of the set."""
    uris = written(str(tmp_path), 16, broken=range(8))
    assert len(epoch_of(tmp_path, uris, cache_images, 2)) == 3


def test_what_is_kept_is_decoded_before_anyone_asks(tmp_path):
    uris = written(str(tmp_path), 8)
    source = DecodedPixels(str(tmp_path), uris, SIZE, cache_bytes=10**9)
    source.wait()
    for uri in uris:
        Path(uri).unlink()
    pixels, readable = source.take(np.arange(8))
    source.close()
    assert readable.all()
    assert source.in_memory
    assert pixels.reshape(8, -1).any(axis=1).all()


@dataclass
class SlowPixels:
    """Takes a while for every batch, and fails at row `fails_at`."""

    delay_s: float = 0.0
    fails_at: int = -1
    taken: list[int] = field(default_factory=list)
    in_memory = False

    def take(self, rows):
        self.taken.append(int(rows[0]))
        time.sleep(self.delay_s)
        if self.fails_at in rows:
            raise DataError("Expected an image. Received: none. Next: look.")
        return np.zeros((len(rows), 2, 2, 3), np.uint8), np.ones(len(rows), bool)


def batches_of(source, count: int, size: int = 4) -> Batches:
    return make_batches(source, np.zeros(count, np.int32), np.arange(count) % size, size, 1)


def threads_of_batches() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cnn_ray-")]


def test_decoding_runs_while_the_device_computes():
    """20 batches of 50 ms each and 20 steps of 50 ms each would be 2 s one after the other."""
    batches = batches_of(SlowPixels(delay_s=0.05), 80)
    since = time.monotonic()
    for _ in batches.epoch(20, None):
        time.sleep(0.05)
    took_s = time.monotonic() - since
    assert took_s < 1.6
    assert 0 < batches.waited_s < 0.4


def test_waiting_for_slow_input_is_measured():
    batches = batches_of(SlowPixels(delay_s=0.2), 32)
    list(batches.epoch(8, None))
    assert 0.2 <= batches.waited_s < 1.6


def test_no_more_than_a_few_batches_are_made_ahead():
    source = SlowPixels()
    made = batches_of(source, 400).epoch(100, None)
    next(made)
    time.sleep(0.2)
    assert 1 < len(source.taken) <= READ_AHEAD + 1
    made.close()


def test_an_error_of_a_thread_reaches_the_loop_and_the_threads_end():
    made = batches_of(SlowPixels(fails_at=21), 80).epoch(20, None)
    for _ in range(5):
        next(made)
    with pytest.raises(DataError, match="Expected an image"):
        next(made)
    assert not threads_of_batches()


def test_no_threads_are_left_after_a_loop_that_was_broken_off(tmp_path):
    uris = written(str(tmp_path), 24)
    source = DecodedPixels(str(tmp_path), uris, SIZE, cache_bytes=4 * IMAGE_BYTES, threads=3)
    made = batches_of(source, 24).epoch(6, ORDER)
    next(made)
    assert threads_of_batches()
    made.close()
    source.close()
    assert not threads_of_batches()


HUNGRY = """
import resource, sys
import numpy as np
from cnn_ray.batches import DecodedPixels, make_batches
root, cache_bytes = sys.argv[1], int(sys.argv[2])
uris = [f"{root}/{k % 8:03}.png" for k in range(400)]
def epoch(count, cache_bytes):
    source = DecodedPixels(root, uris[:count], (512, 512), cache_bytes=cache_bytes, threads=2)
    batches = make_batches(source, np.zeros(count, np.int32), np.arange(count) % 8, 8, 1)
    rows = sum(int(weights.sum()) for _, _, weights in batches.epoch(batches.steps, (0, 1)))
    source.close()
    return rows
epoch(48, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = epoch(400, cache_bytes)
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_where_the_images_are_ten_times_as_many(tmp_path):
    """400 images of 786 kB are 314 MB; 31 MB are kept. What else grows is a few batches and the allocator's slack."""
    written(str(tmp_path), 8)
    command = [sys.executable, "-c", HUNGRY, str(tmp_path), "31457280"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == 400
    assert kilobytes * 1024 < 31_457_280 + 100e6
