"""TensorFlow Serving's REST protocol: what its clients send is understood, what they expect comes back."""

from __future__ import annotations

import base64
import json
from pathlib import Path

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


@pytest.mark.parametrize("signature", [{}, {"signature_name": ""}, {"signature_name": "serving_pixels"}])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda p: {"instances": p},
        lambda p: {"inputs": p},
        lambda p: {"inputs": {"pixels": p}},
        lambda p: {"instances": [{"pixels": one} for one in p]},
    ],
)
def test_pixels_become_uint8(wrap, signature):
    pixels = np.arange(2 * 2 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 3)

    request = parse({**signature, **wrap(pixels.tolist())})

    assert isinstance(request.inputs, np.ndarray)
    assert request.inputs.dtype == np.uint8
    np.testing.assert_array_equal(request.inputs, pixels)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b'{"instances": [', "JSON Parse error: .* at offset: 15"),
        (b"\xff\xfe\xfa", "JSON Parse error"),
        (b"[" * 200_000, "nested too deeply, 64 levels"),
        (b'{"a":' * 65 + b"0" + b"}" * 65, "nested too deeply, 64 levels"),
        (rb'["\\\\",' * 65 + b"0" + b"]" * 65, "nested too deeply, 64 levels"),  # the quote after \\ ends the string
        (rb'["]","\"]",' * 65 + b"0" + b"]" * 65, "nested too deeply, 64 levels"),  # a bracket in a string closes none
        (b'{"instances":[' + b"1," * 4_000_000, "at most 4000000 commas"),
        (b'{"instances":[' + b"[]," * 1_050_000, "and brackets, 1050000 arrays"),
        (b'{"instances":[' + b"{}," * 100_000, "100000 objects"),
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
        ({"signature_name": "serving_default", "instances": [[[[0] * 3] * 4] * 2]}, "element: 0. .* a JSON Array"),
        ({"signature_name": "serving_default", "inputs": {"pixels": []}}, "Missing named input: image_bytes"),
        ({"instances": [[[[0] * 3] * 4], b64(A)]}, r"shape \[N, 2, 4, 3\]"),
        ({"instances": [{"pixels": [[[0] * 3] * 4] * 2}, {"pixels": b64(A)}]}, r"shape \[N, 2, 4, 3\]"),
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


def test_brackets_in_strings_are_not_depth():
    text = json.dumps({"note": "[" * 500 + '\\"[', "instances": [b64(A)]}).encode()

    assert parse(text).inputs == (A,)


def test_64_levels_are_read():
    with pytest.raises(RequestError, match="Missing 'inputs'"):
        parse(b'{"a":' * 64 + b"0" + b"}" * 64)


@pytest.mark.parametrize(
    "document",
    [
        {"examples": [{"image_bytes": b64(A)}, {"image_bytes": b64(B)}]},
        {"examples": [{"image_bytes": [b64(A)]}, {"image_bytes": b64(B), "caption": "an app", "sizes": [1, 2.5]}]},
        {"examples": [{}, {"image_bytes": b64(B)}], "context": {"image_bytes": b64(A)}},
        {"signature_name": "serving_default", "examples": [{"image_bytes": b64(A)}, {"image_bytes": b64(B)}]},
    ],
)
def test_every_form_of_a_classify_request_means_the_same(document):
    assert protocol.parse_classify(json.dumps(document).encode(), max_instances=2) == (A, B)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"instances": [b64(A)]}, "When method is classify, key 'examples' is expected and was not found"),
        ({"examples": {}}, "Expecting 'examples' value to be an list/array"),
        ({"examples": []}, "'examples' value is an empty array"),
        ({"examples": [b64(A)["b64"]]}, "Example must be JSON object but got JSON String"),
        ({"examples": [{"image_bytes": b64(A)}, {"image": b64(B)}]}, "element: 1. Feature: image_bytes is required"),
        ({"examples": [{"image_bytes": []}]}, "element: 0. Feature: image_bytes wants exactly one value"),
        ({"examples": [{"image_bytes": [b64(A)] * 2}]}, "element: 0. Feature: image_bytes wants exactly one value"),
        ({"examples": [{"image_bytes": "text"}]}, "element: 0. .* a JSON String"),
        ({"examples": [{}], "context": []}, "Example must be JSON object but got JSON Array"),
        ({"examples": [{"image_bytes": b64(A)}] * 3}, "at most 2 instances. Received: 3"),
        ({"signature_name": "other", "examples": [{}]}, "No signature was found with the name: other"),
        ({"signature_name": "serving_pixels", "examples": [{}]}, "Expected classification signature method_name"),
    ],
)
def test_what_is_wrong_with_a_classify_request(document, message):
    with pytest.raises(RequestError, match=message) as caught:
        protocol.parse_classify(json.dumps(document).encode(), max_instances=2)
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
    ("route", "status", "message"),
    [
        (Route("predict", "other"), 404, "Servable not found for request: Latest(other)"),
        (Route("predict", "other", 1), 404, "Servable not found for request: Specific(other, 1)"),
        (Route("classify", "demo", 7), 404, "Servable not found for request: Specific(demo, 7)"),
        (Route("metadata", "demo", 7), 404, "Servable not found for request: Specific(demo, 7)"),
        (Route("status", "other"), 404, "Could not find any versions of model other"),
        (Route("status", "demo", 7), 404, "Could not find version 7 of model demo"),
        (Route("predict", "demo", None, "old"), 400, "Unrecognized servable version label: old"),
        (Route("status", "demo", None, "old"), 400, "Unrecognized servable version label: old"),
    ],
)
def test_an_unknown_model_is_told_in_tensorflow_servings_words(route, status, message):
    error = protocol.model_not_found(route)

    assert isinstance(error, UnknownModelError)
    assert str(error) == message
    assert error.http_status == status


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


def test_classifications_are_pairs_in_label_order():
    body = protocol.build_classifications(("bad", "good"), SCORES)

    assert json.loads(body) == {"results": [[["bad", 0.25], ["good", 0.75]], [["bad", 1.0], ["good", 0.0]]]}


@pytest.mark.parametrize(
    ("positive_label", "threshold", "flagged"),
    [("bad", 0.25, True), ("bad", 0.26, False), ("good", 0.5, True), (None, None, None), (None, 0.5, None)],
)
def test_a_verdict_says_label_score_and_whether_it_is_flagged(positive_label, threshold, flagged):
    body = protocol.build_verdict(
        "demo", 3, ("bad", "good"), SCORES[0], positive_label=positive_label, threshold=threshold
    )

    assert json.loads(body) == {
        "label": "good", "score": 0.75, "flagged": flagged, "scores": {"bad": 0.25, "good": 0.75},
        "model": "demo", "version": 3,
    }  # fmt: skip


def test_metadata_is_what_tensorflow_serving_reads_from_our_saved_model(small_models, small_artifact):
    """Its own steps: the signature map of saved_model.pb, as JSON with all fields and their proto names."""
    from google.protobuf.json_format import MessageToDict
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((Path(small_models) / "small/1/saved_model.pb").read_bytes())
    signatures = {
        name: MessageToDict(signature, always_print_fields_with_no_presence=True, preserving_proto_field_name=True)
        for name, signature in saved.meta_graphs[0].signature_def.items()
    }

    body = protocol.build_metadata("small", 1, small_artifact.labels, small_artifact.size_px)

    assert json.loads(body) == {
        "model_spec": {"name": "small", "signature_name": "", "version": "1"},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def test_status_and_error_bodies():
    ok = {"error_code": "OK", "error_message": ""}
    assert json.loads(protocol.build_status([(3, "AVAILABLE"), (12, "LOADING")])) == {
        "model_version_status": [
            {"version": "12", "state": "LOADING", "status": ok},
            {"version": "3", "state": "AVAILABLE", "status": ok},
        ]
    }
    assert json.loads(protocol.build_error('say "no" \u2028 ä')) == {"error": 'say "no" \u2028 ä'}
    error = protocol.row_error(2, RowFailure(QuarantineCode.TRUNCATED, "ends early"))
    assert str(error) == "Instance 2 is not a readable image: truncated: ends early"
