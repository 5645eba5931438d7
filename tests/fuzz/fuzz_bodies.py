"""Coverage-guided fuzzing of everything that reads a request: routes, JSON, binary tensors, forms, their images.

    python3 -m venv /tmp/fuzz
    /tmp/fuzz/bin/pip install atheris numpy pillow deflate simplejpeg opencv-python-headless pyarrow pydantic \
        python-multipart
    /tmp/fuzz/bin/python tests/fuzz/fuzz_bodies.py CORPUS_FOLDER -runs=1000000 -timeout=5 -rss_limit_mb=1024

The first byte of an input says which parser gets the rest, and whether as it is or as the choices from which a JSON
document of the protocols' own words is made: bytes that mutate seldom stay JSON. What may never happen: an exception
that is no RequestError, a value that is not what the parser promises, a message that is long or cannot be sent, 5 s for
one input, or 1 GiB.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["cnn_ray", "python_multipart", "json"]):
    from cnn_ray import image_bodies, open_inference, protocol
    from cnn_ray.images import DecodedImage, ImageCaps, decode
    from cnn_ray.request_errors import RequestError

SIZE, MOST = (2, 3), 4
CAPS = ImageCaps(max_pixels=4_000_000, max_bytes=1_000_000)
FORM = "multipart/form-data; boundary=xx"


def check_inputs(inputs: object) -> None:
    """Raises AssertionError where parsed inputs are not what the endpoint works with."""
    if isinstance(inputs, np.ndarray):
        assert inputs.dtype == np.uint8
        assert inputs.shape[1:] == (*SIZE, 3)
    else:
        assert isinstance(inputs, tuple)
        for image in inputs:
            check_image(image)
    assert 1 <= len(inputs) <= MOST


def check_image(data: object) -> None:
    """Raises AssertionError where an image is no bytes, or its decode is neither pixels nor a failure."""
    assert type(data) is bytes
    answer = decode(data, SIZE, CAPS)
    if isinstance(answer, DecodedImage):
        assert answer.pixels.shape == (*SIZE, 3)
    else:
        check_error(protocol.row_error(0, answer))


def predict(data: bytes) -> None:
    request = protocol.parse_predict(data, size_px=SIZE, max_instances=MOST)
    check_inputs(request.inputs)
    scores = np.full((len(request.inputs), 2), 0.5, np.float32)
    json.loads(protocol.build_predictions(request, ("a", "b"), scores))


def classify(data: bytes) -> None:
    check_inputs(protocol.parse_classify(data, max_instances=MOST))


def infer(data: bytes) -> None:
    """The two bytes at the front are the header's length, as far as the rest goes."""
    (length,) = struct.unpack(">H", data[:2].rjust(2, b"\0"))
    body = data[2:]
    header = str(length) if length else None
    request = open_inference.parse_infer(body, header, size_px=SIZE, max_instances=MOST)
    check_inputs(request.inputs)
    scores = np.full((len(request.inputs), 2), 0.5, np.float32)
    answer, size = open_inference.build_infer(request, "demo", 1, ("a", "b"), scores)
    json.loads(answer[:size])


def form(data: bytes) -> None:
    check_image(image_bodies.image_of(FORM, data))


def any_type(data: bytes) -> None:
    kind, _, body = data.partition(b"\n")
    image = image_bodies.image_of(kind.decode("latin-1"), body)
    if image is not None:
        check_image(image)


def route(data: bytes) -> None:
    method, _, path = data.decode("latin-1").partition(" ")
    for parse in (protocol.parse_route, open_inference.parse_route):
        try:
            found = parse(method, path)
        except RequestError as error:
            check_error(error)
        else:
            assert found.version is None or 0 <= found.version < 2**63


def check_error(error: RequestError) -> None:
    """Raises AssertionError where an error cannot go out as it is."""
    assert 400 <= error.http_status < 500
    assert len(str(error)) < 600
    json.loads(protocol.build_error(str(error)))


KEYS = [
    "instances", "inputs", "outputs", "examples", "context", "signature_name", "image_bytes", "pixels", "b64", "name",
    "datatype", "shape", "data", "parameters", "binary_data", "binary_data_size", "binary_data_output", "id", "other",
]  # fmt: skip
PIXELS = np.zeros((1, *SIZE, 3), np.uint8)
VALUES = [
    None, True, False, 0, 1, 2, 3, 18, 255, 2**63, -1, 0.5, float("nan"), "", "image", "pixels", "label", "scores",
    "BYTES", "UINT8", "AAAA", "AAA", "A", " A\nA ", "serving_default", "serving_pixels", {"b64": "AAAA"}, {"b64": ""},
    [1], [1, 1], [1, *SIZE, 3], PIXELS.tolist(), PIXELS[0].tolist(), PIXELS.ravel().tolist(), ["AAAA"], [["AAAA"]],
    {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}, {"image_bytes": {"b64": "AAAA"}},
]  # fmt: skip

PARSERS: tuple[Callable[[bytes], None], ...] = (predict, classify, infer, form, any_type, route)


def invented(choices: bytes) -> bytes:
    """A JSON document of words that the protocols know."""
    provider = atheris.FuzzedDataProvider(choices)

    def value(depth: int) -> object:
        kind = provider.ConsumeIntInRange(0, 9 if depth else 6)
        if kind >= 8:
            return {provider.PickValueInList(KEYS): value(depth - 1) for _ in range(provider.ConsumeIntInRange(0, 4))}
        if kind >= 7:
            return [value(depth - 1) for _ in range(provider.ConsumeIntInRange(0, 4))]
        return provider.PickValueInList(VALUES) if kind else provider.ConsumeIntInRange(-5, 300)

    document = {provider.PickValueInList(KEYS): value(6) for _ in range(provider.ConsumeIntInRange(1, 4))}
    return json.dumps(document).encode() + provider.ConsumeBytes(provider.remaining_bytes())


def one_input(data: bytes) -> None:
    """Raises where a parser does not keep its promise."""
    if not data:
        return
    rest = invented(data[1:]) if data[0] >= 128 else data[1:]
    if data[0] >= 128 and data[0] % len(PARSERS) == PARSERS.index(infer):
        rest = struct.pack(">H", rest.rfind(b"}") + 1 if data[0] % 2 else 0) + rest
    try:
        PARSERS[data[0] % len(PARSERS)](rest)
    except RequestError as error:
        check_error(error)


def write_corpus(folder: Path) -> None:
    """One good body of each form lies in the folder, for a start that reaches all of the parsers."""
    from factories import image_bytes

    image = image_bytes(1, (4, 3))
    text = {"b64": base64.b64encode(image).decode()}
    pixels = np.zeros((1, *SIZE, 3), np.uint8)
    packed = struct.pack("<I", len(image)) + image
    head = json.dumps(
        {
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(packed)}}
            ],
            "outputs": [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "label"}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    flat = {"name": "pixels", "datatype": "UINT8", "shape": [1, *SIZE, 3], "data": pixels.ravel().tolist()}
    bodies: list[tuple[int, bytes]] = [
        (0, json.dumps({"signature_name": "serving_default", "instances": [text, text]}).encode()),
        (0, json.dumps({"instances": [{"image_bytes": text}]}).encode()),
        (0, json.dumps({"inputs": {"image_bytes": [text]}}).encode()),
        (0, json.dumps({"inputs": {"pixels": pixels.tolist()}}).encode()),
        (0, json.dumps({"signature_name": "serving_pixels", "instances": pixels.tolist()}).encode()),
        (1, json.dumps({"examples": [{"image_bytes": [text]}, {}], "context": {"image_bytes": text}}).encode()),
        (2, b"\0\0" + json.dumps({"id": "1", "inputs": [flat]}).encode()),
        (2, struct.pack(">H", len(head)) + head + packed),
        (3, b'--xx\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n'
            b"Content-Type: image/png\r\n\r\n" + image + b"\r\n--xx--\r\n"),
        (4, b"image/png\n" + image),
        (4, b"multipart/form-data; boundary=xx\n--xx\r\n\r\n\r\n--xx--"),
        (5, b"POST /v1/models/demo/labels/champion:predict"),
        (5, b"GET /v1/models/demo/versions/3/metadata"),
        (5, b"GET /v2/models/demo/versions/3/ready"),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for number, (parser, body) in enumerate(bodies):
        (folder / f"good-{number}").write_bytes(bytes([parser]) + body)


if __name__ == "__main__":
    write_corpus(Path(next(a for a in sys.argv[1:] if not a.startswith("-"))))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
