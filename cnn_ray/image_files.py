"""Encoded bytes -> what `cnn_ray.images` may decode: format, size, orientation, and only the parts that make pixels.

A walk by hand over each format (TIFF and AVIF in modules of their own), because the decoder behind it should never see
text, ICC, EXIF, APNG frames or comments (all of them have been bombs), and because only the container tells a cut file
from a whole one.
Standard library and libdeflate. Specs: PNG (W3C), JPEG (ITU T.81), WebP (RFC 9649), GIF89a, EXIF 2.3.
"""

from __future__ import annotations

import functools
import re
import struct
import zlib

import deflate

from cnn_ray.avif_files import walk_avif
from cnn_ray.image_formats import ImageFile, RefusedError, corrupt, cut, format_of, unsupported
from cnn_ray.records import QuarantineCode
from cnn_ray.tiff_files import walk_tiff

_MAX_PARTS = 65_536  # chunks, segments or blocks: each costs a turn of a Python loop, under the GIL
_MAX_SCANS = 100  # libjpeg visits every block once per scan; encoders write about 10, an attacker a million
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MOST_STORED_BYTES = 48 * 1024**2
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.S)  # the others are stuffing, fill and restarts
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential and progressive, with Huffman codes
_JPEG_OTHERS = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xDE, 0xDF), "hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA, 0xCD, 0xCE), "JPEG with arithmetic codes"),
    0xC8: "JPEG with extensions",
    0xF7: "JPEG-LS",
}
"""Processes of ITU T.81 (and T.87) that the decoder does not fully support: libjpeg-turbo's scaled decode of a lossless
JPEG writes past the end of its buffer."""
_JPEG_TABLES = (0xC4, 0xCC, 0xDB, 0xDD)


def read(data: bytes) -> ImageFile:
    """The file's format, size and clean bytes, decided by content alone and before any pixel is decoded.

    Raises: RefusedError (not_an_image, unsupported_format, truncated, too_large, decode_error).
    """
    name = format_of(data)
    try:
        return _WALKS[name](data)
    except (IndexError, struct.error):  # the walk read past the end
        raise RefusedError(QuarantineCode.TRUNCATED, f"{name} ends too early") from None


def _walk_png(data: bytes) -> ImageFile:
    if not data.startswith(_PNG_MAGIC):
        raise corrupt("PNG signature is damaged") if len(data) >= 8 else cut("PNG ends inside its signature")
    view, position, orientation = memoryview(data), 8, 1
    parts: list[bytes | memoryview] = [_PNG_MAGIC]
    header = (0, 0, 0, 0, 0, 0, 0)  # as long as no IHDR was seen
    seen: set[bytes] = set()
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise cut(f"PNG ends inside its {kind.decode('ascii', 'replace')} chunk")
        if (kind == b"IHDR") == (b"IHDR" in seen):
            raise corrupt("PNG needs one IHDR, as its first chunk")
        body = view[position + 8 : end - 4]
        if kind in _PNG_PARTS:
            # Pillow leaves the checksums of IDAT alone; 0.1 ms here finds what the transport damaged.
            if zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
                raise corrupt(f"PNG checksum of {kind.decode()} is wrong")
            if kind == b"IHDR":
                header = struct.unpack(">IIBBBBB", body[:13])
            parts.append(_png_key(header, body) if kind == b"tRNS" else view[position:end])
        elif kind == b"eXIf":
            orientation = exif_orientation(bytes(body[:65_536]))
        seen.add(kind)
        position = end
        if kind == b"IEND":
            break
    else:
        raise corrupt(f"PNG has more than {_MAX_PARTS} chunks")
    width, height, depth, colour, _, _, interlace = header
    if b"IDAT" not in seen or (colour == 3 and b"PLTE" not in seen):
        raise corrupt("PNG has no image data or no palette")
    bits = depth * _PNG_CHANNELS.get(colour, 0)
    # Adam7: (first column, first row, column step, row step) of each pass
    grid = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [
        (-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in (grid if interlace else [(0, 0, 1, 1)])
    ]
    rows_bytes = sum(h * (1 + (w * bits + 7) // 8) for w, h in passes if w > 0 and h > 0)
    return ImageFile(
        "PNG", b"".join(parts), width, height, orientation, rows_bytes=rows_bytes, interlaced=bool(interlace)
    )


def _png_key(header: tuple[int, ...], body: memoryview) -> bytes:
    """A tRNS chunk whose grey or RGB key has the depth that Pillow decodes to: it compares the file's own number with
    scaled pixels (2- and 4-bit grey) or with their high bytes (16-bit RGB)."""
    raw, (depth, colour) = bytes(body), header[2:4]
    if colour in (0, 2) and (depth, colour) != (16, 0):
        most = (1 << depth) - 1
        numbers = struct.unpack_from(">3H" if colour == 2 else ">H", raw)
        raw = b"".join(struct.pack(">H", n >> 8 if depth == 16 else (n & most) * 255 // most) for n in numbers)
    return struct.pack(">I", len(raw)) + b"tRNS" + raw + struct.pack(">I", zlib.crc32(b"tRNS" + raw))


def png_is_full(image: ImageFile) -> bool:
    """Whether the PNG's data inflates to all its rows. Inflates once more, in pieces: for doubtful files only."""
    inflater, total, position = zlib.decompressobj(), 0, 8
    view = memoryview(image.clean)
    while position < len(view) and total < image.rows_bytes:
        length, kind = struct.unpack_from(">I4s", view, position)
        piece: bytes | memoryview = view[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        while piece and not inflater.eof and total < image.rows_bytes:
            total += len(inflater.decompress(piece, 1 << 20))
            piece = inflater.unconsumed_tail
        position += 12 + length
    return total >= image.rows_bytes


def png_stored(image: ImageFile) -> bytes | None:
    """The same PNG, its data inflated by libdeflate and complete, in stored blocks that cost a decoder nothing.

    None where it is not exactly as long as its rows, damaged, or so large that two copies are too many.
    """
    if not 0 < image.rows_bytes <= _MOST_STORED_BYTES:
        return None
    view, position = memoryview(image.clean), 8
    head: list[bytes | memoryview] = [view[:8]]
    data: list[memoryview] = []
    while position < len(view):
        length, kind = struct.unpack_from(">I4s", view, position)
        if kind == b"IDAT":
            data.append(view[position + 8 : position + 8 + length])
        elif kind != b"IEND":
            head.append(view[position : position + 12 + length])
        position += 12 + length
    deflated = b"".join(data)
    try:
        inflated = deflate.zlib_decompress(deflated, image.rows_bytes)  # pyright: ignore[reportUnknownMemberType]
    except (deflate.DeflateError, ValueError):
        return None
    if len(inflated) != image.rows_bytes:
        return None
    rows = memoryview(inflated)
    blocks: list[bytes | memoryview] = [b"\x78\x01"]
    for start in range(0, len(rows), 65_535):
        block = rows[start : start + 65_535]
        last = start + len(block) == len(rows)
        blocks += [struct.pack("<BHH", last, len(block), 65_535 - len(block)), block]
    # Six times as fast as zlib's.
    blocks.append(struct.pack(">I", deflate.adler32(inflated)))  # pyright: ignore[reportUnknownMemberType]
    length = sum(len(block) for block in blocks)
    crc = functools.reduce(lambda total, block: deflate.crc32(block, total), blocks, deflate.crc32(b"IDAT"))  # pyright: ignore[reportUnknownMemberType, reportUnknownLambdaType]
    return b"".join([*head, struct.pack(">I4s", length, b"IDAT"), *blocks, struct.pack(">I", crc), _PNG_END])


def png_kind(image: ImageFile) -> tuple[int, int, bool]:
    """Bit depth, colour type and whether there is a transparent colour, from a PNG's clean bytes."""
    return image.clean[24], image.clean[25], b"tRNS" in image.clean[: image.clean.index(b"IDAT")]


def _walk_jpeg(data: bytes) -> ImageFile:
    parts, size, orientation, position = [b"\xff\xd8"], (0, 0), 1, 2
    components = 0
    for _ in range(_MAX_PARTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise cut("JPEG ends before its first scan")
        start, marker = found.start(), data[found.start() + 1]
        if marker in (0xD8, 0xD9, 0x01):
            raise corrupt("JPEG has no scan")
        (length,) = struct.unpack_from(">H", data, start + 2)
        position = start + 2 + length
        if position > len(data):
            raise cut("JPEG ends before its first scan")
        body = data[start + 4 : position]
        if marker in _JPEG_FRAMES:
            if components:
                raise corrupt("JPEG has two frame headers")
            size, components = _jpeg_frame(body)
        elif marker in _JPEG_OTHERS:
            raise unsupported(_JPEG_OTHERS[marker])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = exif_orientation(body[6:])
        # JFIF and Adobe segments say how to read the colours; all others go.
        colours = (marker == 0xE0 and body.startswith(b"JFIF\0")) or (marker == 0xEE and body.startswith(b"Adobe"))
        if marker in _JPEG_FRAMES or marker in _JPEG_TABLES or colours:
            parts.append(data[start:position])
        if marker == 0xDA and not components:
            raise corrupt("JPEG has a scan before its frame header")
        if marker == 0xDA:
            parts.append(data[start : _jpeg_end(data, position)])
            return ImageFile("JPEG", b"".join(parts), size[1], size[0], orientation, components=components)
    raise corrupt(f"JPEG has more than {_MAX_PARTS} segments")


def _jpeg_frame(body: bytes) -> tuple[tuple[int, int], int]:
    """Return (height, width) and the number of components of a frame header that the decoder supports."""
    depth, height, width, components = struct.unpack_from(">BHHB", body)
    if depth != 8:
        raise unsupported(f"JPEG with {depth} bits a sample")
    if components not in (1, 3, 4):
        raise unsupported(f"JPEG with {components} components")
    if height == 0:
        raise unsupported("JPEG whose height follows its first scan (DNL)")
    factors = [body[7 + 3 * k] for k in range(components)]
    if any(not (1 <= factor >> 4 <= 4 and 1 <= factor & 15 <= 4) for factor in factors):
        raise corrupt("JPEG has sampling factors outside of 1 to 4")
    return (height, width), components


def _jpeg_end(data: bytes, position: int) -> int:
    """Where the EOI of the scan at `position` ends: what follows it (previews, videos, archives) is not the image."""
    scans = 1
    for _ in range(_MAX_PARTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise cut("JPEG has no end marker")
        position, marker = found.end(), found.group()[1]
        if marker == 0xD9:
            return position
        if marker in _JPEG_FRAMES or marker in _JPEG_OTHERS:
            raise corrupt("JPEG has a frame header between its scans")
        scans += marker == 0xDA
        if scans > _MAX_SCANS:
            raise RefusedError(QuarantineCode.TOO_LARGE, f"JPEG has more than {_MAX_SCANS} scans")
        if marker not in (0xD8, 0x01):
            if position + 2 > len(data):
                raise cut("JPEG has no end marker")
            position += struct.unpack_from(">H", data, position)[0]
    raise corrupt(f"JPEG has more than {_MAX_PARTS} segments")


def _walk_webp(data: bytes) -> ImageFile:
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    if riff_bytes + 8 > len(data):
        raise cut(f"WebP of {riff_bytes + 8} bytes ends after {len(data)}")
    kind, orientation = data[12:16], 1
    if kind == b"VP8 ":
        width, height = (n & 0x3FFF for n in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        wide, tall = (int.from_bytes(data[n : n + 3], "little") for n in (24, 27))
        width, height = wide + 1, tall + 1
        position, parts = 12, 0
        while position + 8 <= len(data) and parts < _MAX_PARTS and data[20] & 8:
            name, length = struct.unpack_from("<4sI", data, position)
            if name == b"EXIF":
                orientation = exif_orientation(data[position + 8 : position + 65_544].removeprefix(b"Exif\0\0"))
                break
            position, parts = position + 8 + length + (length & 1), parts + 1
    else:
        raise corrupt("WebP begins with an unknown chunk")
    return ImageFile("WEBP", data, width, height, orientation)


def _walk_bmp(data: bytes) -> ImageFile:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if 14 + header_bytes > len(data):
        raise cut("BMP ends inside its header")
    if header_bytes == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return ImageFile("BMP", data, width, height)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression not in (0, 3):
        # Pillow undoes run lengths pixel by pixel in Python: a minute under the GIL for 64 MP. Nobody writes them.
        raise unsupported(f"BMP with compression {compression}")
    return ImageFile("BMP", data, width, abs(height))


def _walk_gif(data: bytes) -> ImageFile:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    position, control, inside = start, b"", False
    for _ in range(_MAX_PARTS):
        if inside:  # the blocks of an extension; one of length 0 ends them
            inside = data[position] > 0
            position += data[position] + 1
        elif data[position] == 0x2C:
            break
        elif data[position] != 0x21:
            raise corrupt("GIF has no frame")
        else:
            if data[position + 1] == 0xF9 and data[position + 2] == 4:
                # Of the graphic control only transparency counts for the first frame; disposal would cost memory.
                control = b"!\xf9\x04" + bytes([data[position + 3] & 1, 0, 0, data[position + 6], 0])
            position, inside = position + 2, True
    else:
        raise corrupt(f"GIF has more than {_MAX_PARTS} blocks")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
    drawn = (left, top, left + frame_width, top + frame_height)
    width, height = max(width, drawn[2]), max(height, drawn[3])
    if not frame_width or not frame_height or max(width, height) > 65_535:
        raise corrupt("GIF frame has no pixels or lies outside any screen")
    screen = struct.pack("<HH", width, height)
    return ImageFile("GIF", data[:6] + screen + data[10:start] + control + data[position:], width, height, drawn=drawn)


def exif_orientation(tiff: bytes) -> int:
    """The orientation 1-8 that an EXIF block asks for; 1 for whatever is missing or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:  # the block ends early
        pass
    return 1


_WALKS = {
    "PNG": _walk_png,
    "JPEG": _walk_jpeg,
    "WEBP": _walk_webp,
    "BMP": _walk_bmp,
    "GIF": _walk_gif,
    "TIFF": walk_tiff,
    "AVIF": walk_avif,
}
