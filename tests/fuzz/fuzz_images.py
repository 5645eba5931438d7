"""Coverage-guided fuzzing of `cnn_ray.images.decode`, seeded with the hostile corpus.

    python3 -m venv /tmp/fuzz
    /tmp/fuzz/bin/pip install atheris numpy pillow deflate simplejpeg opencv-python-headless pyarrow pydantic
    /tmp/fuzz/bin/python tests/fuzz/fuzz_images.py CORPUS_FOLDER -max_total_time=900 -timeout=20 -rss_limit_mb=2048

What may never happen: an exception, another form of answer, 20 s for one file, or 2 GiB. Coverage is that of our own
Python; the C libraries behind it are not instrumented. Checksums of half the PNG are mended, or hardly one gets far.
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import atheris
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["cnn_ray"]):
    from cnn_ray.images import DecodedImage, ImageCaps, decode
    from cnn_ray.records import RowFailure

CAPS = ImageCaps(max_pixels=4_000_000, max_bytes=1_000_000)
SIZE = (16, 24)


def mended(data: bytes) -> bytes:
    """A PNG whose chunks have their right checksums, as far as there are whole chunks."""
    out, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        out += [data[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(out) + data[at:]


def one_input(data: bytes) -> None:
    """Raises AssertionError where the answer is not what `decode` promises."""
    if data.startswith(b"\x89PNG") and len(data) % 2:
        data = mended(data)
    result = decode(data, SIZE, CAPS)
    if isinstance(result, DecodedImage):
        assert result.pixels.shape == (*SIZE, 3)
        assert result.pixels.dtype == np.uint8
        assert 0 < result.width_px * result.height_px <= CAPS.max_pixels
    else:
        assert isinstance(result, RowFailure)
        assert result.detail.isprintable()
        assert len(result.detail) < 200


def write_corpus(folder: Path) -> None:
    """The hostile corpus lies in the folder, small files only: mutating large ones is slow."""
    from hostile import hostile_corpus

    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in hostile_corpus(0).items():
        if len(data) < 30_000:
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    write_corpus(Path(next(a for a in sys.argv[1:] if not a.startswith("-"))))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
