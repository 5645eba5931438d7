"""Files as an attacker, a broken crawler or an odd encoder leaves them, each with what must become of it.

`hostile_corpus` is for every test that needs bad input. All of it is drawn here, by seed: nothing comes from the net.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

Corpus = dict[str, tuple[bytes, str | None]]

_WIDTH, _HEIGHT = 96, 72
_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "avif": "AVIF"}


def hostile_corpus(seed: int = 0) -> Corpus:
    """File name -> (bytes, quarantine code, or None where it is an image that must be scored).

    About 250 files and 3 MB in all, the same for the same seed; caps are taken to be the defaults of `ImageCaps`.
    """
    drawn = _page(seed)
    corpus: Corpus = {}
    plain = (_odd, _big, _moving, _polyglots, _cut, _noise, _foreign)
    for part in (*plain, _broken_png, _broken_jpeg, _broken_others, _broken_tiff, _broken_avif):
        corpus.update(part(drawn, random.Random(f"{part.__name__} {seed}")))
    return corpus


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image's bytes in a Pillow format."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, raw: bytes, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """A PNG whose header says what it is told, around the deflated `raw` rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return _png(header, chunk(b"IDAT", zlib.compress(raw, 9)))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, body) of each chunk."""
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def tiff_of(
    tags: dict[int, tuple[str, list[int]]], pieces: Sequence[bytes] = (), order: str = "<", then: int = 0
) -> bytes:
    """A TIFF by hand: tag -> (kind "B", "H" or "I", values); `pieces` are strips, or tiles if tag 322 is there."""
    if pieces:
        at = (324, 325) if 322 in tags else (273, 279)
        tags = {at[0]: ("I", [0] * len(pieces)), at[1]: ("I", [len(p) for p in pieces])} | tags
        size = len(tiff_of(tags, (), order))
        tags = dict(tags)
        if not any(tags[at[0]][1]):
            tags[at[0]] = ("I", [size + sum(len(p) for p in pieces[:k]) for k in range(len(pieces))])
    entries, values, position = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        body = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        entries += struct.pack(order + "HHI", tag, {"B": 1, "H": 3, "I": 4}[kind], len(numbers))
        entries += body.ljust(4, b"\0") if len(body) <= 4 else struct.pack(order + "I", position + len(values))
        values += body if len(body) > 4 else b""
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(order + "HIH", 42, 8, len(tags)) + entries + struct.pack(order + "I", then)
    return head + values + b"".join(pieces)


def _png(header: bytes, *parts: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IEND", b"")


def _page(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (_HEIGHT // 8, _WIDTH // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).text((8, 8), "Sign in", fill=(255, 255, 255))
    return image


def _plain(drawn: Image.Image) -> dict[str, bytes]:
    palette = drawn.quantize(64)
    return {suffix: encoded(palette if kind == "GIF" else drawn, kind) for suffix, kind in _FORMATS.items()}


def _odd(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Images that are rare and right."""
    alpha = drawn.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(drawn.size))
    grey = drawn.convert("L")
    palette = drawn.quantize(64)
    cmyk = encoded(drawn.convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"Adobe") + 11
    wide = (np.asarray(grey).astype(np.uint16) * 257).astype(">u2")
    rows16 = b"".join(b"\0" + row.tobytes() for row in wide)
    rgb16 = (np.asarray(drawn).astype(np.uint16) * 257).astype(">u2")
    exif = Image.Exif()
    exif[0x0112] = chance.randrange(1, 9)
    plain = _plain(drawn)
    junk = {
        "icc": b"\xff\xe2" + _segment(b"ICC_PROFILE\0\1\xff" + chance.randbytes(80)),
        "exif": b"\xff\xe1" + _segment(b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + chance.randbytes(30)),
        "mpf": b"\xff\xe2" + _segment(b"MPF\0" + chance.randbytes(40)),
        "comment": b"\xff\xfe" + _segment(b"<script>alert(1)</script>" * 100),
    }
    text_bomb = zlib.compress(bytes(30_000_000), 9)
    extras = {
        "iccp-junk": chunk(b"iCCP", b"p\0\7" + chance.randbytes(40)),
        "iccp-bomb": chunk(b"iCCP", b"p\0\0" + text_bomb),
        "ztxt-bomb": chunk(b"zTXt", b"k\0\0" + text_bomb),
        "exif-loop": chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + chance.randbytes(60)),
        "apng-junk": chunk(b"acTL", chance.randbytes(8)) + chunk(b"fcTL", chance.randbytes(26)),
        "gamma-zero": chunk(b"gAMA", bytes(4)),
        "physical": chunk(b"pHYs", b"\xff" * 9),
    }
    made = {
        "odd-cmyk.jpg": cmyk,
        "odd-ycck.jpg": cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :],
        "odd-grey.jpg": encoded(grey, "JPEG"),
        "odd-progressive.jpg": encoded(drawn, "JPEG", progressive=True),
        "odd-restarts.jpg": encoded(drawn, "JPEG", restart_marker_blocks=2),
        "odd-quality-1.jpg": encoded(drawn, "JPEG", quality=1),
        "odd-exif.jpg": encoded(drawn, "JPEG", exif=exif.tobytes()),
        "odd-16-bit-grey.png": png_of(_WIDTH, _HEIGHT, rows16, 16, 0),
        "odd-16-bit-rgb.png": png_of(_WIDTH, _HEIGHT, b"".join(b"\0" + r.tobytes() for r in rgb16), 16, 2),
        "odd-alpha.png": encoded(alpha, "PNG"),
        "odd-grey-alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "odd-one-bit.png": encoded(drawn.convert("1"), "PNG"),
        "odd-palette.png": encoded(palette, "PNG"),
        "odd-palette-trns.png": encoded(palette, "PNG", transparency=bytes(range(64))),
        "odd-colour-key.png": encoded(drawn, "PNG", transparency=(1, 2, 3)),
        "odd-interlaced.png": _interlaced(drawn),
        "odd-alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "odd-lossless.webp": encoded(drawn, "WEBP", lossless=True),
        "odd-alpha.bmp": encoded(alpha, "BMP"),
        "odd-one-bit.bmp": encoded(drawn.convert("1"), "BMP"),
        "odd-palette.bmp": encoded(palette, "BMP"),
        "odd-transparent.gif": encoded(palette, "GIF", transparency=3),
        "odd-one-pixel.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "odd-one-pixel.gif": encoded(Image.new("P", (1, 1)), "GIF"),
        "odd-one-pixel.jpg": encoded(Image.new("RGB", (1, 1), "red"), "JPEG"),
        "odd-name.gif": plain["png"],  # what it is, its bytes say
        "odd-name.png": plain["jpg"],
    }
    made |= {f"odd-{n}.jpg": plain["jpg"][:2] + s + plain["jpg"][2:] for n, s in junk.items()}
    made |= {f"odd-{n}.png": plain["png"][:33] + c + plain["png"][33:] for n, c in extras.items()}
    return {name: (data, None) for name, data in made.items()}


def _segment(body: bytes) -> bytes:
    return struct.pack(">H", len(body) + 2) + body


def _interlaced(drawn: Image.Image) -> bytes:
    pixels = np.asarray(drawn)
    grid = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in grid for row in pixels[y::dy, x::dx])
    return png_of(*drawn.size, raw, interlace=1)


def _big(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Bombs, which a cap refuses before a pixel is decoded, and large images inside the cap, which are scored."""
    plain = _plain(drawn)
    rows = zlib.compress(bytes(2_000_000), 9)
    side = 20_000 + chance.randrange(5000)
    huge = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    jpeg = bytearray(plain["jpg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(plain["gif"])
    gif[6:10] = b"\xff\xff\xff\xff"
    webp = bytearray(encoded(drawn, "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_383 | 16_383 << 14)
    bmp = bytearray(plain["bmp"])
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    top_down = bytearray(plain["bmp"])
    top_down[18:26] = struct.pack("<ii", 30_000, -(2**31))
    return {
        "big-bomb.png": (_png(huge, chunk(b"IDAT", rows)), "too_large"),
        "big-header.png": (
            _png(struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0), chunk(b"IDAT", rows)),
            "too_large",
        ),
        "big-dimensions.jpg": (bytes(jpeg), "too_large"),
        "big-screen.gif": (bytes(gif), "too_large"),
        "big-dimensions.webp": (bytes(webp), "too_large"),
        "big-dimensions.bmp": (bytes(bmp), "too_large"),
        "big-negative.bmp": (bytes(top_down), "too_large"),
        "big-8k.png": (encoded(Image.new("L", (8000, 8000), 200), "PNG"), None),
        "big-8k-over.png": (encoded(Image.new("1", (8001, 8000), 1), "PNG"), "too_large"),
        "big-one-high.png": (encoded(Image.new("RGB", (100_000, 1), "navy"), "PNG"), None),
        "big-one-wide.png": (encoded(Image.new("RGB", (1, 100_000), "navy"), "PNG"), None),
        "big-one-high.jpg": (encoded(Image.new("RGB", (60_000, 1), "navy"), "JPEG"), None),
    }


def _moving(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Animations: their first frame is scored."""
    colours = [Image.new("RGB", drawn.size, tuple(chance.randbytes(3))) for _ in range(20)]
    more = {"save_all": True, "append_images": colours, "duration": 40, "loop": 0}
    return {
        "moving.gif": (encoded(drawn, "GIF", **more), None),
        "moving.avif": (encoded(drawn, "AVIF", **more), None),
        "pages.tiff": (encoded(drawn, "TIFF", save_all=True, append_images=colours), None),
        "moving.webp": (encoded(drawn, "WEBP", **more), None),
        "moving.png": (encoded(drawn, "PNG", **more), None),
    }


def _polyglots(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Two things at once. What the first bytes say is what it is; the rest never counts."""
    plain = _plain(drawn)
    archive = b"PK\3\4" + chance.randbytes(200) + b"PK\5\6" + bytes(18)
    page = b"<html><body><script>alert(1)</script></body></html>"
    comment = b"\xff\xfe" + _segment(b"--><!--" + page)
    # "GIF89a/*" is the head of a script, and of a GIF 10,799 pixels wide
    gif = bytearray(plain["gif"])
    gif[6:8] = b"/*"
    return {
        "both-png-zip.png": (plain["png"] + archive, None),
        "both-jpeg-zip.jpg": (plain["jpg"] + archive, None),
        "both-jpeg-html.jpg": (plain["jpg"][:2] + comment + plain["jpg"][2:], None),
        "both-gif-script.gif": (bytes(gif) + b"*/=1;alert(1)", None),
        "both-png-php.png": (plain["png"] + b"<?php system($_GET[0]); ?>", None),
        "both-pdf-jpeg.jpg": (b"%PDF-1.4\n" + plain["jpg"], "unsupported_format"),
        "both-html-jpeg.jpg": (page + plain["jpg"], "not_an_image"),
        "both-zip-png.png": (archive + plain["png"], "not_an_image"),
    }


def _cut(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Each format cut at each tenth; JPEG and PNG cut and closed again, as a proxy that "mends" files does."""
    corpus: Corpus = {}
    plain = _plain(drawn) | {"progressive.jpg": encoded(drawn, "JPEG", progressive=True)}
    plain["lossless.webp"] = encoded(drawn, "WEBP", lossless=True)
    for suffix, data in plain.items():
        for tenth in range(1, 10):
            end = len(data) * tenth // 10
            corpus[f"cut-{tenth}.{suffix}"] = (data[:end], "truncated")
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(drawn))
    for tenth in range(1, 10):
        for suffix in ("jpg", "progressive.jpg"):
            data = plain[suffix]
            scan = data.index(b"\xff\xda") + 20  # behind the last table, inside the first scan
            end = scan + (len(data) - scan) * tenth // 10
            corpus[f"closed-{tenth}.{suffix}"] = (data[:end].rstrip(b"\xff") + b"\xff\xd9", "truncated")
    for tenth in range(1, 10):
        corpus[f"closed-{tenth}.png"] = (png_of(*drawn.size, rows[: len(rows) * tenth // 10]), "truncated")
    return corpus


def _noise(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Random bytes, alone and behind a right header."""
    png, jpeg = (_plain(drawn)[suffix] for suffix in ("png", "jpg"))
    scan = jpeg.index(b"\xff\xda")
    corpus: Corpus = {
        "noise.png": (b"\1" + chance.randbytes(5000), "not_an_image"),
        "noise-zeros.jpg": (bytes(5000), "not_an_image"),
        "noise-signature.png": (png[:8] + chance.randbytes(3000), "truncated"),
        "noise-idat.png": (_png(png[16:29], chunk(b"IDAT", chance.randbytes(3000))), "decode_error"),
        "noise-tables.jpg": (jpeg[:4] + bytes(1) + jpeg[5:20] + b"\xff\xd9", "decode_error"),
        "noise-scan.jpg": (jpeg[: scan + 14] + b"\0" * 3, "truncated"),
        "noise-empty.png": (b"", "empty"),
        "noise-one-byte.png": (b"\x42", "not_an_image"),
    }
    return corpus


def _broken_png(drawn: Image.Image, chance: random.Random) -> Corpus:
    good = _plain(drawn)["png"]
    header, data = (body for kind, body in png_chunks(good) if kind in (b"IHDR", b"IDAT"))
    wrong = bytearray(good)
    wrong[-13] ^= 1
    head_crc = bytearray(good)
    head_crc[29] ^= 1
    broken = bytearray(data)
    broken[len(data) // 2 :] = chance.randbytes(len(data) - len(data) // 2)

    def sized(width: int, height: int) -> bytes:
        return _png(struct.pack(">II", width, height) + header[8:], chunk(b"IDAT", data))

    idat = chunk(b"IDAT", data)
    return {
        "png-crc.png": (bytes(wrong), "decode_error"),
        "png-header-crc.png": (bytes(head_crc), "decode_error"),
        "png-zlib.png": (_png(header, chunk(b"IDAT", bytes(broken))), "decode_error"),
        "png-zero-wide.png": (sized(0, 72), "decode_error"),
        "png-zero-high.png": (sized(96, 0), "decode_error"),
        "png-no-data.png": (_png(header), "decode_error"),
        "png-empty-data.png": (_png(header, chunk(b"IDAT", b"")), "truncated"),
        "png-two-headers.png": (_png(header, chunk(b"IHDR", header), idat), "decode_error"),
        "png-no-palette.png": (_png(header[:9] + b"\3" + header[10:], idat), "decode_error"),
        "png-many-chunks.png": (_png(header, chunk(b"abCd", b"") * 70_000, idat), "decode_error"),
        "png-length.png": (good[:33] + b"\x7f\xff\xff\xff" + good[37:], "truncated"),
        "png-line-ends.png": (good.replace(b"\r\n", b"\n", 1), "decode_error"),
        "png-split-data.png": (_png(header, *(chunk(b"IDAT", data[i : i + 1]) for i in range(len(data)))), None),
    }


def _broken_jpeg(drawn: Image.Image, chance: random.Random) -> Corpus:
    good = _plain(drawn)["jpg"]
    progressive = encoded(drawn, "JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    frame = good.index(b"\xff\xc0")

    def framed(at: int, value: bytes) -> bytes:
        return good[: frame + at] + value + good[frame + at + len(value) :]

    return {
        "jpeg-scan-bomb.jpg": (progressive[:-2] + last * 150 + b"\xff\xd9", "too_large"),
        "jpeg-zero-high.jpg": (framed(5, b"\0\0"), "unsupported_format"),
        "jpeg-zero-wide.jpg": (framed(7, b"\0\0"), "decode_error"),
        "jpeg-lossless.jpg": (framed(1, b"\xc3"), "unsupported_format"),
        "jpeg-arithmetic-hierarchical.jpg": (framed(1, b"\xcd"), "unsupported_format"),
        "jpeg-12-bit.jpg": (framed(4, b"\x0c"), "unsupported_format"),
        "jpeg-two-frames.jpg": (good[:frame] + good[frame : frame + 19] + good[frame:], "decode_error"),
        "jpeg-only-ends.jpg": (b"\xff\xd8\xff\xd9", "decode_error"),
        "jpeg-segments.jpg": (good[:2] + b"\xff\xfe\0\2" * 70_000 + good[2:], "decode_error"),
    }


def _broken_others(drawn: Image.Image, chance: random.Random) -> Corpus:
    plain = _plain(drawn)

    def patched(suffix: str, at: int, value: bytes) -> bytes:
        return plain[suffix][:at] + value + plain[suffix][at + len(value) :]

    gif = plain["gif"]
    screen = 13 + (3 << (gif[10] & 7) + 1)
    return {
        "gif-no-frame.gif": (gif[:screen] + b";", "decode_error"),
        "gif-blocks.gif": (gif[:screen] + b"!\xfe" + b"\1a" * 70_000 + b"\0" + gif[screen:], "decode_error"),
        "gif-small-screen.gif": (patched("gif", 6, b"\1\0\1\0"), None),
        "bmp-zero.bmp": (patched("bmp", 18, bytes(8)), "decode_error"),
        "bmp-run-lengths.bmp": (patched("bmp", 30, b"\1"), "unsupported_format"),
        "bmp-depth.bmp": (patched("bmp", 28, b"\x11"), "unsupported_format"),
        "bmp-header.bmp": (plain["bmp"][:14] + b"\x7c\0\0\0" + plain["bmp"][18:40], "truncated"),
        "webp-chunk.webp": (patched("webp", 12, b"JUNK"), "decode_error"),
        "webp-length.webp": (patched("webp", 4, b"\xff\xff\xff\x7f"), "truncated"),
    }


def _broken_tiff(drawn: Image.Image, chance: random.Random) -> Corpus:
    rows = drawn.tobytes()
    row = _WIDTH * 3
    good: dict[int, tuple[str, list[int]]] = {
        256: ("I", [_WIDTH]), 257: ("I", [_HEIGHT]), 258: ("H", [8, 8, 8]), 259: ("H", [1]), 262: ("H", [2]),
        277: ("H", [3]), 278: ("I", [_HEIGHT]),
    }  # fmt: skip
    strips = [rows[k : k + row] for k in range(0, len(rows), row)]

    def changed(pieces: list[bytes] | None = None, **tags: tuple[str, list[int]]) -> bytes:
        return tiff_of(good | {int(name[1:]): value for name, value in tags.items()}, pieces or [rows])

    zeros = zlib.compress(bytes(1_000_000), 9)
    loop = tiff_of(good, [rows], then=8)
    huge_count = bytearray(changed())
    entry = huge_count.index(struct.pack("<HHI", 258, 3, 3))
    huge_count[entry + 4 : entry + 8] = b"\xff\xff\xff\xff"
    return {
        "tiff-loop.tiff": (loop, None),
        "tiff-strips.tiff": (changed(strips, t278=("I", [1])), None),
        "tiff-huge-count.tiff": (bytes(huge_count), None),  # three numbers are read, as three are needed
        "tiff-exif-loop.tiff": (changed(t34665=("I", [8]), t330=("I", [8] * 9)), None),
        "tiff-icc.tiff": (changed(t34675=("B", list(chance.randbytes(500)))), None),
        "tiff-zero-wide.tiff": (changed(t256=("I", [0])), "decode_error"),
        "tiff-zero-high.tiff": (changed(t257=("I", [0])), "decode_error"),
        "tiff-zero-rows.tiff": (changed(t278=("I", [0])), "decode_error"),
        "tiff-zero-tile.tiff": (changed(t322=("I", [0]), t323=("I", [16])), "decode_error"),
        "tiff-odd-tile.tiff": (changed(t322=("I", [17]), t323=("I", [16])), "decode_error"),
        "tiff-huge-tile.tiff": (changed(t322=("I", [1 << 20]), t323=("I", [1 << 20])), "too_large"),
        "tiff-narrow-tiles.tiff": (
            changed(
                [zeros], t256=("I", [1]), t257=("I", [1_000_000]), t259=("H", [8]), t322=("I", [4096]), t323=("I", [16])
            ),
            "too_large",
        ),
        "tiff-many-strips.tiff": (changed(t257=("I", [100_000]), t278=("I", [1])), "too_large"),
        "tiff-bomb.tiff": (
            changed([zeros], t256=("I", [30_000]), t257=("I", [30_000]), t259=("H", [8]), t278=("I", [30_000])),
            "too_large",
        ),
        "tiff-overlap.tiff": (
            changed(
                [rows] * 3, t273=("I", [300, 300, 300]), t278=("I", [24]), t259=("H", [5]), t279=("I", [20_000] * 3)
            ),
            "decode_error",
        ),
        "tiff-one-strip-often.tiff": (
            tiff_of(good | {257: ("I", [5000]), 278: ("I", [1]), 273: ("I", [8] * 5000), 279: ("I", [row] * 5000)}),
            "decode_error",
        ),
        "tiff-behind-the-end.tiff": (changed(t273=("I", [1 << 31])), "truncated"),
        "tiff-short-strip.tiff": (changed(t279=("I", [100])), "truncated"),
        "tiff-few-strips.tiff": (changed(t278=("I", [1])), "decode_error"),
        "tiff-no-entries.tiff": (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "decode_error"),
        "tiff-directory.tiff": (b"II*\0\xff\xff\xff\xff" + bytes(40), "truncated"),
        "tiff-no-size.tiff": (tiff_of({258: ("H", [8])}), "decode_error"),
        "tiff-ccitt.tiff": (changed(t259=("H", [4])), "unsupported_format"),
        "tiff-jpeg.tiff": (changed(t259=("H", [7])), "unsupported_format"),
        "tiff-float.tiff": (changed(t339=("H", [3, 3, 3])), "unsupported_format"),
        "tiff-preview.tiff": (changed(t254=("I", [1])), "unsupported_format"),
        "tiff-junk-lzw.tiff": (changed([chance.randbytes(900)], t259=("H", [5])), "decode_error"),
        "tiff-junk-deflate.tiff": (changed([chance.randbytes(900)], t259=("H", [8])), "decode_error"),
    }


def _broken_avif(drawn: Image.Image, chance: random.Random) -> Corpus:
    good = encoded(drawn, "AVIF")
    large = encoded(Image.new("RGB", (4000, 3000), "navy"), "AVIF", speed=10)
    size = good.index(b"ispe") + 8
    large_size = large.index(b"ispe") + 8

    def sized(width: int, height: int) -> bytes:
        return good[:size] + struct.pack(">II", width, height) + good[size + 8 :]

    small_box = large[:large_size] + struct.pack(">II", 16, 16) + large[large_size + 8 :]
    return {
        "avif-huge.avif": (sized(60_000, 60_000), "too_large"),
        "avif-zero.avif": (sized(0, 72), "decode_error"),
        "avif-small-box.avif": (small_box, "too_large"),
        "avif-frames.avif": (_more_frames(good, 5000), "too_large"),
        "avif-no-meta.avif": (good.replace(b"meta", b"free", 1), "truncated"),
        "avif-no-location.avif": (good.replace(b"iloc", b"free", 1), "decode_error"),
        "avif-boxes.avif": (good + b"\0\0\0\x08free" * 20_000, "decode_error"),
        "avif-box-size.avif": (good + b"\0\0\0\x04free", "decode_error"),
    }


def _more_frames(good: bytes, count: int) -> bytes:
    """The AVIF with many empty frame units behind its one frame: its location is as much longer."""
    more = b"\x32\x01\0" * count
    (length,) = struct.unpack_from(">I", good, good.index(b"iloc") + 22)
    at = good.index(b"mdat") - 4
    grown = bytearray(good + more)
    grown[at : at + 4] = struct.pack(">I", len(good) - at + len(more))
    place = good.index(b"iloc") + 22
    grown[place : place + 4] = struct.pack(">I", length + len(more))
    return bytes(grown)


def _foreign(drawn: Image.Image, chance: random.Random) -> Corpus:
    """Other formats under a screenshot's name."""
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>'
    return {
        "foreign-ico.png": (encoded(drawn, "ICO"), "unsupported_format"),
        "foreign-svg.png": (svg, "unsupported_format"),
        "foreign-big-tiff.png": (b"II+\0\x08\0\0\0" + bytes(40), "unsupported_format"),
        "foreign-heic.png": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "unsupported_format"),
        "foreign-psd.png": (b"8BPS\0\1" + bytes(40), "unsupported_format"),
        "foreign-postscript.png": (b"%!PS-Adobe-3.0\n(%pipe%id) (r) file\n", "unsupported_format"),
        "foreign-html.jpg": (b"<!DOCTYPE html><html><body><h1>503</h1></body></html>", "not_an_image"),
        "foreign-json.jpg": (b'{"error": "not found"}', "not_an_image"),
        "foreign-audio.webp": (b"RIFF\x24\0\0\0WAVEfmt ", "not_an_image"),
    }
