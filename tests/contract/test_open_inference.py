"""The Open Inference Protocol v2: what clients of Triton and KServe send is understood, and answered as they expect."""

from __future__ import annotations

import base64
import json
import struct

import numpy as np
import pytest

from cnn_ray import __version__, open_inference
from cnn_ray.open_inference import InferRequest, Route
from cnn_ray.request_errors import MethodError, RequestError, UnknownModelError
from cnn_ray.triton_extensions import EXTENSIONS

SIZE = (2, 4)
A, B = b"\x89PNG first", b"\xff\xd8 second"
BOTH = (("label", False), ("scores", False))
PIXELS = np.arange(2 * 2 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 3)
SCORES = np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image(**changes: object) -> dict[str, object]:
    return {"name": "image", "datatype": "BYTES", "shape": [2], "data": [b64(A), b64(B)], **changes}


def pixels(**changes: object) -> dict[str, object]:
    return {"name": "pixels", "datatype": "UINT8", "shape": [2, 2, 4, 3], "data": PIXELS.tolist(), **changes}


def without_data(tensor: dict[str, object], size: int) -> dict[str, object]:
    del tensor["data"]
    return {**tensor, "parameters": {"binary_data_size": size}}


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def parse(document: object, tail: bytes | None = None) -> InferRequest:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    length = None if tail is None else str(len(head))
    return open_inference.parse_infer(head + (tail or b""), length, size_px=SIZE, max_instances=4)


@pytest.mark.parametrize(
    "tensor",
    [image(), image(shape=[2, 1]), image(shape=[2, 1], data=[[b64(A)], [b64(B)]]), image(parameters={"note": "x"})],
)
def test_images_in_json_are_base64(tensor):
    assert parse({"inputs": [tensor]}) == InferRequest((A, B), None, BOTH)


def test_one_image_nested():
    assert parse({"inputs": [image(shape=[1, 1], data=[[b64(A)]])]}).inputs == (A,)


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_images_as_binary_tensor(shape):
    tail = packed(A, B)

    assert parse({"inputs": [without_data(image(shape=shape), len(tail))]}, tail).inputs == (A, B)


def test_the_whole_body_may_be_one_image():
    assert open_inference.parse_infer(A, "0", size_px=SIZE, max_instances=4) == InferRequest((A,), None, BOTH)


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.ravel().tolist(), PIXELS.reshape(2, -1).tolist()])
def test_pixels_in_json_may_be_nested_or_flat(data):
    np.testing.assert_array_equal(parse({"inputs": [pixels(data=data)]}).inputs, PIXELS)


def test_pixels_as_binary_tensor():
    request = parse({"inputs": [without_data(pixels(), PIXELS.size)]}, PIXELS.tobytes())

    assert isinstance(request.inputs, np.ndarray)
    assert request.inputs.dtype == np.uint8
    np.testing.assert_array_equal(request.inputs, PIXELS)


@pytest.mark.parametrize(
    ("changes", "outputs"),
    [
        ({}, BOTH),
        ({"outputs": []}, BOTH),
        ({"parameters": {"binary_data_output": True, "priority": 3}}, (("label", True), ("scores", True))),
        ({"outputs": [{"name": "scores"}]}, (("scores", False),)),
        ({"outputs": [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "label"}]},
         (("scores", True), ("label", False))),
        ({"parameters": {"binary_data_output": True},
          "outputs": [{"name": "scores", "parameters": {"binary_data": False}}, {"name": "label"}]},
         (("scores", False), ("label", True))),
    ],
)  # fmt: skip
def test_requested_outputs(changes, outputs):
    assert parse({"inputs": [image()], "id": "4 2", **changes}) == InferRequest((A, B), "4 2", outputs)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "The document is empty"),
        (b"\xff", "not UTF-8"),
        ([], "Is not object"),
        ({}, "'inputs' as a list of one tensor"),
        ({"inputs": []}, "'inputs' as a list of one tensor"),
        ({"inputs": [image(), pixels()]}, "'inputs' as a list of one tensor"),
        ({"inputs": ["image"]}, "an input as a JSON object"),
        ({"inputs": [image(name="data")]}, "unexpected inference input 'data'"),
        ({"inputs": [image(name=None)]}, "unexpected inference input 'None'"),
        ({"inputs": [image(datatype="UINT8")]}, "datatype BYTES of 'image'. Received: UINT8"),
        ({"inputs": [pixels(datatype="FP32")]}, "datatype UINT8 of 'pixels'. Received: FP32"),
        ({"inputs": [image(shape=None)]}, "Expected 'shape'"),
        ({"inputs": [image(shape=[])]}, "Expected 'shape'"),
        ({"inputs": [image(shape=[-1])]}, "Expected 'shape'"),
        ({"inputs": [image(shape=[True])]}, "Expected 'shape'"),
        ({"inputs": [image(shape=[2.0])]}, "Expected 'shape'"),
        ({"inputs": [image(shape=[2**64])]}, "Expected 'shape'"),
        ({"inputs": [image(shape=[0], data=[])]}, "1 to 4 instances. Received: 0"),
        ({"inputs": [image(shape=[5], data=[b64(A)] * 5)]}, "1 to 4 instances. Received: 5"),
        ({"inputs": [image(shape=[2, 2])]}, r"shape \[N\] or \[N, 1\]"),
        ({"inputs": [image(shape=[1])]}, "'data' with the 1 elements"),
        ({"inputs": [image(data=None)]}, "'data' with the 2 elements"),
        ({"inputs": [image(data=[b64(A), 3])]}, "element: 1. Expected base64 text"),
        ({"inputs": [image(data=[b64(A), "@@@"])]}, "element: 1. Unable to base64 decode"),
        ({"inputs": [image(parameters=[])]}, "'parameters' as a JSON object"),
        ({"inputs": [image(parameters={"shared_memory_region": "/x"})]}, "'shared_memory_region' is not supported"),
        ({"inputs": [image(parameters={"binary_data_size": 8})]}, "Expected 0 as 'binary_data_size'"),
        ({"inputs": [pixels(shape=[2, 4, 2, 3])]}, r"shape \[N, 2, 4, 3\] of 'pixels'"),
        ({"inputs": [pixels(data=PIXELS.ravel().tolist()[:-1])]}, "'data' with the 48 elements"),
        ({"inputs": [pixels(data=[256] * 48)]}, "0 to 255"),
        ({"inputs": [pixels(data=[1.0] * 48)]}, "0 to 255"),
        ({"inputs": [pixels(data=[[1]] * 48)]}, "0 to 255"),
        ({"inputs": [image()], "id": 42}, "'id' as a string"),
        ({"inputs": [image()], "parameters": {"binary_data_output": 1}}, "'binary_data_output' as true or false"),
        ({"inputs": [image()], "outputs": {}}, "'outputs' as a list"),
        ({"inputs": [image()], "outputs": ["label"]}, "an output as a JSON object"),
        ({"inputs": [image()], "outputs": [{"name": "logits"}]}, "unexpected inference output 'logits'"),
        ({"inputs": [image()], "outputs": [{"name": "label"}, {"name": "label"}]}, "output 'label'"),
        ({"inputs": [image()], "outputs": [{"name": "label", "parameters": {"classification": 2}}]},
         "'classification' of 'scores' only. Received: of 'label'"),
        ({"inputs": [image()], "outputs": [{"name": "scores", "parameters": {"classification": -1}}]}, "0 or more"),
        ({"inputs": [image()], "outputs": [{"name": "scores", "parameters": {"classification": "2"}}]}, "0 or more"),
        ({"inputs": [image()], "outputs": [{"name": "scores", "parameters": {"classification": True}}]}, "0 or more"),
        ({"inputs": [image()], "outputs": [{"name": "scores", "parameters": {"classification": 1.5}}]}, "0 or more"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_says_so(document, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse(document)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("tensor", "tail", "message"),
    [
        (without_data(image(), 8), packed(A), "Expected 14 as 'binary_data_size'"),
        (without_data(image(), True), b"\x01", "as 'binary_data_size'"),
        (image(), b"more", "unexpected additional input data: 4 bytes"),
        (image(parameters={"binary_data_size": 14}), packed(A), "Received: both"),
        (without_data(image(), 14), packed(A), "Expected 2 elements"),
        (without_data(image(shape=[1]), 27), packed(A, B), "Expected 1 elements"),
        (without_data(image(), 15), packed(A) + b"\xff", "Expected 2 elements"),
        (without_data(image(shape=[1]), 8), struct.pack("<I", 2**32 - 1) + b"abcd", "Expected 1 elements"),
        (without_data(pixels(), 47), PIXELS.tobytes()[:47], "Expected 48 bytes of 'pixels'"),
    ],
)
def test_binary_tensors_must_be_as_long_as_they_say(tensor, tail, message):
    with pytest.raises(RequestError, match=message):
        parse({"inputs": [tensor]}, tail)


@pytest.mark.parametrize("length", ["", "-1", "1e1", "99999", "٣", "9" * 5000])
def test_a_wrong_header_length(length):
    with pytest.raises(RequestError, match="Inference-Header-Content-Length") as caught:
        open_inference.parse_infer(b"{}", length, size_px=SIZE, max_instances=4)
    assert len(str(caught.value)) < 300


def test_no_image_at_all():
    with pytest.raises(RequestError, match="an encoded image as the body"):
        open_inference.parse_infer(b"", "0", size_px=SIZE, max_instances=4)


def test_answer_in_json():
    body, length = open_inference.build_infer(InferRequest((A, B), "4 2"), "demo", 3, ("bad", "good"), SCORES)

    assert length is None
    assert json.loads(body) == {
        "model_name": "demo",
        "model_version": "3",
        "id": "4 2",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["good", "bad"]},
            {"name": "scores", "datatype": "FP32", "shape": [2, 2], "data": [0.25, 0.75, 1.0, 0.0]},
        ],
    }


def test_answer_in_binary():
    request = InferRequest((A, B), None, (("scores", True), ("label", True)))

    body, length = open_inference.build_infer(request, "demo", 3, ("bä", "good"), SCORES)

    assert length is not None
    assert json.loads(body[:length]) == {
        "model_name": "demo",
        "model_version": "3",
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
            {"name": "label", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 15}},
        ],
    }
    assert body[length:] == SCORES.tobytes() + packed(b"good", "bä".encode())


def test_answer_half_in_binary():
    request = InferRequest((A, B), None, (("label", False), ("scores", True)))

    body, length = open_inference.build_infer(request, "demo", 3, ("bad", "good"), SCORES)

    assert [("data" in output) for output in json.loads(body[:length])["outputs"]] == [True, False]
    assert length is not None
    assert body[length:] == SCORES.tobytes()


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/v2/health/live", Route("live")),
        ("HEAD", "/v2/health/ready", Route("ready")),
        ("GET", "/v2", Route("server_metadata")),
        ("GET", "/v2/", Route("server_metadata")),
        ("GET", "/v2/models/demo", Route("model_metadata", "demo")),
        ("GET", "/v2/models/demo/versions/3", Route("model_metadata", "demo", 3)),
        ("GET", "/v2/models/demo/ready", Route("model_ready", "demo")),
        ("GET", "/v2/models/demo/versions/3/ready", Route("model_ready", "demo", 3)),
        ("POST", "/v2/models/demo/infer", Route("infer", "demo")),
        ("POST", "/v2/models/a%2Fb/versions/3/infer", Route("infer", "a/b", 3)),
        ("GET", "/v2/models/demo/config", Route("model_config", "demo")),
        ("GET", "/v2/models/demo/versions/3/config", Route("model_config", "demo", 3)),
        ("GET", "/v2/models/demo/stats", Route("model_statistics", "demo")),
        ("HEAD", "/v2/models/demo/versions/3/stats", Route("model_statistics", "demo", 3)),
        ("GET", "/v2/models/stats", Route("server_statistics")),
        ("POST", "/v2/repository/index", Route("repository_index")),
        ("POST", "/v2/repository/models/a%2Fb/load", Route("repository_control", "a/b")),
        ("POST", "/v2/repository/models/demo/unload", Route("repository_control", "demo")),
    ],
)
def test_routes(method, path, route):
    assert open_inference.parse_route(method, path) == route


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v2/models/demo/infer", MethodError),
        ("POST", "/v2/models/demo", MethodError),
        ("DELETE", "/v2", MethodError),
        ("GET", "/v2/repository/index", MethodError),
        ("GET", "/v2/repository/models/demo/load", MethodError),
        ("POST", "/v2/models/demo/config", MethodError),
        ("POST", "/v2/models/stats", MethodError),
        ("POST", "/v2/repository/models/demo/reload", UnknownModelError),
        ("POST", "/v2/repository/other/index", UnknownModelError),
        ("GET", "/v2/models", UnknownModelError),
        ("GET", "/v2/health", UnknownModelError),
        ("GET", "/v2/models/demo/versions/three", UnknownModelError),
        ("GET", f"/v2/models/demo/versions/{2**63}", UnknownModelError),
        ("GET", f"/v2/models/demo/versions/{'9' * 9000}/ready", UnknownModelError),
        ("GET", "/v2/models/demo/", UnknownModelError),
        ("GET", "/V2/models/demo", UnknownModelError),
    ],
)
def test_other_paths_and_methods(method, path, kind):
    with pytest.raises(RequestError) as caught:
        open_inference.parse_route(method, path)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 300


def test_metadata_and_health():
    assert json.loads(open_inference.build_health("live")) == {"live": True}
    assert json.loads(open_inference.build_health("ready")) == {"ready": True}
    assert json.loads(open_inference.build_model_ready("demo")) == {"name": "demo", "ready": True}
    assert json.loads(open_inference.build_server_metadata()) == {
        "name": "cnn_ray", "version": __version__, "extensions": list(EXTENSIONS)
    }  # fmt: skip
    assert json.loads(open_inference.build_model_metadata("demo", [2, 3], ("bad", "good"), SIZE)) == {
        "name": "demo",
        "versions": ["2", "3"],
        "platform": "tensorflow_savedmodel",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 2, 4, 3]},
        ],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, 2]},
        ],
        "parameters": {"label_0": "bad", "label_1": "good"},
    }
    assert str(open_inference.model_not_found(Route("infer", "demo", 3))) == (
        "Request for unknown model: 'demo' version 3 is not found"
    )
