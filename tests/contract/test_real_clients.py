"""Clients that we did not write, against the endpoint on a real port: tritonclient, curl, and what TensorFlow's own
guides do with requests-like clients."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from factories import SIDE_PX, image_bytes
from google.protobuf import json_format
from running_endpoint import running
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput
from tritonclient.utils import InferenceServerException

from cnn_ray.artifact import Artifact
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.predictor import load_predictor
from cnn_ray.triton_extensions import EXTENSIONS

IMAGES = [image_bytes(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def address(small_models: str) -> Iterator[str]:
    """HOST:PORT of the endpoint of `small@1` under uvicorn."""
    config = ServeConfig(models_uri=small_models, model="small@1", precision="f32", num_threads=1, access_log=False)
    with running(Endpoint(config)) as address:
        yield address


@pytest.fixture(scope="module")
def expected(small_artifact: Artifact) -> np.ndarray:
    """Scores float32 [4, 2] of IMAGES by the predictor that the score job uses."""
    predictor = load_predictor(small_artifact, engine="auto", precision="f32", num_threads=1)
    return predictor.predict(np.stack([pixels_of(data) for data in IMAGES]))


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(address)
    yield made
    made.close()


def pixels_of(data: bytes) -> np.ndarray:
    image = decode(data, (SIDE_PX, SIDE_PX), ImageCaps(max_pixels=10**6, max_bytes=10**6))
    assert isinstance(image, DecodedImage)
    return image.pixels


def image_input(*, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(IMAGES)], "BYTES")
    values = IMAGES if binary else [base64.b64encode(data) for data in IMAGES]
    return tensor.set_data_from_numpy(np.array(values, dtype=np.object_), binary_data=binary)


def pixel_input(*, binary: bool = True) -> triton.InferInput:
    pixels = np.stack([pixels_of(data) for data in IMAGES])
    return triton.InferInput("pixels", list(pixels.shape), "UINT8").set_data_from_numpy(pixels, binary_data=binary)


def check(result: triton.InferResult, expected: np.ndarray) -> None:
    """The scores have the bits of the predictor; the labels are theirs."""
    scores = result.as_numpy("scores")
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected)
    labels = [label.decode() if isinstance(label, bytes) else label for label in result.as_numpy("label")]
    assert labels == [("legitimate", "phishing")[best] for best in expected.argmax(axis=1)]


def test_triton_asks_whether_it_lives_and_what_it_is(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("small")
    assert client.is_model_ready("small", "1")
    assert not client.is_model_ready("small", "9")
    assert client.get_server_metadata()["extensions"] == list(EXTENSIONS)
    metadata = client.get_model_metadata("small")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["image", "pixels"]
    assert metadata["versions"] == ["1"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("tensor", [image_input, pixel_input])
def test_triton_infers_in_json_and_in_binary(client, expected, tensor, binary_in):
    check(client.infer("small", [tensor(binary=binary_in)]), expected)  # names no outputs: all, in binary
    for binary_out in (True, False):
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("scores", "label")]
        result = client.infer(
            "small", [tensor(binary=binary_in)], model_version="1", outputs=outputs, request_id="shot 17"
        )
        check(result, expected)
        assert result.get_response()["id"] == "shot 17"


def test_triton_gets_only_the_outputs_it_names(client, expected):
    result = client.infer("small", [image_input()], outputs=[triton.InferRequestedOutput("scores")])

    np.testing.assert_array_equal(result.as_numpy("scores"), expected)
    assert result.as_numpy("label") is None


def test_triton_shows_our_errors(client):
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'half' is not found") as caught:
        client.infer("half", [image_input()])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="unexpected inference output 'logits'") as caught:
        client.infer("small", [image_input()], outputs=[triton.InferRequestedOutput("logits")])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="'classification' of 'scores' only"):
        client.infer("small", [image_input()], outputs=[triton.InferRequestedOutput("label", class_count=2)])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("count", "answered"), [(1, 1), (2, 2), (5, 2)])
def test_triton_asks_for_the_best_classes(client, expected, count, answered, binary):
    wanted = triton.InferRequestedOutput("scores", binary_data=binary, class_count=count)

    classes = client.infer("small", [image_input()], outputs=[wanted]).as_numpy("scores")

    assert classes.shape == (len(IMAGES), answered)
    for row, scores in zip(classes, expected, strict=True):
        texts = [text.decode() if isinstance(text, bytes) else text for text in row]
        best = np.argsort(-scores, kind="stable")[:count]
        assert [text.split(":")[1:] for text in texts] == [[str(k), ("legitimate", "phishing")[k]] for k in best]
        assert [np.float32(text.split(":")[0]) for text in texts] == scores[best].tolist()


def test_triton_asks_for_the_configuration(client):
    config = client.get_model_config("small", "1")
    metadata = client.get_model_metadata("small")

    parsed = json_format.ParseDict(config, ModelConfig())  # Triton's own message: no field of it is unknown
    assert parsed.name == "small"
    for kind, described in ((parsed.input, metadata["inputs"]), (parsed.output, metadata["outputs"])):
        assert [(one.name, [-1, *one.dims]) for one in kind] == [(one["name"], one["shape"]) for one in described]
    assert [DataType.Name(one.data_type) for one in parsed.input] == ["TYPE_STRING", "TYPE_UINT8"]
    assert [DataType.Name(one.data_type) for one in parsed.output] == ["TYPE_STRING", "TYPE_FP32"]
    assert parsed.input[1].format == ModelInput.FORMAT_NHWC
    assert client.get_model_config("small") == config
    too_many = np.zeros((parsed.max_batch_size + 1, SIDE_PX, SIDE_PX, 3), np.uint8)
    tensor = triton.InferInput("pixels", list(too_many.shape), "UINT8").set_data_from_numpy(too_many)
    with pytest.raises(InferenceServerException, match=f"1 to {parsed.max_batch_size} instances"):
        client.infer("small", [tensor])
    with pytest.raises(InferenceServerException, match="version 9 is not found"):
        client.get_model_config("small", "9")


def test_triton_asks_for_the_index_and_may_load_nothing(client, address):
    index = client.get_model_repository_index()

    assert {"name": "small", "version": "1", "state": "READY", "reason": ""} in index
    ready = httpx.post(f"http://{address}/v2/repository/index", json={"ready": True}).json()
    assert ready == [entry for entry in index if entry["state"] == "READY"]
    assert httpx.post(f"http://{address}/v2/repository/index", json={"ready": None}).json() == index
    for body in ('{"ready": 1}', "[]", "{"):
        assert httpx.post(f"http://{address}/v2/repository/index", content=body).status_code == 400
    for request in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="as the store's aliases say") as caught:
            request("small")
        assert caught.value.status() == "400"
    assert client.is_model_ready("small")


def test_triton_asks_for_statistics(client):
    def one() -> dict:
        (found,) = client.get_inference_statistics("small", "1")["model_stats"]
        return found

    before = one()
    client.infer("small", [image_input()])
    with pytest.raises(InferenceServerException):
        client.infer("small", [image_input()], outputs=[triton.InferRequestedOutput("logits")])
    after = one()

    assert (after["name"], after["version"]) == ("small", "1")
    assert after["inference_count"] - before["inference_count"] == len(IMAGES)
    assert 1 <= after["execution_count"] - before["execution_count"] <= len(IMAGES)
    assert after["last_inference"] > 1e12
    for kind in ("success", "fail"):
        was, now = before["inference_stats"][kind], after["inference_stats"][kind]
        assert now["count"] - was["count"] == 1
        assert now["ns"] > was["ns"]
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert client.get_inference_statistics() == client.get_inference_statistics("small") == {"model_stats": [after]}
    with pytest.raises(InferenceServerException, match="'half' is not found"):
        client.get_inference_statistics("half")
    with pytest.raises(InferenceServerException, match="version 9 is not found"):
        client.get_inference_statistics("small", "9")


def test_a_client_of_tensorflow_serving(address, expected):
    """The steps of TensorFlow's REST guide: json.dumps, post, json.loads of the text, np.array."""
    headers = {"content-type": "application/json"}
    instances = [{"image_bytes": {"b64": base64.b64encode(data).decode("utf-8")}} for data in IMAGES]
    data = json.dumps({"signature_name": "serving_default", "instances": instances})

    response = httpx.post(f"http://{address}/v1/models/small:predict", content=data, headers=headers)

    predictions = json.loads(response.text)["predictions"]
    scores = np.array([one["scores"] for one in predictions], np.float32)
    np.testing.assert_array_equal(scores, expected)
    assert all(one["classes"] == ["legitimate", "phishing"] for one in predictions)


def test_a_client_of_tensorflow_serving_that_sends_pixels(address, expected):
    data = json.dumps({"instances": np.stack([pixels_of(data) for data in IMAGES]).tolist()})

    response = httpx.post(f"http://{address}/v1/models/small/versions/1:predict", content=data)

    np.testing.assert_array_equal(np.array(response.json()["predictions"], np.float32), expected)


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True, timeout=30).stdout


def test_the_curl_lines_of_api_rest(address, expected):
    status = json.loads(curl(f"http://{address}/v1/models/small"))
    assert status["model_version_status"][0]["state"] == "AVAILABLE"

    body = json.dumps({"instances": [{"b64": base64.b64encode(IMAGES[0]).decode()}]})
    answer = json.loads(curl("-d", body, "-X", "POST", f"http://{address}/v1/models/small:predict"))
    np.testing.assert_array_equal(np.array(answer["predictions"][0]["scores"], np.float32), expected[0])

    refused = curl("-i", "-d", '{"instances": [1.0,5.0]}', "-X", "POST", f"http://{address}/v1/models/half:predict")
    head, _, text = refused.partition("\n\n")  # universal newlines
    assert head.splitlines()[0] == "HTTP/1.1 404 Not Found"
    assert json.loads(text) == {"error": "Servable not found for request: Latest(half)"}


def test_curl_sends_an_image_as_it_is_or_as_a_form(address, expected, tmp_path):
    shot = tmp_path / "shot.png"
    shot.write_bytes(IMAGES[1])
    url = f"http://{address}/v1/models/small:predict"

    plain = json.loads(curl("--data-binary", f"@{shot}", "-H", "Content-Type: image/png", url))
    form = json.loads(curl("-F", f"file=@{shot}", url))

    assert plain == form
    assert plain["label"] == ("legitimate", "phishing")[int(expected[1].argmax())]
    assert np.float32(plain["score"]) == expected[1].max()


def test_curl_sends_a_raw_image_to_the_open_inference_protocol(address, expected, tmp_path):
    shot = tmp_path / "shot.png"
    shot.write_bytes(IMAGES[2])

    answer = json.loads(
        curl(
            "--data-binary",
            f"@{shot}",
            "-H",
            "Inference-Header-Content-Length: 0",
            f"http://{address}/v2/models/small/infer",
        )
    )

    np.testing.assert_array_equal(np.array(answer["outputs"][1]["data"], np.float32), expected[2])
