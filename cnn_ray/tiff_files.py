"""The first page of a TIFF -> a TIFF that holds its pixels and the tags that say how to read them, nothing else.

Only tags that decide pixels are read, each up to the number of values that it may have: directories in a circle,
values that overlap and counts in the billions cost nothing. Decoders get one fresh directory, strips of which no byte
is used twice, and sizes that agree with each other. Spec: TIFF 6.0 and its supplements 1 and 2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cnn_ray.image_formats import ImageFile, RefusedError, corrupt, cut, unsupported
from cnn_ray.records import QuarantineCode

_MAX_PIECES = 65_536  # strips or tiles: each costs a turn of a Python loop
_MORE_TILE_PIXELS = 1 << 22  # tiles may cover this much beyond twice the picture
_SIZES = {1: "B", 3: "H", 4: "I"}
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
_OTHER_COMPRESSIONS = {
    **dict.fromkeys((2, 3, 4), "CCITT"),
    **dict.fromkeys((6, 7), "JPEG"),
    **dict.fromkeys((9, 10), "JBIG"),
    32766: "NeXT",
    32771: "CCITT",
    32809: "ThunderScan",
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    34661: "JBIG",
    **dict.fromkeys((34676, 34677), "SGI Log"),
    **dict.fromkeys((34887, 34888), "LERC"),
    34892: "JPEG",
    34925: "LZMA",
    **dict.fromkeys((50000, 34926), "Zstandard"),
    **dict.fromkeys((50001, 34927), "WebP"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
}
_COLOURS = {0: "grey", 1: "grey", 2: "RGB", 3: "a palette", 5: "CMYK"}
_OTHER_COLOURS = {
    4: "a transparency mask", 6: "YCbCr colours", 8: "CIELab colours", 9: "ICCLab colours", 10: "ITULab colours",
    32803: "a colour filter array", 32844: "LogL values", 32845: "LogLuv colours", 34892: "linear raw data",
}  # fmt: skip
_COLOUR_SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}
_BITS = {0: (1, 2, 4, 8), 1: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 5: (8, 16)}
"""Of a sample, by colours, as Pillow reads them rightly: it does not invert 16-bit grey whose 0 is white."""
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_SUBFILE, _WIDTH, _HEIGHT, _BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES = 266, 273, 274, 277, 278, 279
_PLANES, _PREDICTOR, _PALETTE, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 284, 317, 320, 322, 323, 324, 325
_EXTRA, _SAMPLE_FORMAT, _DNG_VERSION = 338, 339, 50_706


@dataclass(frozen=True, slots=True)
class _Page:
    """How the pixels of the page lie; `across` and `down` count strips or tiles of `piece` (width, height)."""

    width: int
    height: int
    bits: int
    samples: int
    extra: int | None
    photometric: int
    compression: int
    planes: int
    tiled: bool
    piece: tuple[int, int]

    @property
    def across(self) -> int:
        return -(-self.width // self.piece[0])

    @property
    def down(self) -> int:
        return -(-self.height // self.piece[1])

    @property
    def row_bytes(self) -> int:
        """Of a piece in one plane."""
        return (self.piece[0] * self.bits * (self.samples if self.planes == 1 else 1) + 7) // 8


class _Directory:
    """The first directory of a file. Values are read when they are asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.order = "<" if data[:2] == b"II" else ">"
        (start,) = struct.unpack_from(self.order + "I", data, 4)
        (count,) = struct.unpack_from(self.order + "H", data, start)
        if count == 0:
            raise corrupt("TIFF has a directory without entries")
        self._entries: dict[int, tuple[int, int, int]] = {}
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(self.order + "HHI", data, position)
            self._entries.setdefault(tag, (kind, values, position + 8))
        struct.unpack_from(self.order + "I", data, start + 2 + 12 * count)  # where the next page is: not followed

    def __contains__(self, tag: int) -> bool:
        return tag in self._entries

    def values(self, tag: int, most: int) -> tuple[int, ...]:
        """Return the first `most` values of the tag; none where it is absent."""
        kind, count, position = self._entries.get(tag, (3, 0, 0))
        if kind not in _SIZES:
            raise corrupt(f"TIFF tag {tag} has type {kind}")
        item = struct.calcsize("=" + _SIZES[kind])
        if count * item > 4:
            (position,) = struct.unpack_from(self.order + "I", self._data, position)
        return struct.unpack_from(f"{self.order}{min(count, most)}{_SIZES[kind]}", self._data, position)

    def value(self, tag: int, default: int) -> int:
        """Return the first value of the tag."""
        return next(iter(self.values(tag, 1)), default)


def walk_tiff(data: bytes) -> ImageFile:
    """Return the first page. Raises: RefusedError; struct.error where the file ends before a value."""
    directory = _Directory(data)
    if _DNG_VERSION in directory or data[8:10] == b"CR":
        raise unsupported("RAW photo")
    if directory.value(_SUBFILE, 0) & 1:
        raise unsupported("TIFF that begins with a preview, as RAW photos do")
    page = _page(directory)
    if page.width == 0 or page.height == 0:
        return ImageFile("TIFF", b"", page.width, page.height)  # refused by its size
    orientation = directory.value(_ORIENTATION, 1)
    clean = _written(directory, page, _pieces(directory, page, data))
    return ImageFile("TIFF", clean, page.width, page.height, orientation if 1 <= orientation <= 8 else 1)


def _page(directory: _Directory) -> _Page:
    if _WIDTH not in directory or _HEIGHT not in directory:
        raise corrupt("TIFF has no width or no height")
    width, height = directory.value(_WIDTH, 0), directory.value(_HEIGHT, 0)
    compression = directory.value(_COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise unsupported(f"TIFF with {_OTHER_COMPRESSIONS.get(compression, f'unknown ({compression})')} compression")
    photometric = directory.value(_PHOTOMETRIC, 0)
    if photometric not in _COLOURS:
        raise unsupported(f"TIFF with {_OTHER_COLOURS.get(photometric, f'unknown colours ({photometric})')}")
    samples = directory.value(_SAMPLES, 1)
    bits, extra = _samples(directory, photometric, samples)
    planes = directory.value(_PLANES, 1) if samples > 1 else 1
    if planes == 2 and (bits != 8 or photometric not in (2, 5) or extra in (0, 1)):
        raise unsupported(f"TIFF with separate planes of {bits}-bit {_COLOURS[photometric]}")
    if planes not in (1, 2):
        raise corrupt(f"TIFF has planar configuration {planes}")
    tiled = _TILES in directory
    if tiled:
        piece = directory.value(_TILE_WIDTH, 0), directory.value(_TILE_HEIGHT, 0)
    else:
        piece = max(width, 1), min(directory.value(_ROWS, 0xFFFFFFFF), max(height, 1))
    if 0 in piece or (tiled and piece[0] % 16):
        raise corrupt("TIFF has strips or tiles of an impossible size")
    return _Page(width, height, bits, samples, extra, photometric, compression, planes, tiled, piece)


def _samples(directory: _Directory, photometric: int, samples: int) -> tuple[int, int | None]:
    """Return the bits of each sample and the kind of the one beyond the colours, if any."""
    colours, name = _COLOUR_SAMPLES[photometric], _COLOURS[photometric]
    if samples < colours:
        raise corrupt(f"TIFF has {samples} samples a pixel for {name}")
    depths = set(directory.values(_BITS_PER_SAMPLE, min(samples, 4))) or {1}
    bits = max(depths)
    if len(depths) > 1 or bits not in _BITS[photometric]:
        raise unsupported(f"TIFF with {'-'.join(map(str, sorted(depths)))} bits a sample of {name}")
    if set(directory.values(_SAMPLE_FORMAT, min(samples, 4))) - {1}:
        raise unsupported("TIFF with signed or floating-point samples")
    if samples > colours + 1 or (
        samples > colours and (photometric in (3, 5) or (photometric in (0, 1) and bits != 8))
    ):
        raise unsupported(f"TIFF with {samples} samples of {bits} bits for {name}")
    if samples == colours:
        return bits, None
    if photometric == 0:
        raise unsupported("TIFF with grey whose 0 is white, and alpha")
    # A fourth sample that nothing is said of is alpha for RGB: older programs wrote that.
    extra = directory.value(_EXTRA, 2 if photometric == 2 else 0)
    if extra not in (0, 1, 2):
        raise unsupported(f"TIFF with an extra sample of kind {extra}")
    return bits, extra


def _pieces(directory: _Directory, page: _Page, data: bytes) -> list[bytes]:
    """Return the data of strips or tiles; those that are not compressed have exactly their rows."""
    count = page.across * page.down * (page.samples if page.planes == 2 else 1)
    covered = page.across * page.piece[0] * page.down * page.piece[1]
    if count > _MAX_PIECES:
        raise RefusedError(QuarantineCode.TOO_LARGE, f"TIFF has {count} strips or tiles, allowed are {_MAX_PIECES}")
    if page.tiled and covered > 2 * page.width * page.height + _MORE_TILE_PIXELS:
        raise RefusedError(QuarantineCode.TOO_LARGE, f"TIFF has tiles of {covered} pixels for far fewer")
    offsets = directory.values(_TILES if page.tiled else _STRIPS, count)
    lengths: tuple[int, ...] = directory.values(_TILE_BYTES if page.tiled else _STRIP_BYTES, count)
    if page.compression == 1:
        rows = [min(page.piece[1], page.height - y * page.piece[1]) for y in range(page.down)]
        wanted = [
            page.row_bytes * (page.piece[1] if page.tiled else rows[k // page.across % page.down]) for k in range(count)
        ]
        if any(length < size for length, size in zip(lengths, wanted, strict=False)):
            raise cut("TIFF has strips or tiles with fewer bytes than their rows")
        lengths = tuple(wanted)  # also of old files, which do not say it
    if len(offsets) < count or len(lengths) < count:
        raise corrupt(f"TIFF has {min(len(offsets), len(lengths))} strips or tiles of {count}")
    if any(start + length > len(data) for start, length in zip(offsets, lengths, strict=True)):
        raise cut("TIFF ends inside its pixels")
    if sum(lengths) > len(data):
        raise corrupt("TIFF has strips or tiles that overlap")
    pieces = [data[start : start + length] for start, length in zip(offsets, lengths, strict=True)]
    if directory.value(_FILL_ORDER, 1) == 2:
        pieces = [piece.translate(_REVERSED) for piece in pieces]
    return pieces


def _written(directory: _Directory, page: _Page, pieces: list[bytes]) -> bytes:
    """Return a TIFF of one directory. Strips that are not compressed become one (of each plane)."""
    height = page.piece[1]
    if page.compression == 1 and not page.tiled:
        pieces, height = [b"".join(pieces[k : k + page.down]) for k in range(0, len(pieces), page.down)], page.height
    tags: dict[int, tuple[str, tuple[int, ...]]] = {
        _WIDTH: ("I", (page.width,)),
        _HEIGHT: ("I", (page.height,)),
        _BITS_PER_SAMPLE: ("H", (page.bits,) * page.samples),
        _COMPRESSION: ("H", (page.compression,)),
        _PHOTOMETRIC: ("H", (page.photometric,)),
        _SAMPLES: ("H", (page.samples,)),
        _PLANES: ("H", (page.planes,)),
    }
    if page.extra is not None:
        tags[_EXTRA] = ("H", (page.extra,))
    if page.compression in (5, 8, 32946):
        predictor = directory.value(_PREDICTOR, 1)
        if predictor not in (1, 2):
            raise unsupported(f"TIFF with predictor {predictor}")
        tags[_PREDICTOR] = ("H", (predictor,))
    if page.photometric == 3:
        tags[_PALETTE] = ("H", _palette(directory, page.bits))
    if page.tiled:
        tags |= {_TILE_WIDTH: ("I", (page.piece[0],)), _TILE_HEIGHT: ("I", (height,))}
    else:
        tags[_ROWS] = ("I", (height,))
    at = (_TILES, _TILE_BYTES) if page.tiled else (_STRIPS, _STRIP_BYTES)
    tags |= {at[0]: ("I", (0,) * len(pieces)), at[1]: ("I", tuple(len(piece) for piece in pieces))}
    position = len(_directory_bytes(directory.order, tags))
    offsets: list[int] = []
    for piece in pieces:
        offsets.append(position)
        position += len(piece)
    tags[at[0]] = ("I", tuple(offsets))
    return b"".join([_directory_bytes(directory.order, tags), *pieces])


def _palette(directory: _Directory, bits: int) -> tuple[int, ...]:
    """Return the colours, 16 bits each: all reds, all greens, all blues."""
    count = 3 << bits
    palette = directory.values(_PALETTE, count)
    if len(palette) < count:
        raise corrupt(f"TIFF has {len(palette)} numbers in its palette of {count}")
    if max(palette) < 256:  # old programs wrote 8 bits
        return tuple(number * 257 for number in palette)
    return tuple(number & 0xFFFF for number in palette)


def _directory_bytes(order: str, tags: dict[int, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the header, one directory and its values."""
    entries: list[bytes] = []
    values: list[bytes] = []
    position = 8 + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        body = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(body) <= 4:
            place = body.ljust(4, b"\0")
        else:
            place = struct.pack(order + "I", position)
            values.append(body)
            position += len(body)
        entries.append(struct.pack(order + "HHI", tag, 3 if kind == "H" else 4, len(numbers)) + place)
    magic = b"II" if order == "<" else b"MM"
    header = magic + struct.pack(order + "HIH", 42, 8, len(tags))
    return b"".join([header, *entries, bytes(4), *values])
