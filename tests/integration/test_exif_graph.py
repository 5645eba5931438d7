"""The EXIF orientation inside the exported graph: what TensorFlow reads and turns, against image_files and images."""

from __future__ import annotations

import random
import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnn_ray import image_files
from cnn_ray.drawing import LABELS, draw_screenshot
from cnn_ray.exif_graph import jpeg_orientation, resized_upright
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.predictor import load_predictor

TOLERANCE = (0.001, 0.005)
"""Mean and largest |difference| of scores of a model with random weights, as in test_saved_model.py."""
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Orientation -> how an upright picture is stored, so that a reader who obeys sees it upright."""


def entry(order: str, tag: int, kind: int, value: int, count: int = 1) -> bytes:
    return struct.pack(order + "HHIHH", tag, kind, count, value, 0)


def block(order: str, *entries: bytes, directory: int = 8, count: int | None = None) -> bytes:
    """An EXIF block in byte order `<` or `>`."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", directory)
    length = len(entries) if count is None else count
    return (
        head
        + bytes(max(directory - 8, 0) if directory < 4096 else 0)
        + struct.pack(order + "H", length)
        + b"".join(entries)
    )


def segment(body: bytes, marker: int = 0xE1) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def jpeg(picture: Image.Image, *segments: bytes) -> bytes:
    """The picture as a JPEG, with the segments right behind its start."""
    file = BytesIO()
    picture.save(file, "JPEG", quality=95)
    return b"\xff\xd8" + b"".join(segments) + file.getvalue()[2:]


def oriented(orientation: int, order: str = "<") -> bytes:
    return segment(b"Exif\0\0" + block(order, entry(order, 0x010F, 2, 0), entry(order, 0x0112, 3, orientation)))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return draw_screenshot(LABELS[1], 7, width_px=412, height_px=300).convert("RGB")


@pytest.fixture(scope="module")
def orientation_of() -> Any:
    import tensorflow as tf

    return tf.function(jpeg_orientation, input_signature=[tf.TensorSpec([], tf.string)])


@pytest.fixture(scope="module")
def serving(small_artifact) -> Any:
    import tensorflow as tf

    loaded = tf.saved_model.load(small_artifact.uri)  # kept: its variables live as long as it does
    return lambda files: loaded.signatures["serving_default"](image_bytes=tf.constant(files))["scores"].numpy()


def ours(artifact, files: list[bytes]) -> np.ndarray:
    pixels: list[np.ndarray] = []
    for data in files:
        image = decode(data, artifact.size_px, ImageCaps())
        assert isinstance(image, DecodedImage)
        pixels.append(image.pixels)
    return load_predictor(artifact, engine="openvino", precision="f32").predict(np.stack(pixels))


HOSTILE = {
    "no block": b"",
    "no byte order": b"XX*\0\x08\0\0\0" + bytes(40),
    "two byte orders": b"IM*\0\x08\0\0\0\x01\0" + entry("<", 0x0112, 3, 6),
    "ends in the header": b"II*\0\x08\0\0",
    "no directory": b"MM\0*\0\0\0\x08",
    "half a count": b"MM\0*\0\0\0\x08\0",
    "directory far outside": block("<", entry("<", 0x0112, 3, 6), directory=0xFFFFFFFF),
    "directory at 2 GiB": block(">", entry(">", 0x0112, 3, 6), directory=0x80000000),
    "directory in the header": block("<", entry("<", 0x0112, 3, 6), directory=0),
    "directory further on": block(">", entry(">", 0x0112, 3, 6), directory=1234),
    "count too large": block("<", entry("<", 0x0112, 3, 6), count=65_535),
    "count too large, no tag": block("<", entry("<", 0x0100, 3, 6), count=65_535),
    "count too small": block("<", entry("<", 0x0100, 3, 1), entry("<", 0x0112, 3, 6), count=1),
    "count of none": block("<", entry("<", 0x0112, 3, 6), count=0),
    "value 0": block("<", entry("<", 0x0112, 3, 0)),
    "value 9": block(">", entry(">", 0x0112, 3, 9)),
    "value 65535": block(">", entry(">", 0x0112, 3, 65_535)),
    "value in the other order": block(">", entry("<", 0x0112, 3, 6)),
    "type BYTE": block("<", entry("<", 0x0112, 1, 6)),
    "type LONG": block("<", entry("<", 0x0112, 4, 6)),
    "many values": block("<", entry("<", 0x0112, 3, 6, count=0xFFFFFFFF)),
    "the first entry decides": block("<", entry("<", 0x0112, 3, 6), entry("<", 0x0112, 3, 3)),
    "a senseless first entry": block("<", entry("<", 0x0112, 3, 9), entry("<", 0x0112, 3, 3)),
    "the last of 5000 entries": block(">", *[entry(">", 0x0100, 3, 1)] * 4999, entry(">", 0x0112, 3, 8)),
    **{f"entry of {n} bytes": block("<", entry("<", 0x0112, 3, 6)[:n], count=1) for n in range(12)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_odd_blocks_are_read_as_image_files_reads_them(name, orientation_of, picture):
    data = jpeg(picture, segment(b"Exif\0\0" + HOSTILE[name]))

    assert (
        int(orientation_of(data)) == image_files.read(data).orientation == image_files.exif_orientation(HOSTILE[name])
    )


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (
            (segment(b"JFIF\0" + bytes(9), 0xE0), segment(b"http://ns.adobe.com/xap/1.0/\0" + bytes(999)), oriented(6)),
            6,
        ),
        ((oriented(6), oriented(3, ">")), 3),
        ((oriented(6), segment(b"Exif\0\0")), 1),
        ((oriented(6), segment(b"Exif\0")), 6),
        ((segment(b"Exif\0\1" + oriented(6)[10:]),), 1),
        ((segment(oriented(6)[4:], 0xE2),), 1),
        ((segment(oriented(6), 0xFE),), 1),
        ((b"\xff\xff\xff", oriented(8)), 8),
        ((b"\xff\0stray\xff\xd3", oriented(2)), 2),
        *[((segment(b"", 0xE2), bytes(n), oriented(5)), 5) for n in (1, *range(252, 258), 3000)],
        ((*[segment(bytes(65_000), 0xE2)] * 100, oriented(7)), 7),
    ],
)
def test_segments_are_walked_as_image_files_walks_them(segments, expected, orientation_of, picture):
    data = jpeg(picture, *segments)

    assert int(orientation_of(data)) == image_files.read(data).orientation == expected


def test_any_bytes_have_an_orientation(orientation_of, picture):
    chance = random.Random(0)
    whole, compared = jpeg(picture, oriented(6), segment(b"ICC_PROFILE\0" + bytes(300), 0xE2), oriented(8, ">")), 0
    files = [whole[:n] for n in range(120)]
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(2, 110)] = chance.choice((0, 1, 8, 0xFF, 0xD8, 0xE1, chance.randrange(256)))
        files.append(bytes(data))
    for data in files:
        seen = int(orientation_of(data))
        assert 1 <= seen <= 8
        try:
            assert seen == image_files.read(data).orientation
            compared += 1
        except image_files.RefusedError:  # the endpoint answers nothing
            continue
    assert compared > 200


def test_a_thousand_segments_end_the_walk(orientation_of, picture):
    assert int(orientation_of(jpeg(picture, *[segment(b"", 0xE2)] * 1000, oriented(6)))) == 1


@pytest.mark.parametrize("size_px", [(48, 48), (40, 56)])
def test_every_orientation_is_turned_upright(size_px):
    import tensorflow as tf

    noise = np.random.default_rng(0).integers(0, 256, (*size_px, 3), np.uint8)
    large = Image.fromarray(noise.repeat(3, 0).repeat(3, 1))
    for orientation, turn in STORED.items():
        stored = np.asarray(large if turn is None else large.transpose(turn))
        turned = tf.function(resized_upright, autograph=False)(stored, tf.constant(orientation), size_px)
        np.testing.assert_array_equal(turned.numpy(), noise, err_msg=str(orientation))


def test_an_exported_version_turns_as_the_endpoint_does(serving, small_artifact, picture):
    files = []
    for orientation, turn in STORED.items():
        stored = picture if turn is None else picture.transpose(turn)
        files += [jpeg(stored, oriented(orientation, order)) for order in "<>"]
    upright = serving([jpeg(picture)])

    scores = serving(files)

    assert np.abs(scores - upright).max() <= TOLERANCE[1]
    difference = np.abs(scores - ours(small_artifact, files))
    assert difference.mean() <= TOLERANCE[0]
    assert difference.max() <= TOLERANCE[1]


def test_a_batch_of_many_kinds(serving, small_artifact, picture):
    files = [jpeg(picture.rotate(180), oriented(3)), jpeg(picture, segment(b"Exif\0\0" + HOSTILE["count too large"]))]
    for kind in ("PNG", "BMP", "GIF"):
        file = BytesIO()
        picture.save(file, kind)
        files.append(file.getvalue())
    grey = picture.convert("L").transpose(Image.Transpose.ROTATE_270)
    files += [jpeg(grey, oriented(8, ">")), jpeg(picture, segment(b"Exif\0\0"))]

    scores = serving(files)

    np.testing.assert_allclose(scores, np.concatenate([serving([data]) for data in files]), atol=1e-5)
    assert np.abs(scores - ours(small_artifact, files)).max() <= TOLERANCE[1]
