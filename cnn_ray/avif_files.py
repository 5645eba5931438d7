"""The still image of an AVIF: its size, how it is turned, and how many pixels there are to decode before any is.

The decoder trusts the AV1 data about the size of frames, so their sequence headers are read here too: a box may say
16 x 16 above a frame of 268 million pixels, or above thousands of frames that are never shown. It gets the file without
films, EXIF and XMP. Specs: ISO/IEC 14496-12 and 23008-12, AV1 Image File Format, AV1 Bitstream section 5.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cnn_ray.image_formats import ImageFile, RefusedError, corrupt, cut, unsupported
from cnn_ray.records import QuarantineCode

_MAX_PARTS = 16_384  # boxes, items, extents or AV1 units
_MORE_PIXELS = 1 << 22  # small pictures have overhead
_MOST_TIMES = 8  # that all frames (alpha, cells of a grid, a preview) may have of the picture's pixels
_TURN_OF = {
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6, (0, 0): 4, (0, 1): 2,
    (1, 0): 5, (1, 1): 7, (2, 0): 2, (2, 1): 4, (3, 0): 7, (3, 1): 5,
}  # fmt: skip
"""Quarter turns anti-clockwise, then the axis of a mirror -> the EXIF orientation that looks the same."""


@dataclass(frozen=True, slots=True)
class _Box:
    kind: bytes
    kind_at: int
    start: int
    """Of the content."""
    end: int


class _Budget:
    """How many parts of the file may still be visited."""

    def __init__(self) -> None:
        self._left = _MAX_PARTS

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise corrupt(f"AVIF has more than {_MAX_PARTS} parts")


def walk_avif(data: bytes) -> ImageFile:
    """Return the primary image. Raises: RefusedError; struct.error or IndexError where the file ends too early."""
    budget = _Budget()
    clean = bytearray(data)
    meta = _still_image(data, clean, budget)
    parts = {box.kind: box for box in _boxes(data, meta.start + 4, meta.end, budget)}
    if not {b"pitm", b"iloc", b"iinf", b"iprp"} <= parts.keys():
        raise corrupt("AVIF lacks a box that says what its image is")
    (primary,) = struct.unpack_from(">I" if data[parts[b"pitm"].start] else ">H", data, parts[b"pitm"].start + 4)
    sizes, orientation = _properties(data, parts[b"iprp"], primary, budget)
    width, height = sizes.get(primary, (0, 0))
    coded: set[int] = set()
    for item, kind, position in _items(data, parts[b"iinf"], budget):
        if kind == b"av01":
            coded.add(item)
        elif kind in (b"Exif", b"mime"):
            clean[position : position + 4] = b"skip"
    extents = _extents(data, parts[b"iloc"], budget)
    if sum(length for item in coded for _, _, length in extents.get(item, [])) > len(data):
        raise corrupt("AVIF has items that share their bytes")
    pixels = 0
    for item in sorted(coded):
        across, down = sizes.get(item, (0, 0))  # to which the decoder scales the item's frame
        pixels += max(across * down, _coded_pixels(_content(data, extents.get(item, []), parts.get(b"idat")), budget))
        if pixels > _MOST_TIMES * width * height + _MORE_PIXELS:
            raise RefusedError(QuarantineCode.TOO_LARGE, f"AVIF of {width}x{height} pixels has far larger frames")
    return ImageFile("AVIF", bytes(clean), width, height, orientation)


def _still_image(data: bytes, clean: bytearray, budget: _Budget) -> _Box:
    """Return the box of the still image; films are taken out of `clean`."""
    meta: _Box | None = None
    film = False
    for box in _boxes(data, 0, len(data), budget):
        if box.kind == b"ftyp":
            for position in (box.start, *range(box.start + 8, box.end - 3, 4)):
                if data[position : position + 4] == b"avis":
                    clean[position : position + 4] = b"avif"
        elif box.kind == b"moov":
            clean[box.kind_at : box.kind_at + 4] = b"free"
            film = True
        elif box.kind == b"meta" and meta is None:
            meta = box
    if meta is None:
        raise unsupported("AVIF film without a still image") if film else cut("AVIF ends before its still image")
    return meta


def _boxes(data: bytes, start: int, end: int, budget: _Budget) -> Iterator[_Box]:
    """Yield the boxes from `start` to `end`."""
    while start < end:
        budget.spend()
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, content)
            content += 8
        stop = end if size == 0 else start + size
        if stop > end:
            name = kind.decode("ascii", "replace")
            raise (
                cut(f"AVIF ends inside its {name} box") if end == len(data) else corrupt(f"AVIF box {name} is too long")
            )
        if stop < content:
            raise corrupt("AVIF has a box smaller than its header")
        yield _Box(kind, start + 4, content, stop)
        start = stop


def _properties(data: bytes, box: _Box, primary: int, budget: _Budget) -> tuple[dict[int, tuple[int, int]], int]:
    """Return width and height of each item, and the orientation of the primary one."""
    sizes: dict[int, tuple[int, int]] = {}
    angle, axis = 0, None
    parts = list(_boxes(data, box.start, box.end, budget))
    properties = [p for part in parts if part.kind == b"ipco" for p in _boxes(data, part.start, part.end, budget)]
    for part in parts:
        for item, number in _associations(data, part, budget) if part.kind == b"ipma" else ():
            found = properties[number - 1] if 1 <= number <= len(properties) else None
            if found is None:
                continue
            if found.kind == b"ispe":
                sizes[item] = struct.unpack_from(">II", data, found.start + 4)
            elif found.kind == b"irot" and item == primary:
                angle = data[found.start] & 3
            elif found.kind == b"imir" and item == primary:
                axis = data[found.start] & 1
    return sizes, _TURN_OF[angle, axis]


def _associations(data: bytes, box: _Box, budget: _Budget) -> Iterator[tuple[int, int]]:
    """Yield item and number of each property that an item has; numbers begin at 1."""
    (version_flags,) = struct.unpack_from(">I", data, box.start)
    (count,) = struct.unpack_from(">I", data, box.start + 4)
    position, wide_items, wide_numbers = box.start + 8, version_flags >> 24, version_flags & 1
    for _ in range(count):
        budget.spend()
        item, length = struct.unpack_from(">IB" if wide_items else ">HB", data, position)
        position += 5 if wide_items else 3
        for _ in range(length):
            budget.spend()
            yield item, struct.unpack_from(">H", data, position)[0] & 0x7FFF if wide_numbers else data[position] & 0x7F
            position += 2 if wide_numbers else 1


def _items(data: bytes, box: _Box, budget: _Budget) -> Iterator[tuple[int, bytes, int]]:
    """Yield number and type of each item, and where its type stands."""
    start = box.start + (8 if data[box.start] else 6)
    for entry in _boxes(data, start, box.end, budget):
        if entry.kind == b"infe" and data[entry.start] >= 2:
            wide = data[entry.start] >= 3
            (item,) = struct.unpack_from(">I" if wide else ">H", data, entry.start + 4)
            position = entry.start + (10 if wide else 8)
            yield item, data[position : position + 4], position


def _extents(data: bytes, box: _Box, budget: _Budget) -> dict[int, list[tuple[int, int, int]]]:
    """Return by item the (method, start, length) of the pieces of its data; a method of 1 counts from the idat box."""
    version = data[box.start]
    sizes = data[box.start + 4] >> 4, data[box.start + 4] & 15, data[box.start + 5] >> 4, data[box.start + 5] & 15
    position = box.start + 6
    found: dict[int, list[tuple[int, int, int]]] = {}

    def number(size: int) -> int:
        nonlocal position
        if position + size > box.end:
            raise corrupt("AVIF has a location box that ends too early")
        position += size
        return int.from_bytes(data[position - size : position], "big")

    for _ in range(number(4 if version == 2 else 2)):
        budget.spend()
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)
        base = number(sizes[2])
        pieces: list[tuple[int, int, int]] = []
        for _ in range(number(2)):
            budget.spend()
            if version:
                number(sizes[3])
            offset = number(sizes[0])
            pieces.append((method, base + offset, number(sizes[1])))
        if item in found:
            raise corrupt("AVIF says twice where an item is")
        found[item] = pieces
    return found


def _content(data: bytes, pieces: list[tuple[int, int, int]], idat: _Box | None) -> bytes:
    """Return the bytes of an item."""
    parts: list[bytes] = []
    total = 0
    for method, start, length in pieces:
        if method > 1 or (method == 1 and idat is None):
            raise unsupported("AVIF with data inside of other items")
        first = start + (idat.start if method == 1 and idat is not None else 0)
        last = first + length
        if last > len(data):
            raise cut("AVIF ends inside its pixels")
        total += last - first
        if total > len(data):
            raise corrupt("AVIF has an item larger than the file")
        parts.append(data[first:last])
    return b"".join(parts)


def _coded_pixels(content: bytes, budget: _Budget) -> int:
    """Return the pixels of all frames in AV1 data, shown or not, at the largest size that they may have."""
    position = total = area = 0
    while position < len(content):
        budget.spend()
        header = content[position]
        kind = header >> 3 & 15
        position += 2 if header & 4 else 1
        size = len(content) - position
        if header & 2:
            size, position = _leb128(content, position)
        if position + size > len(content):
            raise cut("AVIF ends inside its AV1 data")
        if kind == 1:
            area = _largest_frame(content[position : position + size])
        elif kind in (3, 6):  # frame header, frame
            if not area:
                raise corrupt("AVIF has a frame before its sequence header")
            total += area
        position += size
    return total


def _leb128(content: bytes, position: int) -> tuple[int, int]:
    """Return a number of AV1 and where it ends."""
    number = 0
    for k in range(8):
        byte = content[position + k]
        number |= (byte & 127) << 7 * k
        if byte < 128:
            return number, position + k + 1
    raise corrupt("AVIF has a length of more than 8 bytes")


def _largest_frame(header: bytes) -> int:
    """Return the pixels that a frame behind this sequence header may have."""
    bits, position = int.from_bytes(header[:512], "big"), 0
    length = min(len(header), 512) * 8

    def take(count: int) -> int:
        nonlocal position
        position += count
        if position > length:
            raise corrupt("AVIF has a sequence header that ends too early")
        return bits >> length - position & (1 << count) - 1

    take(4)
    reduced = take(1)
    if reduced:
        take(5)
    else:
        if take(1):
            raise unsupported("AVIF with timing of a video")
        delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delays and take(1):
                take(4)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    width, height = take(width_bits) + 1, take(height_bits) + 1
    # Without the reduced header a frame may have a size of its own, in as many bits.
    return width * height if reduced else max(width * height, 1 << width_bits + height_bits)
