# pyright: strict
"""The page at / as it is sent: files that never change, the names of the models, and headers that forbid the rest.

No script or style stands inside the HTML, nothing is loaded from elsewhere, and what the page sends goes to the
endpoint it came from: the policy tells the browser so, should a file name or a label ever slip through as markup.
The style is that of the reports, and what a page with controls needs on top.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""What every file of the page is sent with."""

_FILES = {
    "/": (("page/index.html",), "text/html; charset=utf-8"),
    "/page/page.js": (("page/page.js",), "text/javascript; charset=utf-8"),
    "/page/page.css": (("report.css", "page/page.css"), "text/css; charset=utf-8"),
}
_MODELS, _KEY = "<!--models-->", 'data-needs-key="no"'


@dataclass(frozen=True, slots=True)
class PageFile:
    """One answer to GET: its bytes, their type, and the other headers."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]


def page_file(path: str, *, names: Sequence[str], needs_key: bool) -> PageFile | None:
    """The file of the page at this path, None where there is none.

    Args:
        path: as in the request, for instance / or /page/page.js.
        names: models that can be asked, the first one chosen.
        needs_key: the page asks for an API key.
    """
    if path not in _FILES:
        return None
    parts, content_type = _FILES[path]
    content = _packaged(parts)
    if path == "/":
        options = "".join(f'<option value="{html.escape(n)}">{html.escape(n)}</option>' for n in names)
        content = content.replace(_KEY, f'data-needs-key="{"yes" if needs_key else "no"}"').replace(_MODELS, options)
    return PageFile(content.encode(), content_type, HEADERS)


@cache
def _packaged(parts: tuple[str, ...]) -> str:
    return "".join(files("cnn_ray").joinpath(part).read_text(encoding="utf-8") for part in parts)
