"""Triton's extensions as bytes: classes of scores, configuration, index, statistics."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from cnn_ray import open_inference, triton_extensions
from cnn_ray.endpoint_metrics import EndpointMetrics, render
from cnn_ray.infer_bodies import InferRequest
from cnn_ray.model_counts import read_counts
from cnn_ray.request_errors import RequestError
from cnn_ray.triton_extensions import VersionCounts, classified

LABELS = ("bad", "good", "pörn:18")
SCORES = np.array([[0.25, 0.75, 0.0], [0.1, 1e-7, 0.9]], np.float32)
IMAGES = (b"one", b"two")


def test_best_classes_come_first_and_say_score_index_label():
    assert classified(SCORES, LABELS, 2) == [["0.75:1:good", "0.25:0:bad"], ["0.9:2:pörn:18", "0.1:0:bad"]]
    assert classified(SCORES, LABELS, 10**30)[1] == ["0.9:2:pörn:18", "0.1:0:bad", "0.0000001:1:good"]


def test_of_equal_scores_the_first_class_comes_first_as_for_the_label():
    even = np.full((1, 3), 1 / 3, np.float32)

    assert [text.split(":")[1] for text in classified(even, LABELS, 3)[0]] == ["0", "1", "2"]


@pytest.mark.parametrize("seed", range(3))
def test_scores_in_classes_are_the_same_float32(seed):
    scores = np.random.default_rng(seed).dirichlet([0.05] * 40, 20).astype(np.float32)
    for row, texts in zip(scores, classified(scores, [str(k) for k in range(40)], 40), strict=True):
        for text in texts:
            value, index, label = text.split(":")
            assert np.float32(value) == row[int(index)]
            assert "e" not in value
            assert label == index


def test_classes_in_the_answer_in_json_and_in_binary():
    request = InferRequest(IMAGES, None, (("scores", False), ("label", False)), classes=2)
    body, length = open_inference.build_infer(request, "demo", 3, LABELS, SCORES)
    assert length is None
    assert json.loads(body)["outputs"] == [
        {
            "name": "scores",
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": ["0.75:1:good", "0.25:0:bad", "0.9:2:pörn:18", "0.1:0:bad"],
        },
        {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["good", "pörn:18"]},
    ]

    request = InferRequest(IMAGES, None, (("scores", True),), classes=1)
    body, length = open_inference.build_infer(request, "demo", 3, LABELS, SCORES)
    texts = [text.encode() for text in ("0.75:1:good", "0.9:2:pörn:18")]
    assert body[length:] == b"".join(struct.pack("<I", len(text)) + text for text in texts)
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": len(body) - (length or 0)}


@pytest.mark.parametrize(("count", "classes"), [(None, 0), (0, 0), (1, 1), (10**30, 10**30)])
def test_how_many_classes_are_asked_for(count, classes):
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGk="]}
    outputs = [{"name": "scores", "parameters": {"classification": count}}, {"name": "label"}]
    body = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()

    assert open_inference.parse_infer(body, None, size_px=(2, 4), max_instances=4).classes == classes


@pytest.mark.parametrize(
    ("body", "ready"), [(b"", False), (b"{}", False), (b'{"ready":true}', True), (b'{"ready":null,"x":1}', False)]
)
def test_an_index_request(body, ready):
    assert triton_extensions.parse_index(body) is ready


@pytest.mark.parametrize("body", [b"[]", b"null", b'{"ready":"true"}', b"ready", b"\xff"])
def test_no_index_request(body):
    with pytest.raises(RequestError):
        triton_extensions.parse_index(body)


def busy() -> EndpointMetrics:
    metrics = EndpointMetrics()
    for model, version in (("demo", 3), ('od"d\\', 1)):
        metrics.predicted(4, 0.25, model, version)
        metrics.predicted(1, 0.5, model, version)
        for code in (200, 400, 499):
            metrics.started()
            metrics.finished("infer", code, 1.0, model, version)
        metrics.started()
        metrics.finished("model_metadata", 200, 9.0, model, version)  # no inference
    metrics.started()
    metrics.finished("infer", 404, 9.0, "unknown", 8)
    return metrics


def test_counts_of_all_replicas_are_read_back():
    text = render({"a": busy().snapshot(), "b": busy().snapshot()})

    counts = VersionCounts(successes=2, success_s=2.0, failures=4, failure_s=4.0, images=10, calls=4, call_s=1.5)
    assert read_counts(text) == {("demo", 3): counts, ('od"d\\', 1): counts}
    assert read_counts(b"") == {}


def test_statistics():
    counts = {("demo", 3): VersionCounts(successes=2, success_s=0.5, images=9, calls=3, call_s=0.25)}

    body = triton_extensions.build_statistics([("demo", 3), ("demo", 4)], counts, {("demo", 3): 1_700_000_000_000})

    first, second = json.loads(body)["model_stats"]
    assert (first["name"], first["version"], first["last_inference"]) == ("demo", "3", 1_700_000_000_000)
    assert (first["inference_count"], first["execution_count"]) == (9, 3)
    assert first["inference_stats"]["success"] == {"count": 2, "ns": 500_000_000}
    assert first["inference_stats"]["compute_infer"] == {"count": 3, "ns": 250_000_000}
    assert first["inference_stats"]["queue"] == {"count": 0, "ns": 0}
    assert (second["version"], second["inference_count"], second["last_inference"]) == ("4", 0, 0)
