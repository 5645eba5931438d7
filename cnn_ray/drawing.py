"""Labelled synthetic screenshots for `cnn-ray demo` and the tests.

What tells the classes apart is the layout alone: a login card (two stacked input fields over a button) or none. Image
`i` of both labels shares its size, theme and text size, and ordinary pages have dialogs, search and newsletter fields
too, so that colour, size, file size or a single field do not give the class away. Same seed, same bytes (with the same
Pillow): a second call after Ctrl-C completes a folder instead of mixing two.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from cnn_ray.errors import ConfigError

LABELS = ("legitimate", "phishing")
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
SIZES_PX = ((320, 240), (320, 400), (400, 300), (480, 320), (480, 360), (400, 400), (640, 360), (640, 480), (800, 600))

TEXT = "account team price order review music design the of and to in for best your daily health data news"
WORDS = tuple(TEXT.split())
LOGIN_TITLES = ("Sign in", "Log in", "Account limited", "Session expired", "Unusual activity", "Confirm your identity")
LOGIN_BUTTONS = ("Sign in", "Log in", "Continue", "Verify", "Unlock", "Next")
NOTICE_BUTTONS = ("Accept", "Subscribe", "Read more", "Continue", "Buy now", "Next")

Box = tuple[int, int, int, int]  # left, top, right, bottom in px
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Canvas:
    image: Image.Image
    draw: ImageDraw.ImageDraw
    rng: random.Random
    unit: int  # text size in px; all elements are multiples of it, so a layout survives any size
    surface: Colour
    field: Colour
    line: Colour
    ink: Colour
    accent: Colour


def _canvas(seed: int, rng: random.Random, width_px: int | None, height_px: int | None) -> _Canvas:
    """An empty page: its size, text size and light or dark colours come from the seed alone, never from the label."""
    look = random.Random(f"look {seed}")
    size, hue, dark = look.choice(SIZES_PX), look.random(), look.random() < 0.2

    def tone(lightness: float, saturation: float) -> Colour:
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
        return int(red * 255), int(green * 255), int(blue * 255)

    size = width_px or size[0], height_px or size[1]
    if min(size) < 160:
        raise ConfigError(f"Expected sides of 160 px or more. Received: {size}. Next: draw larger.")
    unit = max(6, int(min(size) / look.uniform(18, 21)))
    accent = tone(look.uniform(0.35, 0.5), look.uniform(0.4, 0.9))
    lightness = look.uniform(0.05, 0.15) if dark else look.uniform(0.7, 0.92)
    image = Image.new("RGB", size, tone(lightness, look.choice((0.1, 0.2, 0.5))))
    greys = (0.2, 0.36, 0.6, 0.9) if dark else (0.99, 0.86, 0.45, 0.18)
    return _Canvas(image, ImageDraw.Draw(image), rng, unit, *(tone(grey, 0.1) for grey in greys), accent)  # pyright: ignore[reportCallIssue]


@functools.lru_cache(maxsize=64)
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at this size; cached because each load parses the whole font."""
    return ImageFont.load_default(max(6, size_px))


def _write(c: _Canvas, left: int, top: int, text: str, scale: float = 1.0, colour: Colour | None = None) -> None:
    c.draw.text((left, top), text, font=_font(int(c.unit * scale)), fill=colour or c.ink)


def _words(c: _Canvas, width_px: float, scale: float = 1.0) -> str:
    """Words that fill about this width: a letter of Pillow's font takes 0.56 em."""
    room = max(3, int(width_px / (0.56 * c.unit * scale)))
    return " ".join(c.rng.choices(WORDS, k=room // 3 + 1))[:room].capitalize()


def _paragraph(c: _Canvas, box: Box, scale: float = 0.8) -> None:
    """Lines of text from top to bottom of the box, the last one short."""
    left, top, right, bottom = box
    step = max(7, int(c.unit * scale * 1.5))
    for y in range(top, bottom - step + 1, step):
        last = y + 2 * step > bottom
        _write(c, left, y, _words(c, (right - left) * (c.rng.uniform(0.3, 0.8) if last else 1), scale), scale)


def _panel(c: _Canvas, box: Box, fill: Colour, outline: Colour | None = None) -> None:
    c.draw.rounded_rectangle(box, radius=c.unit // 4, fill=fill, outline=outline, width=max(1, c.unit // 10))


def _field(c: _Canvas, box: Box, hint: str) -> None:
    _panel(c, box, c.field, c.line)
    _write(c, box[0] + c.unit // 2, (box[1] + box[3] - c.unit) // 2, hint, 0.8, c.line)


def _button(c: _Canvas, box: Box, text: str) -> None:
    _panel(c, box, c.accent)
    middle = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    c.draw.text(middle, text, font=_font(int(c.unit * 0.9)), fill=(255, 255, 255), anchor="mm")


def _picture(c: _Canvas, box: Box) -> None:
    """A placeholder for a photo: sun and hill."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    if min(wide, high) >= 8:
        c.draw.rectangle(box, fill=c.rng.choice((c.field, c.accent, c.line)))
        peak = left + int(wide * c.rng.uniform(0.3, 0.7)), top + high // 3
        c.draw.polygon([(left, bottom), peak, (right, bottom)], fill=c.surface)
        c.draw.ellipse((left + wide // 8, top + 2, left + wide // 4, top + 2 + wide // 8), fill=c.surface)


def _logo(c: _Canvas, box: Box) -> None:
    """A mark (disc or padlock) with a name beside it."""
    left, top, _, bottom = box
    size, quarter = bottom - top, (bottom - top) // 4
    if c.rng.random() < 0.5:
        c.draw.ellipse((left, top, left + size, bottom), fill=c.accent)
    else:
        c.draw.ellipse((left + quarter, top, left + size - quarter, bottom), outline=c.line, width=2)
        c.draw.rectangle((left + quarter // 2, top + size // 2, left + size - quarter // 2, bottom), fill=c.accent)
    _write(c, left + size + c.unit // 2, top + (size - c.unit) // 2, c.rng.choice(WORDS).capitalize(), 1.1)


def _navigation(c: _Canvas) -> int:
    """Bottom of the bar drawn at the top of the page: logo, links, a search field or a sign-in link."""
    width, bar, u = c.image.width, int(c.unit * 2.4), c.unit
    c.draw.rectangle((0, 0, width, bar), fill=c.rng.choice((c.surface, c.field)))
    _logo(c, (u // 2, u // 2, u * 8, bar - u // 2))
    for x in range(u * 9, int(width * 0.6), u * 5):
        _write(c, x, int(u * 0.8), c.rng.choice(WORDS).capitalize(), 0.9)
    if c.rng.random() < 0.5:
        _field(c, (int(width * 0.68), u // 2, width - u, bar - u // 2), "Search")
    else:
        _write(c, width - u * 5, int(u * 0.8), c.rng.choice(("Sign in", "Cart", "Help")), 0.9)
    return bar


def _article(c: _Canvas, box: Box) -> None:
    (left, top, right, bottom), u = box, c.unit
    _write(c, left, top, _words(c, (right - left) * 0.8, 1.6), 1.6)
    middle = left + int((right - left) * c.rng.uniform(0.45, 0.7))
    split = top + int((bottom - top) * c.rng.uniform(0.35, 0.6))
    _paragraph(c, (left, top + 3 * u, middle - u, bottom))
    _picture(c, (middle, top + 3 * u, right, split))
    if c.rng.random() < 0.4:  # a newsletter: one field and its button, side by side
        _field(c, (middle, split + u, right - u * 4, split + u * 3), "Email")
        _button(c, (right - u * 4, split + u, right, split + u * 3), "Join")
    _paragraph(c, (middle, split + u * 4, right, bottom))


def _banner(c: _Canvas, box: Box) -> None:
    """A headline, a line and one button on an else empty page: as little ink as a lone login card."""
    (left, top, right, bottom), u = box, c.unit
    y = top + int((bottom - top) * c.rng.uniform(0.1, 0.4))
    _write(c, left + u, y, _words(c, (right - left) * 0.6, 1.8), 1.8)
    _paragraph(c, (left + u, y + u * 3, left + (right - left) * 2 // 3, y + u * 6))
    _button(c, (left + u, y + u * 7, left + u * 7, y + u * 9), c.rng.choice(NOTICE_BUTTONS))


def _table(c: _Canvas, box: Box) -> None:
    left, top, right, bottom = box
    row, step = int(c.unit * c.rng.uniform(1.6, 2.4)), (right - left) // c.rng.randint(3, 5)
    for n, y in enumerate(range(top, bottom - row, row)):
        c.draw.rectangle((left, y, right, y + row), fill=c.surface if n % 2 else c.field)
        for x in range(left, right - step + 1, step):
            text = c.rng.choice(WORDS) if n == 0 or x == left else f"{c.rng.randrange(10_000) / 10:.1f}"
            _write(c, x + c.unit // 2, y + row // 5, text, 0.85)


def _grid(c: _Canvas, box: Box) -> None:
    left, top, right, bottom = box
    u, wide, high = c.unit, (right - left) // c.rng.randint(2, 4), (bottom - top) // c.rng.randint(1, 3)
    for x in range(left, right - wide + 1, wide):
        for y in range(top, bottom - high + 1, high):
            x1, y1 = x + wide - u // 2, y + high - u // 2
            _panel(c, (x, y, x1, y1), c.surface, c.line)
            _picture(c, (x + 3, y + 3, x1 - 3, y1 - int(u * 2.4)))
            _write(c, x + 4, y1 - int(u * 2.2), _words(c, wide - u, 0.8), 0.8)
            _write(c, x + 4, y1 - int(u * 1.1), f"{c.rng.randrange(5, 900)}.00", 0.8, c.accent)


def _results(c: _Canvas, box: Box) -> None:
    left, top, right, bottom = box
    _field(c, (left, top, int(right * 0.7), top + c.unit * 2), c.rng.choice(WORDS))
    for y in range(top + c.unit * 3, bottom - c.unit * 4, int(c.unit * 4.5)):
        _write(c, left, y, _words(c, (right - left) // 2, 1.1), 1.1, c.accent)
        _paragraph(c, (left, y + int(c.unit * 1.4), int(right * 0.85), y + c.unit * 4), 0.75)


def _ordinary_page(c: _Canvas) -> None:
    """Navigation over one of five kinds of content."""
    box = (c.unit, _navigation(c) + c.unit, c.image.width - c.unit, c.image.height - c.unit // 2)
    c.rng.choice((_article, _table, _grid, _results, _banner, _banner))(c, box)


def _rows(c: _Canvas, login: bool) -> list[tuple[float, Callable[[Box], None]]]:
    """What a card holds from top to bottom: height in units and how to draw it."""
    rng = c.rng
    title = rng.choice(LOGIN_TITLES if login else WORDS)
    words = rng.choice(LOGIN_BUTTONS if login else NOTICE_BUTTONS)
    button = (2.2, lambda box: _button(c, box, words))
    text = (rng.choice((1.3, 2.5) if login else (2.5, 3.8, 5.0)), lambda box: _paragraph(c, box))
    rows = [(1.8, lambda box: _logo(c, box))] if rng.random() < 0.6 else []
    rows.append((1.4, lambda box: _write(c, box[0], box[1], title, 1.2)))
    if not login or rng.random() < 0.4:
        rows.append(text)
    if login:
        name = rng.choice(("Email", "User name", "Phone", "Customer number"))
        rows += [(2.2, lambda box: _field(c, box, name)), (2.2, lambda box: _field(c, box, "Password")), button]
        if rng.random() < 0.5:
            rows.append((0.9, lambda box: _write(c, box[0], box[1], "Forgot password?", 0.8, c.accent)))
        return rows
    extra = rng.random()
    if extra < 0.2:
        rows.append((2.2, lambda box: _field(c, box, "Email")))
    elif extra < 0.7:
        rows.insert(0, (4.0, lambda box: _picture(c, box)))
    return [*rows, button]


def _card(c: _Canvas, login: bool) -> None:
    """A login card, or a dialog of the same size and place without the two fields."""
    rows, u, gap = _rows(c, login), c.unit, 0.6
    high = int(u * (sum(height + gap for height, _ in rows) + 1.4))
    wide = min(int(u * c.rng.uniform(12, 15)), c.image.width - 2 * u)
    left = int((c.image.width - wide) * c.rng.choice((0.2, 0.5, 0.5, 0.5, 0.8)))
    top = int(max(0, c.image.height - high) * c.rng.uniform(0.35, 0.65))
    outside = (left, 0, left + wide, c.image.height) if c.rng.random() < 0.2 else (left, top, left + wide, top + high)
    _panel(c, outside, c.surface, c.line)
    y = top + u
    for height, paint in rows:
        paint((left + u, y, left + wide - u, y + int(height * u)))
        y += int((height + gap) * u)


def draw_screenshot(label: str, seed: int, *, width_px: int | None = None, height_px: int | None = None) -> Image.Image:
    """An RGB page of this label; the other label's page with the same seed has the same size and colours.

    Raises:
        ConfigError: the label is not one of `LABELS`, or a side has fewer than 160 px.
    """
    if label not in LABELS:
        raise ConfigError(f"Expected a label of {LABELS}. Received: {label!r}. Next: correct the label.")
    login, rng = label == "phishing", random.Random(f"{label} {seed}")
    c = _canvas(seed, rng, width_px, height_px)
    card = login or rng.random() < 0.08
    if not card or rng.random() < 0.4:
        _ordinary_page(c)
        if card and rng.random() < 0.5:  # the page behind a dialog is often out of focus
            c.image.paste(c.image.reduce(4).resize(c.image.size, Image.Resampling.BILINEAR))
    if card:
        _card(c, login)
    return c.image


def encode(image: Image.Image, format: str, seed: int) -> bytes:
    """Encoded bytes of the image as "PNG", "JPEG" or "WEBP"; the seed picks the quality of the lossy ones."""
    if format not in FORMATS:
        raise ConfigError(f"Expected a format of {tuple(FORMATS)}. Received: {format!r}. Next: correct the format.")
    if format == "PNG":
        return encoded_as(image, format, compress_level=1)  # level 6 takes as long as the drawing
    return encoded_as(image, format, quality=random.Random(f"quality {seed}").randint(60, 92), method=0)


def encoded_as(image: Image.Image, format: str, **options: object) -> bytes:
    """Encoded bytes of the image in any of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def seed_of(*parts: object) -> int:
    """A seed for one image that depends on nothing but the parts: any single file can be drawn again."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
