"""TensorFlow Serving's REST protocol: what its clients send is understood, what they expect comes back."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from cnn_ray import protocol
from cnn_ray.protocol import BodyTooLargeError, MethodError, PredictRequest, RequestError, Route, UnknownModelError
from cnn_ray.records import QuarantineCode, RowFailure

SIZE = (2, 4)
A, B = b"\x89PNG first", b"\xff\xd8 second"


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def parse(document: object, max_instances: int = 8) -> PredictRequest:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return protocol.parse_predict(body, size_px=SIZE, max_instances=max_instances)


@pytest.mark.parametrize(
    ("document", "columnar"),
    [
        ({"instances": [b64(A), b64(B)]}, False),
        ({"instances": [{"image_bytes": b64(A)}, {"image_bytes": b64(B)}]}, False),
        ({"inputs": [b64(A), b64(B)]}, True),
        ({"inputs": {"image_bytes": [b64(A), b64(B)]}}, True),
        ({"signature_name": "serving_default", "instances": [b64(A), b64(B)]}, False),
        ({"signature_name": "", "inputs": [b64(A), b64(B)]}, True),
    ],
)
def test_every_form_of_an_image_request_means_the_same(document, columnar):
    assert parse(document) == PredictRequest((A, B), columnar)


@pytest.mark.parametrize("text", ["AQIDBA==", "AQIDBA", "AQID\nBA==", " AQIDBA== "])
def test_base64_is_read_as_leniently_as_tensorflow_serving_does(text):
    assert parse({"instances": [{"b64": text}]}).inputs == (b"\x01\x02\x03\x04",)


@pytest.mark.parametrize(
    "wrap", [lambda p: {"instances": p}, lambda p: {"inputs": p}, lambda p: {"inputs": {"pixels": p}}]
)
def test_pixels_become_uint8(wrap):
    pixels = np.arange(2 * 2 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 3)

    request = parse({"signature_name": "serving_pixels", **wrap(pixels.tolist())})

    assert isinstance(request.inputs, np.ndarray)
    assert request.inputs.dtype == np.uint8
    np.testing.assert_array_equal(request.inputs, pixels)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b'{"instances": [', "JSON Parse error: .* at offset: 15"),
        (b"\xff\xfe\xfa", "JSON Parse error"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"instances": [' + b"9" * 5000 + b"]}", "a number is too long"),
        (b"[1]", "Array: Is not object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"instances": [b64(A)], "inputs": [b64(A)]}, "only one of 'inputs' or 'instances'"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"inputs": []}, "No values in 'inputs' array"),
        ({"inputs": {}}, "Missing named input: image_bytes in 'inputs' object."),
        ({"inputs": {"image": [b64(A)]}}, "Missing named input: image_bytes"),
        ({"inputs": b64(A)}, "Expecting 'inputs' to be an list/array"),
        ({"instances": b64(A)}, "Expecting 'instances' to be an list/array"),
        ({"instances": None}, "type Null: Expecting 'instances'"),
        ({"instances": ["text"]}, "element: 0. .* Received: a JSON String"),
        ({"instances": [b64(A), {"image_bytes": b64(A)}]}, "element: 1. .* Received: a JSON Object"),
        ({"instances": [{"image_bytes": b64(A)}, b64(A)]}, "element: 1 .*keys must be equal to: image_bytes"),
        ({"instances": [{"image_bytes": b64(A), "x": 1}]}, "element: 0 .*keys must be equal to: image_bytes"),
        ({"instances": [{"b64": 5}]}, "element: 0"),
        ({"instances": [b64(A), {"b64": "@@@"}]}, "element: 1. Unable to base64 decode"),
        ({"instances": [{"b64": "ä"}]}, "element: 0. Unable to base64 decode"),
        ({"instances": [{"b64": "AQIDBAA=="}]}, "element: 0. Unable to base64 decode"),
        ({"instances": [b64(A)] * 9}, "at most 8 instances. Received: 9"),
        ({"signature_name": "classify", "instances": [b64(A)]}, '"classify" not found in signature def'),
        ({"signature_name": None, "instances": [b64(A)]}, "'signature_name' key must be a string value"),
        ({"signature_name": "serving_pixels", "instances": [b64(A)]}, r"shape \[N, 2, 4, 3\]"),
        ({"signature_name": "serving_pixels", "instances": [[[[0] * 3] * 4]]}, r"shape \[N, 2, 4, 3\]"),
        ({"signature_name": "serving_pixels", "instances": [[[[0] * 3] * 4] * 2, [[[0] * 3] * 3] * 2]}, "shape"),
        ({"signature_name": "serving_pixels", "instances": [[[[256] * 3] * 4] * 2]}, "0 to 255"),
        ({"signature_name": "serving_pixels", "instances": [[[[-1] * 3] * 4] * 2]}, "0 to 255"),
        ({"signature_name": "serving_pixels", "instances": [[[[1.0] * 3] * 4] * 2]}, "0 to 255"),
        ({"signature_name": "serving_pixels", "instances": [[[[True] * 3] * 4] * 2]}, "0 to 255"),
        ({"signature_name": "serving_pixels", "instances": [[[["1"] * 3] * 4] * 2]}, "0 to 255"),
        ({"signature_name": "serving_pixels", "instances": [[[[[1]] * 3] * 4] * 2]}, "0 to 255"),
    ],
)
def test_what_is_wrong_is_a_400_that_says_so(document, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse(document)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/v1/models/demo:predict", Route("predict", "demo")),
        ("POST", "/v1/models/demo/versions/7:predict", Route("predict", "demo", 7)),
        ("GET", "/v1/models/demo", Route("status", "demo")),
        ("HEAD", "/v1/models/demo.v-2_x/versions/0012", Route("status", "demo.v-2_x", 12)),
        ("POST", "/v1/models/demo/labels/champion:predict", Route("predict", "demo", None, "champion")),
        ("POST", "/V1/Models/Demo/Versions/7:Classify", Route("classify", "Demo", 7)),
        ("POST", "/v1/models/demo:explain", Route("explain", "demo")),
        ("POST", "/v1/models/a%2Fb/labels/%C3%A4%3A:predict", Route("predict", "a/b", None, "ä:")),
        ("GET", "/v1/models/demo/metadata", Route("metadata", "demo")),
        ("GET", "/v1/models/demo/labels/champion/METADATA", Route("metadata", "demo", None, "champion")),
    ],
)
def test_routes(method, path, route):
    assert protocol.parse_route(method, path) == route


@pytest.mark.parametrize(
    ("method", "path", "kind", "message"),
    [
        ("GET", "/v1/models/demo:predict", MethodError, "Malformed request: GET /v1/models/demo:predict"),
        ("DELETE", "/v1/models/demo", MethodError, "Malformed request: DELETE /v1/models/demo"),
        ("POST", "/v1/models/demo/metadata", MethodError, "Malformed request"),
        ("GET", "/", UnknownModelError, "Malformed request: GET /"),
        ("POST", "/v2/models/demo:predict", UnknownModelError, "Malformed request"),
        ("GET", "/v1/models", RequestError, "Missing model name in request."),
        ("GET", "/v1/models/versions/3/metadata", RequestError, "Missing model name in request."),
        ("POST", "/v1/models", RequestError, "Malformed request: POST /v1/models"),
        ("GET", "/v1/foo", RequestError, "Malformed request: GET /v1/foo"),
        ("POST", "/v1/models/demo:answer", RequestError, "Malformed request"),
        ("POST", "/v1/models/demo:regress", RequestError, "Expected regression signature method_name to be tensorflow"),
        ("POST", "/v1/models/demo/versions/x:predict", RequestError, "Malformed request"),
        ("POST", "/v1/models/demo/version/3:predict", RequestError, "Malformed request"),
        ("POST", "/v1/models/demo/label/x:predict", RequestError, "Malformed request"),
        ("POST", "/v1/models/demo/versions/3/labels/x:predict", RequestError, "Malformed request"),
        ("POST", "/v1/models/demo/versions/٣:predict", RequestError, "Malformed request"),
        ("POST", "/v1/models/demo:predict\n", RequestError, "Malformed request"),
        ("GET", f"/v1/models/d/versions/{2**63}", RequestError, f"Failed to convert version: {2**63} to numeric."),
        ("GET", f"/v1/models/d/versions/{'9' * 9000}", RequestError, "Failed to convert version"),
    ],
)
def test_other_paths_and_methods(method, path, kind, message):
    with pytest.raises(RequestError) as caught:
        protocol.parse_route(method, path)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (Route("predict", "other", None), "Servable not found for request: Latest(other)"),
        (Route("predict", "other", 1), "Servable not found for request: Specific(other, 1)"),
        (Route("predict", "demo", 7), "Servable not found for request: Specific(demo, 7)"),
        (Route("status", "other", None), "Could not find any versions of model other"),
        (Route("status", "demo", 7), "Could not find version 7 of model demo"),
    ],
)
def test_an_unknown_model_is_told_in_tensorflow_servings_words(route, message):
    with pytest.raises(UnknownModelError) as caught:
        protocol.check_model(route, "demo", 1)
    assert str(caught.value) == message
    assert caught.value.http_status == 404


@pytest.mark.parametrize("version", [None, 1])
def test_the_served_model_is_found(version):
    protocol.check_model(Route("predict", "demo", version), "demo", 1)


def test_body_limits():
    protocol.check_body_size(10, 10)
    with pytest.raises(BodyTooLargeError) as caught:
        protocol.check_body_size(11, 10)
    assert caught.value.http_status == 413
    assert protocol.declared_size(None) == 0
    assert protocol.declared_size("11") == 11
    for wrong in ("-1", "1e3", "", "٣", "9" * 5000):
        with pytest.raises(RequestError):
            protocol.declared_size(wrong)


IMAGES = PredictRequest((A, B), columnar=False)
PIXELS = PredictRequest(np.zeros((2, *SIZE, 3), np.uint8), columnar=False)
SCORES = np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("request_", "columnar", "answer"),
    [
        (IMAGES, False, {"predictions": [
            {"classes": ["bad", "good"], "scores": [0.25, 0.75]}, {"classes": ["bad", "good"], "scores": [1.0, 0.0]}]}),
        (IMAGES, True, {"outputs": {"classes": [["bad", "good"]] * 2, "scores": [[0.25, 0.75], [1.0, 0.0]]}}),
        (PIXELS, False, {"predictions": [[0.25, 0.75], [1.0, 0.0]]}),
        (PIXELS, True, {"outputs": [[0.25, 0.75], [1.0, 0.0]]}),
    ],
)  # fmt: skip
def test_answers_have_tensorflow_servings_shape(request_, columnar, answer):
    body = protocol.build_predictions(PredictRequest(request_.inputs, columnar), ("bad", "good"), SCORES)

    assert json.loads(body) == answer


def test_scores_come_back_with_the_same_bits():
    bits = np.random.default_rng(0).integers(0, 0x3F800000, 20_000, dtype=np.uint32)  # 0 to 1 with all the denormals
    scores = np.concatenate([bits.view(np.float32), np.float32([0, 1, 1e-45, np.finfo(np.float32).tiny])]).reshape(
        -1, 2
    )

    rows = json.loads(protocol.build_predictions(PIXELS, ("a", "b"), scores))["predictions"]

    np.testing.assert_array_equal(np.array(rows, np.float32).view(np.uint32), scores.view(np.uint32))


def test_status_and_error_bodies():
    assert json.loads(protocol.build_status([(3, "AVAILABLE")])) == {
        "model_version_status": [
            {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    assert json.loads(protocol.build_error('say "no" \u2028 ä')) == {"error": 'say "no" \u2028 ä'}
    error = protocol.row_error(2, RowFailure(QuarantineCode.TRUNCATED, "ends early"))
    assert str(error) == "Instance 2 is not a readable image: truncated: ends early"
