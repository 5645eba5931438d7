"""Request bodies with a Content-Encoding: gzip and deflate, bounded, in both protocols."""

from __future__ import annotations

import base64
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
from factories import image_bytes
from test_endpoint_safety import ask, config_of

from cnn_ray.encoded_bodies import encoding_of, inflate
from cnn_ray.endpoint import Endpoint
from cnn_ray.request_errors import BodyTooLargeError, EncodingError, RequestError

DATA = bytes(range(256)) * 40
MOST = 1 << 20


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": bare_deflate,
}


@pytest.mark.parametrize("name", PACKERS)
def test_a_body_is_inflated(name):
    encoding = encoding_of(f" {name} ")
    assert encoding is not None
    assert inflate(PACKERS[name](DATA), encoding, MOST) == DATA


@pytest.mark.parametrize("header", [None, "", "identity", "Identity"])
def test_a_plain_body_has_no_encoding(header):
    assert encoding_of(header) is None


@pytest.mark.parametrize("header", ["br", "zstd", "gzip, gzip", "identity, gzip", "compress", "gzip;q=1"])
def test_other_encodings_are_refused(header):
    with pytest.raises(EncodingError):
        encoding_of(header)


def test_several_gzip_members_are_one_body():
    assert inflate(gzip.compress(DATA) + gzip.compress(b"more"), "gzip", MOST) == DATA + b"more"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b[:5], lambda b: b[:20] + b"\0\0\0\0" + b[24:]])
def test_damaged_bodies_are_refused(encoding, spoil):
    whole = PACKERS[encoding](DATA)
    with pytest.raises(RequestError) as refused:
        inflate(spoil(whole), encoding, MOST)
    assert refused.value.http_status == 400


def test_plain_bytes_and_bytes_behind_the_stream_are_refused():
    for body, encoding in ((b'{"instances": []}', "gzip"), (zlib.compress(DATA) + b"x", "deflate")):
        with pytest.raises(RequestError):
            inflate(body, encoding, MOST)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_costs_no_more_than_the_limit(encoding):
    bomb = PACKERS[encoding](bytes(256 * MOST))
    tracemalloc.start()
    with pytest.raises(BodyTooLargeError):
        inflate(bomb, encoding, MOST)
    assert tracemalloc.get_traced_memory()[1] < 4 * MOST
    tracemalloc.stop()


def test_a_body_of_exactly_the_limit_passes():
    assert len(inflate(gzip.compress(bytes(MOST)), "gzip", MOST)) == MOST


@pytest.fixture(scope="module")
def endpoint(small_models: str) -> Iterator[Endpoint]:
    opened = Endpoint(config_of(small_models, max_body_bytes=1 << 16))
    yield opened
    opened.close()


def predict(image: bytes) -> bytes:
    return json.dumps({"instances": [{"b64": base64.b64encode(image).decode()}]}).encode()


def infer(image: bytes) -> bytes:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(image).decode()]}
    return json.dumps({"inputs": [tensor]}).encode()


BODIES = {
    "/v1/models/small:predict": (predict, "application/json"),
    "/v1/models/small/versions/1:predict": (bytes, "image/png"),
    "/v2/models/small/infer": (infer, "application/json"),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", PACKERS)
def test_encoded_requests_get_the_answer_of_plain_ones(endpoint, path, name):
    make, kind = BODIES[path]
    body = make(image_bytes(1))
    headers = {"Content-Type": kind}
    plain = ask(endpoint, "POST", path, content=body, headers=headers)
    packed = ask(endpoint, "POST", path, content=PACKERS[name](body), headers={**headers, "Content-Encoding": name})
    assert (plain.status_code, packed.status_code, packed.content) == (200, 200, plain.content)


def test_refusals_have_the_forms_of_the_protocol(endpoint):
    path = "/v1/models/small:predict"
    bomb = ask(endpoint, "POST", path, content=gzip.compress(bytes(1 << 24)), headers={"Content-Encoding": "gzip"})
    assert (bomb.status_code, list(bomb.json())) == (413, ["error"])
    other = ask(endpoint, "POST", path, content=b"x", headers={"Content-Encoding": "br"})
    assert (other.status_code, other.headers["accept-encoding"]) == (415, "gzip, deflate")
    broken = ask(endpoint, "POST", path, content=b"x" * 50, headers={"Content-Encoding": "gzip"})
    assert (broken.status_code, list(broken.json())) == (400, ["error"])
    assert endpoint._body_bytes == 0


NULLS = [{"id": None}, {"parameters": None}, {"outputs": None}, {"parameters": {"binary_data_output": None}}, {"x": 1}]


@pytest.mark.parametrize("extra", NULLS)
def test_optional_fields_may_be_null(endpoint, extra):
    document = json.loads(infer(image_bytes(1)))
    plain = ask(endpoint, "POST", "/v2/models/small/infer", json=document)
    assert ask(endpoint, "POST", "/v2/models/small/infer", json={**document, **extra}).content == plain.content


def test_optional_fields_of_tensors_may_be_null(endpoint):
    document = json.loads(infer(image_bytes(1)))
    plain = ask(endpoint, "POST", "/v2/models/small/infer", json={**document, "outputs": [{"name": "scores"}]})
    document["inputs"][0]["parameters"] = None
    asked = {**document, "outputs": [{"name": "scores", "parameters": None}]}
    assert ask(endpoint, "POST", "/v2/models/small/infer", json=asked).content == plain.content
