"""What the HTML pages share: one self-contained document without scripts, its tables, and text that cannot break out.

File names, labels and details come from whoever made the screenshots: each passes `text`, and the page's own policy
(Content-Security-Policy) forbids scripts and the network, should one ever slip through.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from importlib.resources import files

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MOST_TEXT = 1200
"""Characters of one text from outside; an S3 key has at most 1,024 bytes."""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; the parts are HTML, empty ones are left out."""
    style = files("cnn_ray").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def text(value: object, most: int = MOST_TEXT) -> str:
    """The value as HTML text. Characters that do not print, or that turn the direction of writing round, are spelled
    out: a name such as `gpj.<U+202E>exe` must not look like another one. What is too long loses its middle."""
    raw = str(value)
    if len(raw) > most:
        raw = f"{raw[: most // 2]} … {raw[-most // 2 :]}"
    return html.escape("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in raw), quote=True)


def section(title: str, body: str) -> str:
    """A framed part of the page; both arguments are HTML."""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def table(head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table; a heading that begins with `#` stands over numbers, the rows are HTML."""
    cells = "".join(
        f'<th scope="col" class="number">{name[1:]}</th>' if name[:1] == "#" else f'<th scope="col">{name}</th>'
        for name in head
    )
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return f'<table class="{kind}">{top}<tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


def row(cells: Iterable[object], *, numbers_from: int = 1, kind: str = "") -> str:
    """A table row of texts: the first is its heading, those from `numbers_from` on stand right."""
    first, *others = [text(cell) for cell in cells]
    marked = "".join(
        f'<td class="number">{cell}</td>' if k >= numbers_from else f"<td>{cell}</td>"
        for k, cell in enumerate(others, 1)
    )
    return f'<tr class="{kind}"><th scope="row">{first}</th>{marked}</tr>'


def figures(pairs: Iterable[tuple[str, str, str]]) -> str:
    """The large numbers on top: (name, value, small print)."""
    cells = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(small)}</small></dd></div>"
        for name, value, small in pairs
    )
    return f'<dl class="figures">{cells}</dl>'


def picture(jpeg: bytes, alt: str) -> str:
    """An image inside the page."""
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" alt="{text(alt)}">'
