"""Images and forms as bodies: what curl and browsers send is found, anything odd is refused cheaply."""

from __future__ import annotations

import time

import httpx
import pytest

from cnn_ray.image_bodies import image_of
from cnn_ray.request_errors import RequestError, UnsupportedTypeError

A = b"\x89PNG\r\n\x1a\n--xx\r\n\0 not a boundary"
FORM = "multipart/form-data; boundary=xx"


def part(headers: str, data: bytes = A) -> bytes:
    return b"--xx\r\n" + headers.replace("\n", "\r\n").encode() + b"\r\n\r\n" + data + b"\r\n"


FILE = part('Content-Disposition: form-data; name="file"; filename="shot.png"\nContent-Type: image/png')
FIELD = part('Content-Disposition: form-data; name="note"', b"hello")
END = b"--xx--\r\n"


@pytest.mark.parametrize(
    "content_type",
    [None, "", "application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=xx"],
)
def test_any_other_type_is_json(content_type):
    assert image_of(content_type, A) is None


@pytest.mark.parametrize(
    "content_type",
    [
        "image/png",
        "IMAGE/PNG",
        "image/jpeg; q=1",
        "image/jpg",
        "image/webp",
        "image/gif",
        "image/bmp",
        "image/tiff",
        "image/avif",
        "image/x-ms-bmp",
    ],
)
def test_an_image_is_the_body(content_type):
    assert image_of(content_type, A) == A


@pytest.mark.parametrize("content_type", ["image/svg+xml", "image/heic", "image/jxl", "image/", "image/*", "image/ä"])
def test_other_images_are_a_415(content_type):
    with pytest.raises(UnsupportedTypeError, match="Expected one of image/png, image/jpeg") as caught:
        image_of(content_type, A)
    assert caught.value.http_status == 415


@pytest.mark.parametrize(
    "body",
    [
        FILE + END,
        FIELD + FILE + FIELD + END,
        part('content-disposition: form-data; filename="a"; name="file"') + END,
        part("Content-Disposition: form-data; name=file; filename=../../etc/passwd\nContent-Type: text/plain") + END,
        FILE + b"--xx--",
        FILE + END + b"epilogue",
        b"\r\n" + FILE + END,
    ],
)
def test_the_one_file_of_a_form(body):
    assert image_of(FORM, body) == A


def test_a_real_clients_form():
    request = httpx.Request("POST", "http://x", files={"image": ("shot.png", A, "image/png")}, data={"note": "x"})

    assert image_of(request.headers["content-type"], request.read()) == A


def test_an_empty_file_is_a_file():
    assert image_of(FORM, part('Content-Disposition: form-data; name="f"; filename=""', b"") + END) == b""


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("multipart/form-data", FILE + END, "names no boundary"),
        ("multipart/form-data; boundary=", FILE + END, "names no boundary"),
        ("multipart/form-data; boundary=" + "x" * 300, FILE + END, "Boundary length"),
        ("multipart/form-data; boundary=yy", FILE + END, "Expected multipart/form-data"),
        (FORM, b"", "up to its last boundary"),
        (FORM, FILE, "up to its last boundary"),
        (FORM, (FILE + END)[:-30], "up to its last boundary"),
        (FORM, FIELD + END, "one file in the form. Received: none"),
        (FORM, part("Content-Type: image/png") + END, "one file in the form. Received: none"),
        (FORM, FILE + FILE + END, "one file in the form. Received: more"),
        (FORM, FIELD * 16 + FILE + END, "more than 16 parts"),
        (FORM, part("\n".join(f"X-{n}: a" for n in range(9))) + END, "Maximum header count"),
        (FORM, part("X-Long: " + "a" * 5000) + END, "Maximum header size"),
        (FORM, b"--xx\r\n" + b"a" * 5000, "Maximum header size"),
        (FORM, b'{"instances": []}', "Expected multipart/form-data"),
    ],
)
def test_what_is_wrong_with_a_form_is_a_400(content_type, body, message):
    with pytest.raises(RequestError, match=message) as caught:
        image_of(content_type, body)
    assert caught.value.http_status == 400


def test_a_file_of_another_image_type_is_a_415():
    with pytest.raises(UnsupportedTypeError):
        image_of(FORM, part('Content-Disposition: form-data; name="f"; filename="f"\nContent-Type: image/heic') + END)


@pytest.mark.parametrize("filling", [b"\r\n--xxy", b"\r\n--x", b"\r\n", b"--xx\r\n\r\n"])
def test_no_form_keeps_the_parser_busy(filling):
    start = time.process_time()

    with pytest.raises(RequestError):
        image_of(FORM, FILE + FILE[:60] + b"\r\n\r\n" + filling * (8 * 1024**2 // len(filling)))

    assert time.process_time() - start < 1  # 8 MiB of lookalikes were 3.4 s before parts were counted


def test_a_damaged_form_is_no_line_in_our_log(caplog):
    with pytest.raises(RequestError):
        image_of(FORM, b"damaged")
    assert not caplog.records
