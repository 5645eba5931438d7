"""Encoded bytes -> uint8 RGB of the model's input size, or the reason why not. All bytes are taken as an attacker's.

`cnn_ray.image_files` walks each file first, and only the parts that make pixels come here: text, ICC, EXIF, APNG and
comments cost neither memory nor a warning. Pillow's global limits are not asked: `ImageCaps` alone decides.

CPU ms per image by kind, against Pillow and OpenCV alone: `tests/bench/decode.py`. PNG is inflated by libdeflate, its
filters undone by OpenCV or Pillow; JPEG is libjpeg-turbo's; OpenCV does what shrinks. All give equal pixels, by test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from PIL import AvifImagePlugin, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cnn_ray import image_files
from cnn_ray.image_formats import ALLOWED_FORMATS, ImageFile, RefusedError
from cnn_ray.records import QuarantineCode, RowFailure

__all__ = ["ALLOWED_FORMATS", "RESIZE_RULE", "DecodedImage", "ImageCaps", "decode", "warm_up"]

RESIZE_RULE = "stretch_area"
"""Stretched to the model's size, no letterbox; each output pixel is the mean of the area it covers."""

_HALVE_FROM = 3  # source pixels per output pixel on both axes from which halving first is near enough
_SENTINEL = {"RGB": (91, 17, 203), "RGBA": (91, 17, 203, 171), "LA": (91, 171), "I;16": 23_456}
# The plugins themselves, not Image.open: no other format is tried, no MPO is adopted, no global limit or warning asked.
_PLUGINS = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
# EXIF orientation -> transpose first, then flip rows, then flip columns
TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True, slots=True)
class ImageCaps:
    """What one image may cost; both are checked before any pixel is decoded."""

    max_pixels: int = 64_000_000
    """Product of the header's width and height."""
    max_bytes: int = 64 * 1024**2
    """Encoded bytes."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One image as the model takes it: `pixels` is uint8 [H, W, 3] RGB, C-contiguous. The size is the original's,
    after EXIF orientation."""

    pixels: np.ndarray
    width_px: int
    height_px: int


def decode(data: bytes, size_px: tuple[int, int], caps: ImageCaps) -> DecodedImage | RowFailure:
    """Pixels of `size_px` (height, width), or the failure that quarantines the row. Safe in threads; same bytes, same
    answer. Alpha is composited on white, EXIF orientation applied, GIF, WebP, AVIF and APNG give
    their first frame, TIFF its first page.

    A file without its end (PNG IEND, JPEG EOI, WebP's RIFF size) is `truncated` even where all pixels are there. So
    is a JPEG scan that was cut and closed again, unless it is CMYK or has stray bytes before the cut. What nobody can
    tell stays: any bytes are pixels of a BMP, and a GIF whose data says "end" early is drawn as far as it goes.
    """
    # Pillow's wording is for people; the code is what counts. Nothing may leave here, whatever the bytes.
    try:
        return _decode(data, size_px, caps)
    except RefusedError as refused:
        return RowFailure(refused.code, _tidy(str(refused)))
    except (MemoryError, Image.DecompressionBombError):
        return RowFailure(QuarantineCode.TOO_LARGE, "not enough memory for the decoder")
    except Exception as error:  # noqa: BLE001 - codecs raise anything on hostile bytes, and one file must not end a night
        text = _tidy(f"{type(error).__name__}: {error}")
        if "truncated" in text.lower():
            return RowFailure(QuarantineCode.TRUNCATED, text)
        if "nsupported" in text or "cannot handle" in text:
            return RowFailure(QuarantineCode.UNSUPPORTED_FORMAT, text)
        return RowFailure(QuarantineCode.DECODE_ERROR, text)


def _decode(data: bytes, size_px: tuple[int, int], caps: ImageCaps) -> DecodedImage:
    if not data:
        raise RefusedError(QuarantineCode.EMPTY, "0 bytes")
    if len(data) > caps.max_bytes:
        raise RefusedError(QuarantineCode.TOO_LARGE, f"{len(data)} bytes, allowed are {caps.max_bytes}")
    source = image_files.read(data)
    width, height = source.width, source.height
    if width <= 0 or height <= 0:
        raise RefusedError(QuarantineCode.DECODE_ERROR, f"{source.format} of {width}x{height} pixels")
    if width * height > caps.max_pixels:
        raise RefusedError(QuarantineCode.TOO_LARGE, f"{width}x{height} pixels, allowed are {caps.max_pixels}")
    swap, flip_rows, flip_columns = TURNS[source.orientation]
    target = (size_px[1], size_px[0]) if swap else size_px
    # Turning the small result is the same as turning the large original, and far cheaper.
    pixels = _jpeg(source, target) if source.format == "JPEG" else None
    # Pillow inflates row by row; libdeflate all at once takes a fraction of that and proves that no row is missing.
    stored = image_files.png_stored(source) if source.format == "PNG" else None
    if stored is not None:
        pixels = _png(source, stored, target)
    if pixels is None:
        pixels = _by_pillow(source, stored, target)
    if swap:
        pixels, width, height = pixels.transpose(1, 0, 2), height, width
    pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return DecodedImage(np.ascontiguousarray(pixels), width, height)


def _jpeg(source: ImageFile, target: tuple[int, int]) -> np.ndarray | None:
    """uint8 [H, W, 3] of `target` (height, width); None for what is left to Pillow: CMYK, rare sampling, odd bytes.

    Half the time of Pillow, and libjpeg's warnings are told: a scan that was cut and closed again with an EOI is
    `truncated` and not half an image. The warning of the first kind counts; behind stray bytes a cut goes unseen.

    Raises: RefusedError (truncated).
    """
    if source.components not in (1, 3):
        return None
    scale = _jpeg_scale(source, target)
    least = (-(-source.height // scale), -(-source.width // scale)) if scale > 1 else (0, 0)
    colours = "GRAY" if source.components == 1 else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(source.clean, colours, min_height=least[0], min_width=least[1], min_factor=1)
    except ValueError as error:
        if "premature end" in str(error):
            raise RefusedError(QuarantineCode.TRUNCATED, "JPEG data has fewer blocks than its header") from None
        return None
    if pixels.shape[:2] != (-(-source.height // scale), -(-source.width // scale)):
        return None
    return _resize(pixels, target, (source.width / scale, source.height / scale))


def _jpeg_scale(source: ImageFile, target: tuple[int, int]) -> int:
    """1, 2, 4 or 8: by what libjpeg may shrink while decoding, so that 1.5 of its pixels are left per output pixel.

    Nearer to 1 a 150x110 text was up to 76 levels off.
    """
    ratio = min(source.height // max(target[0] * 3 // 2, 1), source.width // max(target[1] * 3 // 2, 1))
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(ratio, 1))


def _png(source: ImageFile, stored: bytes, target: tuple[int, int]) -> np.ndarray | None:
    """uint8 [H, W, 3] of `target` (height, width); None for what is left to Pillow: all but opaque 8-bit RGB(A).

    OpenCV gives packed pixels, where Pillow has four bytes each that numpy must copy. It gives half an image for a
    file that is cut, so it only sees files whose rows were counted.
    """
    if source.interlaced or image_files.png_kind(source) not in ((8, 2, False), (8, 6, False)):
        return None
    cv2 = _opencv()
    pixels = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[:2] != (source.height, source.width) or pixels.dtype != np.uint8:
        return None
    if pixels.shape[2] == 4 and not _flattened(pixels):
        return None
    # The colours change places after the resize, which treats them alike.
    return np.ascontiguousarray(_resize(pixels[..., :3], target, (source.width, source.height))[..., ::-1])


def _flattened(pixels: np.ndarray) -> bool:
    """Whether the colours of uint8 [H, W, 4] are composited on white now; False, and nothing done, where too many
    pixels are transparent for numpy to be quicker than Pillow. The arithmetic is Pillow's."""
    clear = pixels[..., 3] < 255
    count = np.count_nonzero(clear)
    if count * 8 > clear.size:
        return False
    if count:
        some = pixels[clear].astype(np.uint32)
        alpha = some[:, 3:]
        total = some[:, :3] * alpha + 255 * (255 - alpha) + 128
        some[:, :3] = ((total >> 8) + total) >> 8
        pixels[clear] = some
    return True


def _by_pillow(source: ImageFile, stored: bytes | None, target: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of `target` (height, width)."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the processes are as many as the cores
    with _PLUGINS[source.format](BytesIO(stored or source.clean)) as image:
        if image.size != (source.width, source.height):
            raise RefusedError(QuarantineCode.DECODE_ERROR, f"{source.format} header gives two sizes")
        if stored:
            image.load()
            box = image.size
        else:
            box = _load(image, source, target)
        return _resize(np.asarray(_flatten(image, source)), target, box)


def _load(image: Image.Image, source: ImageFile, target: tuple[int, int]) -> tuple[float, float]:
    """Width and height of the picture in the loaded image's own pixels (fractions after a scaled JPEG decode)."""
    if isinstance(image, JpegImageFile):
        # libjpeg may shrink by 2, 4 or 8 while decoding, if 1.5 of its pixels are left per output pixel: nearer to 1 a
        # 150x110 text was up to 76 levels off.
        draft = image.draft(None, (target[1] * 3 // 2, target[0] * 3 // 2))
        image.load()
        return draft[1][2:] if draft else image.size
    if isinstance(image, TiffImageFile):
        image.im = Image.new(image.mode, image.size).im  # else Pillow's global limit on pixels is asked
    if source.format != "PNG":
        image.load()
        return image.size
    # A PNG stream that ends early in good order is no error to Pillow, so the last row gets a colour to overwrite.
    # Only where it is still there (or rows come interlaced) the stream is inflated again and counted.
    canvas = Image.new(image.mode, image.size, None)
    last_row = (0, source.height - 1, source.width, source.height)
    canvas.paste(_SENTINEL.get(image.mode, 171), last_row)
    before = canvas.crop(last_row).tobytes()
    image.im = canvas.im
    image.load()
    if (source.interlaced or image.crop(last_row).tobytes() == before) and not image_files.png_is_full(source):
        raise RefusedError(QuarantineCode.TRUNCATED, "PNG data has fewer rows than its header")
    return image.size


def _flatten(image: Image.Image, source: ImageFile) -> Image.Image:
    """The image as L or RGB, transparency composited on white."""
    if image.mode in ("I;16", "I;16B"):  # Pillow's own conversion clips
        wide = np.asarray(image).astype(np.uint32)
        key = image.info.get("transparency")
        hole = wide == key if key is not None else None
        wide *= 255
        wide += 32_895
        wide >>= 16  # v / 257, rounded, for all 65536 values
        if hole is not None:
            wide[hole] = 255
        return Image.fromarray(wide.astype(np.uint8))
    whole = (0, 0, *image.size)
    drawn = source.drawn or whole
    if "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        low, high = alpha.getextrema()
        # Most screenshots with alpha are opaque. A BMP whose alpha is 0 everywhere has none: browsers agree.
        if low == 255 or (high == 0 and source.format == "BMP"):
            image = image.convert("L" if image.mode == "LA" else "RGB")
        else:
            canvas = Image.new("RGB", image.size, (255, 255, 255))
            canvas.paste(image.convert("RGB"), mask=alpha)
            image = canvas
    if image.mode not in ("L", "RGB"):  # convert() would copy these
        image = image.convert("L" if image.mode == "1" else "RGB")
    if drawn != whole:  # a GIF frame smaller than its screen
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image.crop(drawn).convert("RGB"), drawn)
        return canvas
    return image


def _resize(pixels: np.ndarray, target: tuple[int, int], box: tuple[float, float]) -> np.ndarray:
    """uint8 [H, W, 3] of `target` (height, width) from the `box` (width, height) of uint8 [H, W] or [H, W, C].

    Two steps: halves while there are three or more pixels per output pixel, at a tenth of the cost of anything else,
    then the exact mean of areas. Halving blurs the borders of areas: real 1366x768 pages are 0.8 levels off on average,
    single pixels of text up to 40. What must grow, or ends with a fraction of a pixel, is averaged in numpy.
    """
    height, width = target
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    rows, columns = pixels.shape[:2]
    fewer_rows, fewer_columns = height <= rows == box[1], width <= columns == box[0]
    if fewer_rows and fewer_columns:
        pixels = _shrink(pixels, target)
    else:
        if (fewer_rows and height < rows) or (fewer_columns and width < columns):
            size = (width if fewer_columns else columns, height if fewer_rows else rows)
            shape = (size[1], size[0], pixels.shape[2])
            pixels = _opencv().resize(pixels.astype(np.float32), size, interpolation=_opencv().INTER_AREA)
            pixels, box = (
                pixels.reshape(shape),
                (size[0] if fewer_columns else box[0], size[1] if fewer_rows else box[1]),
            )
        pixels = _mean_axis(_mean_axis(pixels, 0, box[1], height), 1, box[0], width)
        if pixels.dtype != np.uint8:
            pixels = (pixels + np.float32(0.5)).astype(np.uint8)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _shrink(pixels: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    cv2 = _opencv()
    height, width = target
    rows, columns, channels = pixels.shape
    while rows % 2 == columns % 2 == 0 and rows >= _HALVE_FROM * height and columns >= _HALVE_FROM * width:
        rows, columns = rows // 2, columns // 2
        pixels = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA)
    if (rows, columns) != target:
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return pixels.reshape(height, width, channels)


@lru_cache(maxsize=1)
def _opencv() -> Any:
    """OpenCV, with one thread a call: the processes are as many as the cores."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def warm_up() -> None:
    """Everything that decoding imports late is there."""
    _opencv()


def _mean_axis(pixels: np.ndarray, axis: int, extent: float, count: int) -> np.ndarray:
    """[H, W, C] with `axis` averaged to `count` cells; float32 unless nothing had to be done."""
    if extent == count == pixels.shape[axis]:
        return pixels
    index, weight = _taps(pixels.shape[axis], extent, count)
    shape = [1, 1, 1]
    shape[axis] = count
    total = pixels.take(index[0], axis) * weight[0].reshape(shape)
    for i, w in zip(index[1:], weight[1:], strict=True):
        total += pixels.take(i, axis) * w.reshape(shape)
    return total


@lru_cache(maxsize=64)
def _taps(source: int, extent: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel numbers int [K, count] and their weights float32 [K, count], columns of sum 1. Cached: a night has few
    sizes."""
    edges = np.arange(count + 1) * (extent / count)
    first = np.minimum(edges[:-1].astype(np.int64), source - 1)
    taps = int((np.ceil(edges[1:] - 1e-9).astype(np.int64) - first).max())
    index = first + np.arange(max(taps, 1))[:, np.newaxis]
    weight = np.maximum(np.minimum(index + 1, edges[1:]) - np.maximum(index, edges[:-1]), 0)
    return np.minimum(index, source - 1), (weight / weight.sum(axis=0)).astype(np.float32)


def _tidy(text: str) -> str:
    """One short line, the same on every run: no addresses, no control characters."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{6,}", "<object>", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:160]
