"""TIFFs drawn by hand in many layouts, AVIFs that turn and move, and seeded mutations of both."""

from __future__ import annotations

import io
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hostile import encoded, hostile_corpus, tiff_of
from PIL import Image

from cnn_ray import image_files
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.records import QuarantineCode, RowFailure

CAPS = ImageCaps()
WIDTH, HEIGHT = 40, 24
RGBA = np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
RGB, GREY = RGBA[..., :3], RGBA[..., 0]
ON_WHITE = RGB * (RGBA[..., 3:] / 255) + 255 - RGBA[..., 3:]

Tags = dict[int, tuple[str, list[int]]]


def pixels_of(data: bytes, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    result = decode(data, size, CAPS)
    assert isinstance(result, DecodedImage), result
    return result.pixels


def failure(data: bytes) -> RowFailure:
    result = decode(data, (8, 8), CAPS)
    assert isinstance(result, RowFailure), "scored"
    return result


def tags(photometric: int, bits: list[int], **more: tuple[str, list[int]]) -> Tags:
    known: Tags = {
        256: ("I", [WIDTH]), 257: ("I", [HEIGHT]), 258: ("H", bits), 259: ("H", [1]), 262: ("H", [photometric]),
        277: ("H", [len(bits)]), 278: ("I", [HEIGHT]),
    }  # fmt: skip
    return known | {int(name[1:]): value for name, value in more.items()}


def packed(grey: np.ndarray, bits: int) -> bytes:
    """Rows of numbers below 2**bits."""
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return np.packbits((grey[..., None] >> shifts & 1).reshape(len(grey), -1), axis=1).tobytes()


def tiles(pixels: np.ndarray, side: int = 16) -> list[bytes]:
    padded = np.zeros((-(-HEIGHT // side) * side, -(-WIDTH // side) * side, *pixels.shape[2:]), pixels.dtype)
    padded[:HEIGHT, :WIDTH] = pixels
    return [
        padded[y : y + side, x : x + side].tobytes()
        for y in range(0, len(padded), side)
        for x in range(0, padded.shape[1], side)
    ]


def strips(data: bytes, rows: int) -> list[bytes]:
    step = len(data) // HEIGHT * rows
    return [data[k : k + step] for k in range(0, len(data), step)]


TILED = {"t322": ("I", [16]), "t323": ("I", [16])}
PALETTE = np.random.default_rng(5).integers(0, 256, (3, 16))
WHITE = np.full((HEIGHT, WIDTH, 3), 255)
INKS = 255 - RGB * ((255 - RGBA[..., 3:].astype(int)) / 255)


def of_grey(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey, float)[..., None], 3, axis=2)


def layouts(order: str) -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> (file, the pixels that were drawn)."""
    wide = np.dtype(order + "u2")
    premultiplied = RGBA.copy()
    premultiplied[..., :3] = (RGBA[..., :3].astype(int) * RGBA[..., 3:] + 127) // 255
    grey_alpha = RGBA[..., [0, 3]]
    made: dict[str, tuple[Tags, list[bytes], np.ndarray | None]] = {
        "strips": (tags(2, [8] * 3, t278=("I", [5])), strips(RGB.tobytes(), 5), RGB),
        "one row a strip": (tags(2, [8] * 3, t278=("H", [1])), strips(RGB.tobytes(), 1), RGB),
        "tiles": (tags(2, [8] * 3, **TILED), tiles(RGB), RGB),
        "tiles of grey": (tags(1, [8], **TILED), tiles(GREY), of_grey(GREY)),
        "planes": (tags(2, [8] * 3, t284=("H", [2])), [RGB[..., k].tobytes() for k in range(3)], RGB),
        "planes in strips": (
            tags(2, [8] * 3, t284=("H", [2]), t278=("I", [7])),
            [s for k in range(3) for s in strips(RGB[..., k].tobytes(), 7)],
            RGB,
        ),
        "planes in tiles": (
            tags(2, [8] * 3, t284=("H", [2]), **TILED), [t for k in range(3) for t in tiles(RGB[..., k])], RGB,
        ),
        "planes with alpha": (
            tags(2, [8] * 4, t284=("H", [2]), t338=("H", [2])), [RGBA[..., k].tobytes() for k in range(4)], ON_WHITE,
        ),
        "alpha": (tags(2, [8] * 4, t338=("H", [2])), [RGBA.tobytes()], ON_WHITE),
        "alpha that is not named": (tags(2, [8] * 4), [RGBA.tobytes()], ON_WHITE),
        "fourth sample of no meaning": (tags(2, [8] * 4, t338=("H", [0])), [RGBA.tobytes()], RGB),
        "alpha in 16 bits": (tags(2, [16] * 4, t338=("H", [2])), [(RGBA.astype(wide) * 257).tobytes()], ON_WHITE),
        "grey and alpha": (
            tags(1, [8] * 2, t338=("H", [2])), [grey_alpha.tobytes()],
            of_grey(GREY * (RGBA[..., 3] / 255) + 255 - RGBA[..., 3]),
        ),
        "16 bits": (tags(2, [16] * 3), [(RGB.astype(wide) * 257).tobytes()], RGB),
        "16 bits deflated": (
            tags(2, [16] * 3, t259=("H", [8])), [zlib.compress((RGB.astype(wide) * 257).tobytes())], RGB,
        ),
        "16-bit grey": (tags(1, [16]), [(GREY.astype(wide) * 257).tobytes()], of_grey(GREY)),
        "16-bit grey deflated": (
            tags(1, [16], t259=("H", [32946])), [zlib.compress((GREY.astype(wide) * 257).tobytes())], of_grey(GREY),
        ),
        "white is 0": (tags(0, [8]), [GREY.tobytes()], of_grey(255 - GREY)),
        "bits": (tags(1, [1]), [packed(GREY >> 7, 1)], of_grey((GREY >> 7) * 255)),
        "bits whose 0 is white": (
            tags(0, [1], t278=("I", [3])), strips(packed(GREY >> 7, 1), 3), of_grey(255 - (GREY >> 7) * 255),
        ),
        "bits from the right": (
            tags(1, [1], t266=("H", [2])),
            [np.packbits(GREY >> 7, axis=1, bitorder="little").tobytes()], of_grey((GREY >> 7) * 255),
        ),
        "2-bit grey": (tags(1, [2]), [packed(GREY >> 6, 2)], of_grey((GREY >> 6) * 85)),
        "4-bit grey": (tags(1, [4]), [packed(GREY >> 4, 4)], of_grey((GREY >> 4) * 17)),
        "palette of 16": (
            tags(3, [4], t320=("H", (PALETTE * 257).reshape(-1).tolist())), [packed(GREY >> 4, 4)],
            PALETTE.T[GREY >> 4],
        ),
        "palette of 8-bit numbers": (
            tags(3, [4], t320=("H", PALETTE.reshape(-1).tolist())), [packed(GREY >> 4, 4)], PALETTE.T[GREY >> 4],
        ),
        "deflated tiles with differences": (
            tags(2, [8] * 3, t259=("H", [8]), t317=("H", [2]), t322=("I", [48]), t323=("I", [32])),
            [zlib.compress(_differences(tiles_of_one(RGB)))], RGB,
        ),
        "CMYK": (tags(5, [8] * 4), [RGBA.tobytes()], None),
        "nothing said of samples": (
            {k: v for k, v in tags(1, [8]).items() if k not in (259, 277, 278)}, [GREY.tobytes()], of_grey(GREY),
        ),
    }  # fmt: skip
    ink = np.asarray(Image.frombytes("CMYK", (WIDTH, HEIGHT), RGBA.tobytes()).convert("RGB"))
    return {
        name: (tiff_of(t, pieces, order), ink if wanted is None else wanted)
        for name, (t, pieces, wanted) in made.items()
    }


def tiles_of_one(pixels: np.ndarray) -> np.ndarray:
    padded = np.zeros((32, 48, 3), np.uint8)
    padded[:HEIGHT, :WIDTH] = pixels
    return padded


def _differences(pixels: np.ndarray) -> bytes:
    return np.diff(pixels, axis=1, prepend=np.zeros_like(pixels[:, :1])).tobytes()


LAYOUTS = {f"{name} {order}": made for order in "<>" for name, made in layouts(order).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tiff_of_any_layout_gives_the_pixels_that_were_drawn(name):
    data, wanted = LAYOUTS[name]
    np.testing.assert_allclose(pixels_of(data), wanted, atol=1)
    for end in range(0, len(data), max(len(data) // 7, 1)):
        assert failure(data[:end]).code in (QuarantineCode.TRUNCATED, QuarantineCode.EMPTY, QuarantineCode.NOT_AN_IMAGE)


def test_premultiplied_alpha_is_undone_before_it_goes_on_white():
    half = np.tile(np.array([100, 50, 0, 128], np.uint8), (HEIGHT, WIDTH, 1))
    data = tiff_of(tags(2, [8] * 4, t338=("H", [1])), [half.tobytes()])
    np.testing.assert_allclose(pixels_of(data)[0, 0], (227, 177, 127), atol=2)
    grey = tiff_of(tags(1, [8, 8], t338=("H", [1])), [half[..., [0, 3]].tobytes()])
    np.testing.assert_allclose(pixels_of(grey)[0, 0], (227, 227, 227), atol=2)


REFUSED = {
    "TIFF with CCITT compression": tags(1, [1], t259=("H", [4])),
    "TIFF with JPEG compression": tags(2, [8] * 3, t259=("H", [7])),
    "TIFF with Zstandard compression": tags(2, [8] * 3, t259=("H", [50000])),
    "TIFF with unknown (4711) compression": tags(2, [8] * 3, t259=("H", [4711])),
    "TIFF with YCbCr colours": tags(6, [8] * 3),
    "TIFF with CIELab colours": tags(8, [8] * 3),
    "TIFF with signed or floating-point samples": tags(1, [16], t339=("H", [2])),
    "TIFF with 5-6 bits a sample of RGB": tags(2, [5, 6, 5]),
    "TIFF with 32 bits a sample of grey": tags(1, [32]),
    "TIFF with 5 samples of 8 bits for RGB": tags(2, [8] * 5),
    "TIFF with separate planes of 16-bit RGB": tags(2, [16] * 3, t284=("H", [2])),
    "TIFF that begins with a preview": tags(2, [8] * 3, t254=("I", [1])),
    "TIFF with predictor 3": tags(2, [8] * 3, t259=("H", [8]), t317=("H", [3])),
    "RAW photo": tags(2, [8] * 3, t50706=("B", [1, 4, 0, 0])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tiff_that_is_not_read_has_its_kind_named(name):
    refused = failure(tiff_of(REFUSED[name], [bytes(WIDTH * HEIGHT * 8)]))
    assert refused.code == QuarantineCode.UNSUPPORTED_FORMAT
    assert refused.detail.startswith(name), refused.detail


def test_the_decoder_gets_only_tags_that_it_needs():
    junk = {
        700: ("B", [0] * 900),
        34675: ("B", [1] * 900),
        34665: ("I", [8]),
        330: ("I", [8] * 500),
        305: ("B", [65] * 99),
    }
    data = tiff_of(tags(2, [8] * 3, t274=("H", [6])) | junk, [RGB.tobytes()])
    source = image_files.read(data)
    assert source.orientation == 6
    image = Image.open(io.BytesIO(source.clean))
    assert set(image.tag_v2) == {256, 257, 258, 259, 262, 273, 277, 278, 279, 284}
    assert len(source.clean) < RGB.nbytes + 250


def test_first_pages_and_first_frames_alone_are_read():
    red, green = (Image.new("RGB", (40, 40), colour) for colour in ("red", "green"))
    for kind in ("TIFF", "AVIF"):
        data = encoded(red, kind, save_all=True, append_images=[green] * 3)
        np.testing.assert_allclose(pixels_of(data)[5, 5], (255, 0, 0), atol=3)
        with Image.open(io.BytesIO(image_files.read(data).clean)) as clean:
            assert clean.n_frames == 1


def test_metadata_of_an_avif_does_not_reach_the_decoder():
    exif = Image.Exif()
    exif[0x010E] = "a text" * 1000
    data = encoded(Image.fromarray(RGB), "AVIF", exif=exif.tobytes(), xmp=b"<x/>" * 100)
    with Image.open(io.BytesIO(image_files.read(data).clean)) as clean:
        assert not {"exif", "xmp"} & set(clean.info)
    assert np.array_equal(pixels_of(data), pixels_of(encoded(Image.fromarray(RGB), "AVIF")))


def test_every_frame_of_an_avif_counts_before_any_is_decoded():
    """The boxes say 16 x 16, the AV1 data 3000 x 2000: a decoder believes the data."""
    large = encoded(Image.new("L", (3000, 2000), 90), "AVIF", speed=10)
    assert isinstance(decode(large, (8, 8), CAPS), DecodedImage)
    at = large.index(b"ispe") + 8
    started = time.thread_time()
    refused = failure(large[:at] + struct.pack(">II", 16, 16) + large[at + 8 :])
    assert (refused.code, time.thread_time() - started < 0.05) == (QuarantineCode.TOO_LARGE, True), refused


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_caps_hold_for_both(kind):
    data = encoded(Image.fromarray(RGB), kind)
    for caps in (ImageCaps(max_pixels=WIDTH * HEIGHT - 1), ImageCaps(max_bytes=len(data) - 1)):
        refused = decode(data, (8, 8), caps)
        assert isinstance(refused, RowFailure)
        assert refused.code == QuarantineCode.TOO_LARGE


def test_a_tiff_above_pillows_own_limit_is_ours_alone():
    grey = encoded(Image.new("1", (20_000, 9_500), 1), "TIFF", compression="tiff_adobe_deflate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(decode(grey, (8, 8), ImageCaps(max_pixels=200_000_000)), DecodedImage)


def test_no_mutation_raises_warns_or_answers_twice_differently():
    seeds = [
        data for name, (data, _) in hostile_corpus(1).items() if name.endswith((".tiff", ".avif")) and len(data) < 9000
    ]
    seeds += [data for data, _ in LAYOUTS.values()]
    chance, seen = random.Random(11), set()
    started = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.choice((1, 1, 2, 8))):
                at = chance.randrange(min(len(data), 400) if chance.random() < 0.7 else len(data))
                match chance.randrange(3):
                    case 0:
                        data[at] = chance.randrange(256)
                    case 1:
                        data[at : at + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
                    case _:
                        data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", bytes(4), b"\0\0\xff\xff", b"\1\0\0\0"))
                data = data or bytearray(b"x")
            results = [decode(bytes(data), (8, 8), CAPS) for _ in range(2)]
            if isinstance(results[0], DecodedImage):
                assert isinstance(results[1], DecodedImage)
                assert np.array_equal(results[0].pixels, results[1].pixels)
                seen.add("image")
            else:
                assert results[0] == results[1]
                assert len(results[0].detail) < 200
                seen.add(results[0].code)
    assert {
        "image",
        *(QuarantineCode(c) for c in ("truncated", "decode_error", "too_large", "unsupported_format")),
    } <= seen
    assert time.thread_time() - started < 20
