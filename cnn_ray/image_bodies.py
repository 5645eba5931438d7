# pyright: strict
"""Bodies of people and scripts: an image as it is, or as the one file of a form. Anything else is JSON.

Only bytes of the request are looked at: no name, path or URL in it is ever opened, and nothing touches the disk. What
an image is, its bytes decide later; its declared type only says that it is meant to be one.
"""

from __future__ import annotations

import logging

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from cnn_ray.image_formats import ALLOWED_FORMATS
from cnn_ray.json_bodies import shown
from cnn_ray.request_errors import RequestError, UnsupportedTypeError

IMAGE_TYPES = tuple(f"image/{name.lower()}" for name in ALLOWED_FORMATS)
MAX_PARTS = 16
MAX_HEADERS = 8
"""Of one part."""
MAX_HEADER_BYTES = 4096
"""Of one part's header line."""

_ALSO_TYPES = ("image/jpg", "image/pjpeg", "image/x-ms-bmp", "image/x-bmp")


def image_of(content_type: str | None, body: bytes) -> bytes | None:
    """The one encoded image of the body; None where the content type says neither image nor form, so that it is JSON.

    Raises:
        UnsupportedTypeError: an image of a type that is not read here.
        RequestError: a form without exactly one file, or damaged.
    """
    kind, options = parse_options_header(content_type or "")
    if kind == b"multipart/form-data":
        return _file_of_form(options.get(b"boundary", b""), body)
    if kind.startswith(b"image/"):
        _check_type(kind.decode("latin-1"))
        return body
    return None


def _check_type(kind: str) -> None:
    if kind not in IMAGE_TYPES and kind not in _ALSO_TYPES:
        raise UnsupportedTypeError(f"Expected one of {', '.join(IMAGE_TYPES)}. Received: {shown(kind)}.")


class _Form:
    """The files of a form while python-multipart walks over it."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = b"", b""
        self._data: list[bytes] | None = None

    def part_begin(self) -> None:
        self._headers, self._field, self._value = {}, b"", b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field, self._value = b"", b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._data = None
        if b"filename" not in options:
            return  # a field of the form, not a file
        if self.files:
            raise RequestError("Expected one file in the form. Received: more.")
        kind, _ = parse_options_header(self._headers.get(b"content-type", b""))
        if kind.startswith(b"image/"):
            _check_type(kind.decode("latin-1"))
        self._data = []

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._data is not None:
            self._data.append(data[start:end])

    def part_end(self) -> None:
        if self._data is not None:
            self.files.append(b"".join(self._data))
            self._data = None

    def end(self) -> None:
        self.ended = True


def _file_of_form(boundary: bytes, body: bytes) -> bytes:
    form = _Form()
    try:
        if not boundary:
            raise FormParserError("the Content-Type names no boundary")
        if body.count(b"--" + boundary) > MAX_PARTS + 1:  # at each, 64 MiB of them would keep the parser for 27 s
            raise FormParserError(f"more than {MAX_PARTS} parts")
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.part_begin,
                "on_header_field": form.header_field,
                "on_header_value": form.header_value,
                "on_header_end": form.header_end,
                "on_headers_finished": form.headers_finished,
                "on_part_data": form.part_data,
                "on_part_end": form.part_end,
                "on_end": form.end,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )
        parser.logger = logging.Logger("multipart", logging.CRITICAL)  # else each damaged form is a line in our log
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"Expected multipart/form-data. Received: {shown(str(error))}.") from None
    if not form.ended:
        raise RequestError("Expected multipart/form-data up to its last boundary. Received: a part of it.")
    if len(form.files) != 1:
        raise RequestError("Expected one file in the form. Received: none.")
    return form.files[0]
