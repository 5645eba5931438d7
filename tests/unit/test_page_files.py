"""What is sent for the page: nothing inline, nothing from elsewhere, names as text, and the headers that hold it so."""

import re
from html.parser import HTMLParser

import pytest

from cnn_ray.page_files import page_file

PATHS = ("/", "/page/page.js", "/page/page.css")


class Page(HTMLParser):
    """All tags with their attributes, and the text of the options."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.options: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "option" and data.strip():
            self.options.append(data)


def sent(path: str, names: tuple[str, ...] = ("demo",), needs_key: bool = False) -> str:
    file = page_file(path, names=names, needs_key=needs_key)
    assert file is not None
    return file.body.decode()


def test_each_file_has_its_type_and_a_policy_without_exceptions():
    types = {"/": "text/html", "/page/page.js": "text/javascript", "/page/page.css": "text/css"}
    for path in PATHS:
        file = page_file(path, names=["demo"], needs_key=False)

        assert file is not None
        assert file.content_type == f"{types[path]}; charset=utf-8"
        policy = dict(part.strip().split(" ", 1) for part in file.headers["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' blob: data:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert file.headers["Referrer-Policy"] == "no-referrer"
        assert file.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert file.headers["Cache-Control"] == "no-cache"


NOT_FILES = ("", "//", "/index.html", "/page", "/page/", "/page/index.html", "/page/../page.py", "/PAGE/page.js")


@pytest.mark.parametrize("path", NOT_FILES)
def test_no_other_path_is_a_file(path):
    assert page_file(path, names=["demo"], needs_key=False) is None


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    page = Page(sent("/"))

    for tag, attributes in page.tags:
        assert tag not in ("style", "base", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name] in ("page/page.js", "page/page.css", "data:,")
        if tag == "script":
            assert attributes["src"] == "page/page.js"
    assert "<script>" not in sent("/")
    assert not re.search(r"@import|url\(", sent("/page/page.css"))
    script = sent("/page/page.js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?://", script)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", script)


def test_ids_that_the_script_asks_for_are_in_the_page():
    page = Page(sent("/"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]

    assert len(ids) == len(set(ids))
    assert set(re.findall(r'byId\("([\w-]+)"\)', sent("/page/page.js"))) <= set(ids)
    for tag, attributes in page.tags:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids, (tag, attributes)


def test_names_are_text_and_the_key_is_asked_for_where_it_is_needed():
    names = ("demo", '"><script>alert(1)</script>', "<!--models-->", 'a&b\' data-needs-key="no"')

    page = Page(sent("/", names, needs_key=True))

    assert page.options == list(names)
    assert [a["value"] for tag, a in page.tags if tag == "option"] == list(names)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [a["data-needs-key"] for tag, a in page.tags if tag == "html"] == ["yes"]
    assert [a["data-needs-key"] for tag, a in Page(sent("/")).tags if tag == "html"] == ["no"]
    assert sent("/page/page.js", names, True) == sent("/page/page.js")


def test_the_style_is_the_reports_and_more():
    from importlib.resources import files

    assert sent("/page/page.css").startswith(files("cnn_ray").joinpath("report.css").read_text(encoding="utf-8"))
