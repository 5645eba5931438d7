"""Golden pictures per mode and format against an independent Pillow + numpy reference, hostile bytes, and threads.

A cut after all pixel data (only PNG IEND or JPEG EOI missing) is `truncated` here: whoever cut the file may have cut
more. An animated GIF cut after its first frame is scored, since that frame is all we take.
"""

from __future__ import annotations

import io
import random
import re
import struct
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hostile import hostile_corpus
from PIL import Image, ImageDraw

from cnn_ray import image_files, images
from cnn_ray.images import ALLOWED_FORMATS, RESIZE_RULE, DecodedImage, ImageCaps, decode
from cnn_ray.records import QuarantineCode, RowFailure

SIZE = (48, 64)  # height, width
CAPS = ImageCaps()


# --- pictures -------------------------------------------------------------------------------------------------------


def page(width: int = 150, height: int = 110) -> Image.Image:
    """A small drawn page: flat areas, sharp lines and a gradient."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((5, 5, width - 40, 30), fill=(20, 40, 160))
    draw.text((10, 10), "Sign in to your bank", fill=(255, 255, 255))
    draw.ellipse((60, 50, 130, 100), fill=(230, 20, 30))
    draw.line((0, height - 1, width, 40), fill=(0, 0, 0))
    return image


def with_alpha(image: Image.Image) -> Image.Image:
    alpha = np.add.outer(np.arange(image.height) * 2, np.arange(image.width)) % 256
    image = image.copy()
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    rows: np.ndarray,
    depth: int,
    colour: int,
    *,
    interlace: bool = False,
    before: bytes = b"",
    data: bytes | None = None,
) -> bytes:
    """A PNG by hand. `rows` are the packed bytes of each row, uint8 [H, bytes], or pixels [H, W, C] if interlaced."""
    height = rows.shape[0]
    width = rows.shape[1] if interlace else rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    grid = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [rows[y::dy, x::dx] for x, y, dx, dy in grid] if interlace else [rows]
    raw = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlace))
    body = zlib.compress(raw) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def area(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Exact area average, float64 [H, W, 3], by dense matrices of overlaps."""

    def overlaps(count: int, source: int) -> np.ndarray:
        low = np.arange(count)[:, None] * source / count
        pixel = np.arange(source)[None]
        return np.clip(np.minimum(low + source / count, pixel + 1) - np.maximum(low, pixel), 0, None) * count / source

    down = np.tensordot(overlaps(size[0], pixels.shape[0]), pixels, 1)
    return np.einsum("iwc,jw->ijc", down, overlaps(size[1], pixels.shape[1]), optimize=True)


def on_white(rgba: Image.Image) -> np.ndarray:
    """float64 [H, W, 3]: straight alpha on white, in floats."""
    pixels = np.asarray(rgba.convert("RGBA")).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def reference(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    return area(on_white(image.convert("RGB") if image.mode == "CMYK" else image), SIZE)


def pixels_of(data: bytes, size: tuple[int, int] = SIZE) -> np.ndarray:
    result = decode(data, size, CAPS)
    assert isinstance(result, DecodedImage), result
    assert result.pixels.shape == (*size, 3)
    assert result.pixels.dtype == np.uint8
    assert result.pixels.flags.c_contiguous
    return result.pixels


def failure(data: bytes, caps: ImageCaps = CAPS) -> RowFailure:
    result = decode(data, SIZE, caps)
    assert isinstance(result, RowFailure), "scored"
    assert result.detail
    assert len(result.detail) < 200
    assert result.detail.isprintable()
    assert " at 0x" not in result.detail
    return result


PAGE = page()
ALPHA = with_alpha(PAGE)
PALETTE = PAGE.quantize(64)
GREY16 = np.maximum(np.asarray(PAGE.convert("L")).astype(np.int32) * 257 - 100, 0).astype(np.uint16)
RGB16 = (np.asarray(PAGE).astype(np.uint16) * 257).astype(">u2")
SHADES = [Image.new("RGB", PAGE.size, c) for c in ("green", "blue")]

# name -> (bytes, tolerance in levels). 1.0: rounding twice (composite or convert, then resize). JPEG at this size is
# decoded in full; the scaled decode has its own test. Lossy WebP has the same decoder on both sides.
GOLDEN = {
    "png rgb": (encode(PAGE, "PNG"), 0.6),
    "png rgba": (encode(ALPHA, "PNG"), 1.1),
    "png rgba opaque": (encode(PAGE.convert("RGBA"), "PNG"), 0.6),
    "png l": (encode(PAGE.convert("L"), "PNG"), 0.6),
    "png la": (encode(ALPHA.convert("LA"), "PNG"), 1.1),
    "png p": (encode(PALETTE, "PNG"), 0.6),
    "png p trns one": (encode(PALETTE, "PNG", transparency=3), 0.6),
    "png p trns table": (encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 4))), 1.1),
    "png rgb trns": (encode(PAGE, "PNG", transparency=(20, 40, 160)), 0.6),
    "png l trns": (encode(PAGE.convert("L"), "PNG", transparency=41), 0.6),
    "png 1": (encode(PAGE.convert("1"), "PNG"), 0.6),
    "png interlaced": (png(np.asarray(PAGE), 8, 2, interlace=True), 0.6),
    "jpeg": (encode(PAGE, "JPEG", quality=90), 0.6),
    "jpeg grey": (encode(PAGE.convert("L"), "JPEG"), 0.6),
    "jpeg progressive": (encode(PAGE, "JPEG", progressive=True), 0.6),
    "jpeg cmyk": (encode(PAGE.convert("CMYK"), "JPEG"), 0.6),
    "webp lossy": (encode(PAGE, "WEBP", quality=80), 0.6),
    "webp lossless": (encode(PAGE, "WEBP", lossless=True), 0.6),
    "webp alpha": (encode(ALPHA, "WEBP", lossless=True), 1.1),
    "webp animated": (encode(PAGE, "WEBP", save_all=True, append_images=SHADES, lossless=True), 0.6),
    "bmp rgb": (encode(PAGE, "BMP"), 0.6),
    "bmp p": (encode(PALETTE, "BMP"), 0.6),
    "bmp l": (encode(PAGE.convert("L"), "BMP"), 0.6),
    "bmp 1": (encode(PAGE.convert("1"), "BMP"), 0.6),
    "gif": (encode(PALETTE, "GIF"), 0.6),
    "gif transparent": (encode(PALETTE, "GIF", transparency=5), 0.6),
    **{
        f"tiff {mode.lower()} {compression}": (encode(image, "TIFF", compression=compression), tolerance)
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
        for mode, image, tolerance in (
            ("rgb", PAGE, 0.6),
            ("rgba", ALPHA, 1.1),
            ("l", PAGE.convert("L"), 0.6),
            ("la", ALPHA.convert("LA"), 1.1),
            ("p", PALETTE, 0.6),
            ("1", PAGE.convert("1"), 0.6),
            ("cmyk", PAGE.convert("CMYK"), 0.6),
        )
    },
    "avif": (encode(PAGE, "AVIF"), 0.6),
    "avif alpha": (encode(ALPHA, "AVIF"), 1.1),
    "avif grey": (encode(PAGE.convert("L"), "AVIF"), 0.6),
    "gif animated": (encode(PALETTE, "GIF", save_all=True, append_images=SHADES), 0.6),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    data, tolerance = GOLDEN[name]
    wanted = reference(data)
    assert wanted.std() > 20  # else the picture proves nothing
    np.testing.assert_allclose(pixels_of(data), wanted, atol=tolerance)
    result = decode(data, SIZE, CAPS)
    assert isinstance(result, DecodedImage)
    assert (result.width_px, result.height_px) == PAGE.size


def test_first_frame_only() -> None:
    # "gif animated" above compares with Pillow's own first frame; this one does not need Pillow's opinion.
    red = [Image.new("RGB", (40, 40), c) for c in ("red", "green")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = encode(red[0], kind, save_all=True, append_images=red[1:])
        np.testing.assert_allclose(pixels_of(data)[5, 5], (255, 0, 0), atol=2, err_msg=kind)


def test_sixteen_bit_grey_is_scaled() -> None:
    data = png(GREY16.astype(">u2").view(np.uint8).reshape(110, -1), 16, 0)
    wanted = area(np.repeat(GREY16[..., None] / 257, 3, axis=2), SIZE)
    np.testing.assert_allclose(pixels_of(data), wanted, atol=1.0)
    assert np.array_equal(pixels_of(data), pixels_of(encode(Image.fromarray(GREY16), "PNG")))


def test_sixteen_bit_colour_and_alpha() -> None:
    data = png(RGB16.view(np.uint8).reshape(110, -1), 16, 2)
    np.testing.assert_allclose(pixels_of(data), area(np.asarray(PAGE).astype(float), SIZE), atol=0.6)
    rgba = (np.asarray(ALPHA).astype(np.uint16) * 257).astype(">u2")
    data = png(rgba.view(np.uint8).reshape(110, -1), 16, 6)
    np.testing.assert_allclose(pixels_of(data), area(on_white(ALPHA), SIZE), atol=1.1)


@pytest.mark.parametrize(("depth", "grey"), [(1, 0), (2, 1), (4, 6), (8, 77), (16, 30_000)])
def test_grey_key_is_transparent_at_every_depth(depth: int, grey: int) -> None:
    """Pillow compares a 2- or 4-bit key with pixels that it has scaled, so the key must be scaled too."""
    most = (1 << depth) - 1
    if depth == 16:
        rows = np.full((8, 8), grey, ">u2").view(np.uint8)
    else:
        rows = np.full((8, depth), sum(grey << s for s in range(0, 8, depth)), np.uint8)
    plain = pixels_of(png(rows, depth, 0))
    assert np.all(plain == round(grey * 255 / most))
    assert np.all(pixels_of(png(rows, depth, 0, before=chunk(b"tRNS", struct.pack(">H", grey)))) == 255)
    assert np.array_equal(plain, pixels_of(png(rows, depth, 0, before=chunk(b"tRNS", struct.pack(">H", grey ^ 1)))))


def test_sixteen_bit_rgb_key() -> None:
    rows = np.tile(np.array([9000, 30_000, 60_000], ">u2"), (8, 8)).view(np.uint8)
    assert np.all(pixels_of(png(rows, 16, 2, before=chunk(b"tRNS", struct.pack(">3H", 9000, 30_000, 60_000)))) == 255)
    assert np.all(
        pixels_of(png(rows, 16, 2, before=chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))))[0, 0] == (35, 117, 234)
    )


def test_ycck_and_adobe_inversion() -> None:
    """Pillow writes Adobe CMYK (transform 0). Relabelled as transform 2 the same planes are YCCK: colours must move."""
    plain = encode(PAGE.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in plain
    assert np.abs(pixels_of(plain) - area(np.asarray(PAGE).astype(float), SIZE)).mean() < 4
    at = plain.index(b"Adobe") + 11
    ycck = plain[:at] + b"\2" + plain[at + 1 :]
    np.testing.assert_allclose(pixels_of(ycck), reference(ycck), atol=0.6)
    assert np.abs(pixels_of(ycck).astype(int) - pixels_of(plain)).mean() > 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PAGE, kind, exif=exif.tobytes())
    turn = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }[orientation]  # fmt: skip
    # Pillow turns a TIFF by itself while it loads.
    upright = np.asarray(PAGE if kind == "TIFF" else Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
    np.testing.assert_allclose(pixels_of(data), area(turn(upright), SIZE), atol=0.6)
    result = decode(data, SIZE, CAPS)
    assert isinstance(result, DecodedImage)
    assert (result.width_px, result.height_px) == (PAGE.size if orientation < 5 else PAGE.size[::-1])


def test_gif_frame_smaller_than_its_screen_leaves_white() -> None:
    data = bytearray(encode(Image.new("P", (32, 48), 0), "GIF"))
    data[6:10] = struct.pack("<HH", 64, 48)
    pixels = pixels_of(bytes(data))
    assert np.all(pixels[:, 32:] == 255)
    assert np.all(pixels[:, :31] == 0)


def test_bmp_alpha_zero_everywhere_means_opaque() -> None:
    pixels = np.asarray(PAGE.convert("RGBA"))[::-1, :, [2, 1, 0, 3]].copy()
    for alpha, wanted in ((0, np.asarray(PAGE).astype(float)), (255, np.asarray(PAGE).astype(float)), (51, None)):
        pixels[..., 3] = alpha
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        header = struct.pack("<IiiHHIIiiII", 108, 150, 110, 1, 32, 3, 0, 0, 0, 0, 0) + masks + bytes(52)
        data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 122) + header + pixels.tobytes()
        if wanted is None:
            wanted = np.asarray(PAGE) * 0.2 + 255 * 0.8
        np.testing.assert_allclose(pixels_of(data), area(wanted, SIZE), atol=1.1)


# --- resize ---------------------------------------------------------------------------------------------------------


# (width, height) of the original -> mean and largest distance to the exact area average. Even sizes of three or more
# pixels per output pixel (the model takes 64x48 here) are halved first; all others are exact.
@pytest.mark.parametrize(
    ("size", "mean", "largest"),
    [((64, 48), 0, 0), ((65, 49), 0.3, 0.6), ((190, 142), 0.3, 0.6), ((200, 150), 1, 30), ((320, 100), 0.3, 0.6),
     ((400, 300), 1, 30), ((700, 500), 1, 30), ((201, 151), 0.3, 0.6), ((701, 100), 0.3, 0.6), ((20, 10), 0.3, 0.6),
     ((1, 1), 0.3, 0.6), ((3, 700), 0.3, 0.6), ((80, 30), 0.3, 0.6)],
)  # fmt: skip
def test_resize_is_area(size: tuple[int, int], mean: float, largest: float) -> None:
    original = page(900, 700).resize(size, Image.Resampling.LANCZOS)
    off = np.abs(pixels_of(encode(original, "PNG")) - area(np.asarray(original).astype(float), SIZE))
    assert off.mean() <= mean
    assert off.max() <= largest
    assert RESIZE_RULE == "stretch_area"


def test_alpha_is_composited_before_it_is_averaged() -> None:
    """Left transparent red and right opaque blue: averaged straight, red would bleed into the edge."""
    image = Image.new("RGBA", (640, 480), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (325, 0, 640, 480))
    edge = pixels_of(encode(image, "PNG"))[0, 32]
    np.testing.assert_allclose(edge, (127.5, 127.5, 255), atol=1)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1366, 768), (1001, 777)])
def test_scaled_jpeg_decode_is_near_the_full_one(size: tuple[int, int], progressive: bool) -> None:
    original = page(*size)
    data = encode(original, "JPEG", quality=92, progressive=progressive)
    off = np.abs(pixels_of(data) - reference(data))
    assert off.mean() < 1.0
    assert np.percentile(off, 99) < 12
    started = time.thread_time()
    pixels_of(data)
    scaled = time.thread_time() - started
    started = time.thread_time()
    Image.open(io.BytesIO(data)).load()
    # Only a check that scaling happens at all; loose, since the machine is shared.
    assert scaled < 1.5 * (time.thread_time() - started) + 0.01


# --- failures -------------------------------------------------------------------------------------------------------

SVG = b'<?xml version="1.0"?>\n<!-- logo -->\n<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>'
Q = QuarantineCode


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Q.EMPTY),
        (b"this is a text that somebody named page.png\n", Q.NOT_AN_IMAGE),
        (b"BMW sells cars, and this text begins like a bitmap would", Q.NOT_AN_IMAGE),
        (b"BM", Q.NOT_AN_IMAGE),
        (b"<!DOCTYPE html><html><body><svg></svg></body></html>", Q.NOT_AN_IMAGE),
        (b"<?xml version='1.0'?><feed>", Q.NOT_AN_IMAGE),
        (b"RIFF\x24\0\0\0WAVEfmt ", Q.NOT_AN_IMAGE),
        (bytes(1000), Q.NOT_AN_IMAGE),
        (b"\0\0\0\x18ftypmp42", Q.NOT_AN_IMAGE),
        (b"\0\0\0\x1cftypavif\0\0\0\0", Q.TRUNCATED),
        (b"%PDF-1.7\n", Q.UNSUPPORTED_FORMAT),
        (b"8BPS\0\1", Q.UNSUPPORTED_FORMAT),
        (SVG, Q.UNSUPPORTED_FORMAT),
        (b"\xef\xbb\xbf \n<svg>", Q.UNSUPPORTED_FORMAT),
        (encode(PAGE, "ICO"), Q.UNSUPPORTED_FORMAT),
        (b"\x89PNG\n\x1a\n" + encode(PAGE, "PNG")[8:], Q.DECODE_ERROR),
        (b"\x89PNG\r\n", Q.TRUNCATED),
        (b"\xff\xd8\xff", Q.TRUNCATED),
        (b"\xff\xd8\xff\xd9", Q.DECODE_ERROR),
        (b"GIF89a\1\0\1\0\0\0\0;", Q.DECODE_ERROR),
    ],
)
def test_failures_by_content(data: bytes, code: QuarantineCode) -> None:
    assert failure(data).code == code


@pytest.mark.parametrize("name", [n for n in GOLDEN if n != "gif animated"])
def test_cut_files_are_never_scored(name: str) -> None:
    data = GOLDEN[name][0]
    for tenth in range(1, 10):
        assert failure(data[: len(data) * tenth // 10]).code == Q.TRUNCATED, tenth
    if not name.startswith("gif"):  # a GIF without its trailer has all its pixels
        # The last bytes of a BMP are the padding of a row, up to 3.
        for missing in (4,) if name.startswith("bmp") else (1, 2, 3):
            assert failure(data[:-missing]).code == Q.TRUNCATED


def test_png_data_that_ends_early_in_good_order() -> None:
    """A correct zlib stream with too few rows: Pillow alone returns the half as an image without an error."""
    rows = np.asarray(PAGE).reshape(110, -1)
    short = b"".join(b"\0" + row.tobytes() for row in rows[:60])
    half = png(rows, 8, 2, data=zlib.compress(short))
    Image.open(io.BytesIO(half)).load()
    assert failure(half).code == Q.TRUNCATED
    for missing in (1, 150 * 3 + 1):
        whole = b"".join(b"\0" + row.tobytes() for row in rows)
        assert failure(png(rows, 8, 2, data=zlib.compress(whole[:-missing]))).code == Q.TRUNCATED
    woven = png(np.asarray(PAGE), 8, 2, interlace=True)
    (length,) = struct.unpack_from(">I", woven, 33)
    passes = zlib.decompress(woven[41 : 41 + length])[: -55 * 451]  # without the last of the seven
    assert failure(png(np.asarray(PAGE), 8, 2, interlace=True, data=zlib.compress(passes))).code == Q.TRUNCATED
    # A page whose last row has the very colour that marks unwritten rows is whole all the same.
    unlucky = np.full((110, 450), 0, np.uint8)
    unlucky[-1] = np.tile([91, 17, 203], 150)
    pixels_of(png(unlucky, 8, 2))


@pytest.mark.parametrize("kind", ALLOWED_FORMATS)
def test_random_bytes_behind_a_header_are_no_image(kind: str) -> None:
    data = encode(PAGE if kind != "GIF" else PALETTE, kind)
    noise = random.Random(1)
    for keep in (40, 60, 200):
        result = decode(data[:keep] + noise.randbytes(3000), SIZE, CAPS)
        if kind in ("PNG", "JPEG"):  # any bytes are pixels of a BMP, codes of a GIF and arithmetic of a WebP
            assert isinstance(result, RowFailure), keep


def test_damaged_png_data_is_found_by_its_checksum() -> None:
    data = bytearray(GOLDEN["png rgb"][0])
    data[-13] ^= 1  # the checksum of IDAT itself, since inflate finds most other damage
    assert failure(bytes(data)) == RowFailure(Q.DECODE_ERROR, "PNG checksum of IDAT is wrong")


def test_caps_are_checked_before_pixels() -> None:
    bomb = png(np.zeros((1, 3), np.uint8), 8, 2)
    row = zlib.compressobj()
    data = row.compress(bytes(20_000 * 3 + 1)) + b"".join(row.compress(bytes(20_000 * 3 + 1)) for _ in range(400))
    data += row.flush()
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", data) + chunk(b"IEND", b"")
    tracemalloc.start()
    started = time.perf_counter()
    result = failure(bomb)
    took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result == RowFailure(Q.TOO_LARGE, "20000x20000 pixels, allowed are 64000000")
    assert took < 0.05
    assert peak < 2_000_000
    for name in ("png rgb", "jpeg", "webp lossy", "webp alpha", "bmp rgb", "gif"):
        data = GOLDEN[name][0]
        assert failure(data, ImageCaps(max_pixels=150 * 110 - 1)).code == Q.TOO_LARGE
        assert failure(data, ImageCaps(max_bytes=len(data) - 1)).code == Q.TOO_LARGE
        assert isinstance(decode(data, SIZE, ImageCaps(150 * 110, len(data))), DecodedImage)


def test_caps_above_pillows_own_are_ours_alone() -> None:
    """100 MP is above Pillow's warning and 200 MP above its error limit; neither is asked."""
    grey = Image.new("1", (20_000, 10_000), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = decode(encode(grey, "PNG"), SIZE, ImageCaps(max_pixels=200_000_000))
    assert isinstance(result, DecodedImage)
    assert np.all(result.pixels == 255)


def test_one_pixel_high_or_wide() -> None:
    for size in ((1, 100_000), (100_000, 1)):
        assert np.all(pixels_of(encode(Image.new("RGB", size, (1, 2, 3)), "PNG")) == (1, 2, 3))
    assert failure(encode(Image.new("L", (1, 60_000)), "JPEG"), ImageCaps(max_pixels=59_999)).code == Q.TOO_LARGE


def test_metadata_never_costs_or_decides() -> None:
    """Text bombs, garbage ICC and EXIF, broken APNG control: Pillow fails, warns or swells on each; we score."""
    plain, bomb = GOLDEN["png rgb"][0], zlib.compress(bytes(50_000_000), 9)
    extras = [
        chunk(b"zTXt", b"k\0\0" + bomb), chunk(b"iTXt", b"k\0\1\0\0\0" + bomb), chunk(b"iCCP", b"p\0\0" + bomb),
        chunk(b"iCCP", b"p\0\7junk"), chunk(b"tEXt", b"k\0" + bytes(2_000_000)),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        chunk(b"acTL", bytes(8)), chunk(b"fcTL", bytes(26)), chunk(b"eXIf", b"junk"),
    ]  # fmt: skip
    wanted = pixels_of(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for extra in extras:
            tracemalloc.start()
            assert np.array_equal(pixels_of(plain[:33] + extra + plain[33:]), wanted)
            assert tracemalloc.get_traced_memory()[1] < 4 * len(extra) + 2_000_000
            tracemalloc.stop()
        jpeg = GOLDEN["jpeg"][0]
        for tag in (b"\xe1", b"\xe2", b"\xed", b"\xfe"):
            for body in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"ICC_PROFILE\0\1\xff" + bytes(50), b"MPF\0junk", b""):
                segment = b"\xff" + tag + struct.pack(">H", len(body) + 2) + body
                assert np.array_equal(pixels_of(jpeg[:2] + segment + jpeg[2:]), pixels_of(jpeg))
        assert np.array_equal(pixels_of(jpeg + b"PK\3\4 an archive behind the picture \xff\xd9"), pixels_of(jpeg))


def test_work_without_pixels_is_bounded() -> None:
    """Empty chunks, empty GIF blocks and empty JPEG scans by the million would hold a thread for minutes."""
    plain, jpeg, gif = (GOLDEN[n][0] for n in ("png rgb", "jpeg progressive", "gif"))
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    frame = gif.index(b",", 13 + (3 << (gif[10] & 7) + 1))
    bombs = [
        plain[:33] + chunk(b"abCd", b"") * 100_000 + plain[33:],
        jpeg[:-2] + scan * 200 + jpeg[-2:],
        jpeg[:2] + b"\xff\xfe\0\2" * 100_000 + jpeg[2:],
        gif[:frame] + b"!\xfe" + b"\1a" * 100_000 + b"\0" + gif[frame:],
    ]
    started = time.thread_time()
    assert [failure(b).code for b in bombs] == [Q.DECODE_ERROR, Q.TOO_LARGE, Q.DECODE_ERROR, Q.DECODE_ERROR]
    assert time.thread_time() - started < 2
    rle = bytearray(encode(PAGE.convert("L"), "BMP"))
    rle[30] = 1
    assert failure(bytes(rle)).code == Q.UNSUPPORTED_FORMAT


def test_memory_error_is_a_row_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in (
        (MemoryError(), Q.TOO_LARGE),
        (OSError("<_io.BytesIO object at 0x7f12ab34cd>\nx"), Q.DECODE_ERROR),
    ):

        def refuse(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("cnn_ray.images._png", refuse)
        result = failure(GOLDEN["png rgb"][0])
        assert result.code == code
        assert not re.search(r"0x|\n", result.detail)


def test_no_mutation_raises_or_warns() -> None:
    """2,000 seeded mutations over all formats: always an image of the right form or a failure, and twice the same."""
    tiny = page().resize((24, 20))
    small = [tiny, with_alpha(tiny), tiny.quantize(8)]
    seeds = [encode(i, k) for i in small for k in ALLOWED_FORMATS if not (k == "JPEG" and i.mode != "RGB")]
    seeds += [encode(small[0], "JPEG", progressive=True), encode(small[1], "WEBP", lossless=True)]
    seeds += [encode(small[0].convert("CMYK"), "JPEG"), encode(small[2], "PNG", transparency=1)]
    chance, seen = random.Random(7), set()
    started = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.choice((1, 1, 2, 8))):
                at = chance.randrange(len(data))
                match chance.randrange(4):
                    case 0:
                        data[at] = chance.randrange(256)
                    case 1:
                        del data[at : at + chance.randrange(1, 20)]
                    case 2:
                        data[at:at] = chance.randbytes(chance.randrange(1, 20))
                    case _:
                        data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
                data = data or bytearray(b"x")
            if data.startswith(b"\x89PNG") and chance.random() < 0.7:  # checksums stop most mutants: mend them
                data = bytearray(_mended(bytes(data)))
            result = decode(bytes(data), (8, 8), CAPS)
            if isinstance(result, DecodedImage):
                assert result.pixels.shape == (8, 8, 3)
                again = decode(bytes(data), (8, 8), CAPS)
                assert isinstance(again, DecodedImage)
                assert np.array_equal(again.pixels, result.pixels)
                seen.add("image")
            else:
                assert result == decode(bytes(data), (8, 8), CAPS)
                assert len(result.detail) < 200
                assert result.detail.isprintable()
                seen.add(result.code)
    assert {"image", Q.TRUNCATED, Q.DECODE_ERROR, Q.TOO_LARGE, Q.NOT_AN_IMAGE} <= seen
    assert time.thread_time() - started < 5


def _mended(data: bytes) -> bytes:
    out, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        out.append(chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(out) + data[at:]


def test_threads_give_equal_bytes() -> None:
    files = [data for data, _ in GOLDEN.values()] * 4
    alone = [pixels_of(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(pixels_of, files))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# --- hostile corpus, fast paths --------------------------------------------------------------------------------------

CORPUS = hostile_corpus(3)


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_file_ends_as_expected(name: str) -> None:
    data, code = CORPUS[name]
    if code is None:
        pixels_of(data)
    else:
        assert failure(data).code == code


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.startswith(("png", "jpeg"))])
def test_fast_path_gives_the_pixels_of_the_slow_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libdeflate and simplejpeg against Pillow alone, scaled JPEG decode included; both must have been taken."""
    data, _ = GOLDEN[name]
    fast = [pixels_of(data), pixels_of(data, (12, 16))]
    source = image_files.read(data)
    taken = image_files.png_stored(source) if name.startswith("png") else images._jpeg(source, SIZE)
    assert (taken is None) == (name == "jpeg cmyk")
    monkeypatch.setattr(image_files, "png_stored", lambda _: None)
    monkeypatch.setattr(images, "_jpeg", lambda *_: None)
    for one, size in zip(fast, (SIZE, (12, 16)), strict=True):
        assert np.array_equal(one, pixels_of(data, size))


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_cut_and_closed_again_is_truncated(progressive: bool) -> None:
    """libjpeg fills what is missing with grey and only warns; Pillow does not pass that on."""
    data = encode(PAGE, "JPEG", progressive=progressive)
    for missing in (20, 200, 1000):
        closed = data[:-missing].rstrip(b"\xff") + b"\xff\xd9"
        Image.open(io.BytesIO(closed)).load()
        assert failure(closed).code == Q.TRUNCATED


def lossless_jpeg(width: int, height: int, marker: int = 0xC3) -> bytes:
    """A grey lossless JPEG whose pixels are all 128: each difference is 0, whose only code is one zero bit."""

    def segment(kind: int, body: bytes) -> bytes:
        return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body

    return (
        b"\xff\xd8"
        + segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
        + segment(marker, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
        + segment(0xDA, b"\1\1\0\1\0\0")
        + bytes((width * height + 7) // 8)
        + b"\xff\xd9"
    )


JPEG_PROCESSES = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xDE), "hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA, 0xCD, 0xCE), "JPEG with arithmetic codes"),
    0xF7: "JPEG-LS",
}


@pytest.mark.parametrize("size", [(16, 16), (150, 150), (640, 360), (4000, 3000)])
@pytest.mark.parametrize("marker", JPEG_PROCESSES)
def test_a_jpeg_process_that_the_decoder_lacks_is_refused_by_its_header(marker, size):
    refused = failure(lossless_jpeg(*size, marker))
    assert (refused.code, JPEG_PROCESSES[marker] in refused.detail) == (Q.UNSUPPORTED_FORMAT, True), refused


def test_a_second_frame_header_between_scans_is_refused():
    baseline = encode(PAGE, "JPEG")
    lossless = lossless_jpeg(640, 360)
    assert failure(baseline[:-2] + lossless[2:]).code == Q.DECODE_ERROR


@pytest.mark.parametrize(("components", "depth"), [(2, 8), (5, 8), (0, 8), (3, 12), (1, 16)])
def test_a_jpeg_with_odd_components_or_depth_is_unsupported(components, depth):
    frame = struct.pack(">BHHB", depth, 8, 8, components) + b"".join(bytes([k, 0x11, 0]) for k in range(components))
    header = b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame
    assert failure(header + lossless_jpeg(8, 8)[2:]).code == Q.UNSUPPORTED_FORMAT


def boxes(*brands: bytes) -> bytes:
    body = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + bytes(64)


NAMED = {
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "JPEG XL": b"\xff\x0a" + bytes(20),
    "JPEG XR": b"II\xbc\1" + bytes(20),
    "HEIC": boxes(b"heic", b"mif1", b"heic"),
    "HEIC burst": boxes(b"hevc", b"msf1", b"hevc"),
    "HEIC by a compatible brand": boxes(b"mif1", b"mif1", b"heix"),
    "HEIF": boxes(b"mif1", b"mif1"),
    "PPM": b"P6\n2 2\n255\n" + bytes(12),
    "PGM": b"P5 2 2 255\n" + bytes(4),
    "PBM": b"P1\n# drawn\n2 2\n0 1 1 0\n",
    "PAM": b"P7\nWIDTH 2\n",
    "PCX": b"\n\5\1\x08" + bytes(124),
    "TGA": b"\0\0\2" + bytes(9) + struct.pack("<HHBB", 4, 4, 24, 0) + bytes(48),
    "TGA by its footer": bytes(30) + b"\0\0\0\0\0\0\0\0TRUEVISION-XFILE.\0",
    "Apple's CgBI PNG": b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI\x50\0\x20\2" + bytes(40),
    "BigTIFF": b"MM\0+" + bytes(20),
    "SVG": b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "QOI": b"qoif" + bytes(20),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_known_format_that_is_not_read_has_its_name(name):
    refused = failure(NAMED[name])
    assert refused.code == Q.UNSUPPORTED_FORMAT
    assert refused.detail.startswith(name.split(" b")[0]), refused.detail


NO_IMAGES = {
    "an HTML page": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "JSON": b'{"error": "gone"}',
    "XML": b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
    "gzip data": b"\x1f\x8b\x08" + bytes(20),
    "a ZIP archive": b"PK\3\4" + bytes(20),
    "a video": boxes(b"isom", b"mp42"),
    "a macOS AppleDouble file": b"\0\5\026\7\0\2\0\0Mac OS X        ",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "no image format": b"hello\n",
    "no image format begins like this": bytes(100),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_bytes_that_are_no_image_are_named_where_that_helps(name):
    refused = failure(NO_IMAGES[name])
    assert refused.code == Q.NOT_AN_IMAGE
    assert refused.detail.startswith(name), refused.detail
