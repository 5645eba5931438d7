"""The format of a file, from its first bytes: what is read, what is known but not read, and what is no image."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from cnn_ray.records import QuarantineCode

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")

_KNOWN = (
    (b"II+\0", "BigTIFF"), (b"MM\0+", "BigTIFF"), (b"8BPS", "PSD"),
    (b"\0\0\1\0", "ICO"), (b"\0\0\2\0", "CUR"), (b"%PDF-", "PDF"), (b"%!PS", "EPS"), (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"DDS ", "DDS"), (b"icns", "ICNS"), (b"qoif", "QOI"), (b"#?RADIANCE", "HDR"),
    (b"#?RGBE", "HDR"), (b"\x76\x2f\x31\x01", "OpenEXR"), (b"\xd7\xcd\xc6\x9a", "WMF"), (b"\x8aMNG", "MNG"),
    (b"\x8bJNG", "JNG"), (b"gimp xcf", "XCF"), (b"AT&TFORM", "DjVu"), (b"II\xbc\1", "JPEG XR"), (b"FLIF", "FLIF"),
    (b"BPG\xfb", "BPG"), (b"\x59\xa6\x6a\x95", "Sun Raster"), (b"\x01\xda\0", "SGI"), (b"\x01\xda\1", "SGI"),
    (b"farbfeld", "farbfeld"), (b"SIMPLE  =", "FITS"), (b"IIRO", "RAW photo"), (b"FUJIFILM", "RAW photo"),
    (b"\x01\0\0\0\x58\0\0\0", "EMF"), (b"\xabKTX ", "KTX"),
)  # fmt: skip
_NO_IMAGE = (
    (b"\x1f\x8b", "gzip data"), (b"PK\3\4", "a ZIP archive"), (b"PK\5\6", "a ZIP archive"), (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"), (b"\x28\xb5\x2f\xfd", "zstd data"), (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\7", "a RAR archive"), (b"\x1aE\xdf\xa3", "a WebM or Matroska video"), (b"OggS", "Ogg media"),
    (b"FLV\1", "a Flash video"), (b"ID3", "MP3 audio"), (b"MZ", "a Windows program"), (b"\x7fELF", "a Linux program"),
    (b"PAR1", "a Parquet file"), (b"SQLite format 3\0", "an SQLite database"),
    (b"version https://git-lfs", "a Git LFS pointer"), (b"\0\5\026\7\0\2\0\0", "a macOS AppleDouble file"),
    (b"\0\0\1\xba", "an MPEG video"), (b"\0\0\1\xb3", "an MPEG video"),
)  # fmt: skip
_BRANDS = (
    ((b"avif", b"avis"), "AVIF"),
    ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    ((b"crx ",), "RAW photo"),
    ((b"mif1", b"mif2", b"msf1", b"miaf"), "HEIF"),
)
"""Brands of ISO base media files (ISO/IEC 23008-12, the AV1 image format), the most telling first."""
_VIDEO_BRANDS = (b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  ", b"dash")
_SVG_START = re.compile(rb"(?:<\?xml|<!--|<!doctype\s+svg|<(?:\w+:)?svg[\s>/])", re.I)
_SVG = re.compile(rb"<(?:\w+:)?svg[\s>/]", re.I)
_HTML = re.compile(rb"<!doctype\s+html|<html|<head|<body|<script", re.I)
_NETPBM = re.compile(rb"P([1-7])(?:\s|#)")
_NETPBM_NAMES = {1: "PBM", 2: "PGM", 3: "PPM", 4: "PBM", 5: "PGM", 6: "PPM", 7: "PAM"}
_DIB_HEADERS = tuple(struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124))
_TGA_FOOTER = b"TRUEVISION-XFILE."
_TGA_COLOURS = {1: 1, 9: 1, 2: 0, 3: 0, 10: 0, 11: 0}
_TGA_DEPTHS = {1: (8, 16), 9: (8, 16), 2: (15, 16, 24, 32), 10: (15, 16, 24, 32), 3: (8, 16), 11: (8, 16)}


class RefusedError(Exception):
    """Bytes that will not be decoded. It never leaves `cnn_ray.images.decode`, which makes it a RowFailure."""

    def __init__(self, code: QuarantineCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class ImageFile:
    """What a walk found. `clean` is the file with nothing but its pixels; `drawn` (left, top, right, bottom) is the
    part of the canvas that has any; `rows_bytes` is what a PNG's data inflates to, and 0 elsewhere."""

    format: str
    clean: bytes
    width: int
    height: int
    orientation: int = 1
    drawn: tuple[int, int, int, int] | None = None
    rows_bytes: int = 0
    interlaced: bool = False
    components: int = 0
    """Of a JPEG: 1 grey, 3 colours, 4 inks."""


def corrupt(detail: str) -> RefusedError:
    """Return the refusal of bytes that contradict their format."""
    return RefusedError(QuarantineCode.DECODE_ERROR, detail)


def cut(detail: str) -> RefusedError:
    """Return the refusal of a file without its end."""
    return RefusedError(QuarantineCode.TRUNCATED, detail)


def unsupported(name: str) -> RefusedError:
    """Return the refusal of a format that is known and not read."""
    return RefusedError(QuarantineCode.UNSUPPORTED_FORMAT, f"{name}; allowed are {', '.join(ALLOWED_FORMATS)}")


def format_of(data: bytes) -> str:
    """Return the member of ALLOWED_FORMATS that the bytes begin like.

    Raises: RefusedError (unsupported_format with the format's name, or not_an_image).
    """
    head = data[:4096]
    if head.startswith(b"\x89PNG"):
        if head[12:16] == b"CgBI":
            raise unsupported("Apple's CgBI PNG")
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    # "BM" alone begins many a text: the length of the second header decides.
    if head[:2] == b"BM" and head[14:18] in _DIB_HEADERS:
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    name = _known(data, head)
    if name == "AVIF":
        return name
    if name is not None:
        raise unsupported(name)
    raise RefusedError(QuarantineCode.NOT_AN_IMAGE, _no_image(head))


def _known(data: bytes, head: bytes) -> str | None:
    """Return the name of an image format that is not read."""
    name = next((name for magic, name in _KNOWN if head.startswith(magic)), None)
    if name in ("ICO", "CUR") and head[4:6] == b"\0\0":
        name = None  # no pictures in it: a Targa may begin so
    if name is not None:
        return name
    if head[4:8] == b"ftyp":
        brands = _brands(head)
        return next((name for known, name in _BRANDS if brands & set(known)), None)
    netpbm = _NETPBM.match(head)
    if netpbm is not None:
        return _NETPBM_NAMES[int(netpbm[1])]
    if head[:1] == b"\n" and head[1:2] in b"\0\2\3\4\5" and head[2:3] == b"\1" and head[3:4] in b"\1\2\4\x08":
        return "PCX"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SVG_START.match(text) and _SVG.search(text) and not re.search(rb"<html", text, re.I):
        return "SVG"
    return "TGA" if _is_tga(data, head) else None


def _brands(head: bytes) -> set[bytes]:
    """Return the major and the compatible brands of an ISO base media file."""
    size = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[k : k + 4] for k in range(16, size - 3, 4))}


def _is_tga(data: bytes, head: bytes) -> bool:
    """Return whether the file is a Targa: by its footer, or by a header without a contradiction (it has no magic)."""
    if _TGA_FOOTER in data[-26:]:
        return True
    if len(head) < 18 or head[2] not in _TGA_COLOURS or head[1] != _TGA_COLOURS[head[2]]:
        return False
    width, height = struct.unpack_from("<HH", head, 12)
    plausible = 0 < width <= 16_384 and 0 < height <= 16_384 and head[16] in _TGA_DEPTHS[head[2]]
    if not plausible or head[17] & 0xC0 or (not head[1] and any(head[3:8])):
        return False
    stored = 18 + head[0] + width * height * ((head[16] + 7) // 8)
    return head[2] >= 9 or len(data) >= stored


def _no_image(head: bytes) -> str:
    """Return what bytes are that begin like no image, for the person who finds them in the quarantine."""
    name = next((name for magic, name in _NO_IMAGE if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        name = "a video" if _brands(head) & set(_VIDEO_BRANDS) or head[8:11] == b"3gp" else None
    elif head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WAVE"):
        name = "a video" if head[8:12] == b"AVI " else "audio"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if name is None and text[:1] == b"<":
        name = "an HTML page" if _HTML.search(text[:1024]) else "XML"
    elif name is None and text[:1] in (b"{", b"["):
        name = "JSON"
    return "no image format begins like this" if name is None else f"{name}, no image"
