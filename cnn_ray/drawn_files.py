"""Folders of drawn screenshots, and the hostile files that a nightly crawl delivers beside them."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from cnn_ray.drawing import FORMATS, LABELS, draw_screenshot, encode, encoded_as, seed_of
from cnn_ray.errors import DataError

EXPECTED_QUARANTINE = {
    "empty.png": "empty",
    "cut-off.png": "truncated",
    "cut-off.jpg": "truncated",
    "text.png": "not_an_image",
    "error-page.jpg": "not_an_image",
    "icon.png": "unsupported_format",
    "bomb.png": "too_large",
}
"""Hostile files that cannot be scored, with their quarantine code; the other ones are good images and get scored."""


def _put(path: Path, content: bytes) -> None:
    """The file has this content, or after Ctrl-C the one it had: written beside its final name and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_all(kind: str, seed: int, files: list[tuple[Path, str]], progress: Callable[[int], None] | None) -> None:
    """All (path, label) are there; two in a row share nothing but the kind of run: each has a seed of its own."""
    for n, (path, label) in enumerate(files):
        if not path.exists():
            own = seed_of(kind, seed, path.stem.rpartition("-")[2])
            format = next(format for format, suffix in FORMATS.items() if suffix == path.suffix)
            _put(path, encode(draw_screenshot(label, own), format, own))
        if progress:
            progress(n + 1)


def _suffix(seed: int, index: int) -> str:
    """One of three: each block of three images has all formats, in an order of its own."""
    return random.Random(f"formats {seed} {index // 3}").sample(tuple(FORMATS.values()), 3)[index % 3]


def write_labelled(folder: Path, count: int, seed: int, *, progress: Callable[[int], None] | None = None) -> Path:
    """The folder, now with `count` images in all in one subfolder a label; an odd one is legitimate.

    `progress` is called with the number of files that are there so far. Files that exist are left as they are.
    """
    for label in LABELS:
        (folder / label).mkdir(parents=True, exist_ok=True)
    names = [(LABELS[n % 2], f"{LABELS[n % 2]}-{n // 2:05d}{_suffix(seed, n // 2)}") for n in range(count)]
    _write_all("labelled", seed, [(folder / label / name, label) for label, name in names], progress)
    return folder


def write_unlabelled(folder: Path, count: int, seed: int, *, progress: Callable[[int], None] | None = None) -> Path:
    """The folder, now flat with `count` images; their labels stand beside it in `<folder>-truth.csv`.

    Raises:
        DataError: the truth file there is of another seed, so files and labels would not belong together.
    """
    swaps = [random.Random(f"order {seed} {n // 2}").randrange(2) for n in range(count)]  # balanced pair by pair
    files = [(f"screenshot-{n:05d}{_suffix(seed, n)}", LABELS[(n + swap) % 2]) for n, swap in enumerate(swaps)]
    truth = folder.parent / f"{folder.name}-truth.csv"
    text = "file,label\n" + "".join(f"{name},{label}\n" for name, label in files)
    before = truth.read_text() if truth.exists() else ""
    if not (text.startswith(before) or before.startswith(text)):
        raise DataError(f"Expected {truth} of this seed. Received: other files. Next: name an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _put(truth, max(text, before, key=len).encode())
    _write_all("unlabelled", seed, [(folder / name, label) for name, label in files], progress)
    return folder


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bomb(side_px: int) -> bytes:
    """A valid black RGB PNG of side x side, made without its pixels: 20,000 px take 1.2 GB raw and 1.2 MB here.

    A deflate stream flushed in full refers to nothing before it, so the rows of one flush repeat as bytes; for zeros
    alone Adler-32 is 1 in its lower half and the number of bytes modulo 65521 in its upper half.
    """
    rows = 100
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(rows * (1 + 3 * side_px))) + deflate.flush(zlib.Z_FULL_FLUSH)
    adler = ((side_px * (1 + 3 * side_px)) % 65521) << 16 | 1
    pixels = b"\x78\xda" + block * (side_px // rows) + b"\x03\x00" + struct.pack(">I", adler)
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def hostile_files() -> dict[str, bytes]:
    """File name -> bytes of what a nightly crawl delivers beside good PNG and JPEG; see EXPECTED_QUARANTINE."""
    page, other = (draw_screenshot(label, 7, width_px=320, height_px=240) for label in LABELS)
    png, jpeg = encode(page, "PNG", 7), encode(page, "JPEG", 7)
    grey = page.convert("L").tobytes()
    deep = bytearray(2 * len(grey))
    deep[0::2] = deep[1::2] = grey  # 257 times the 8-bit value: the full 16-bit range, either byte order
    return {
        "empty.png": b"",
        "cut-off.png": png[: len(png) // 2],
        "cut-off.jpg": jpeg[: len(jpeg) // 2],
        "text.png": b"This is not an image, whatever its name says.\n",
        "error-page.jpg": b"<!DOCTYPE html><html><body><h1>503 Service Unavailable</h1></body></html>\n",
        "icon.png": encoded_as(page, "ICO"),
        "bomb.png": _bomb(20_000),
        "cmyk.jpg": encoded_as(page.convert("CMYK"), "JPEG"),
        "sixteen-bit.png": encoded_as(Image.frombytes("I;16", page.size, bytes(deep)), "PNG"),
        "palette.png": encoded_as(page.quantize(64), "PNG"),
        "animated.gif": encoded_as(page, "GIF", save_all=True, append_images=[other], duration=200, loop=0),
    }
