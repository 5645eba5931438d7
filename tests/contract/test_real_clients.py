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
from running_endpoint import running
from tritonclient.utils import InferenceServerException

from cnn_ray.artifact import Artifact
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.predictor import load_predictor

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
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
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
    with pytest.raises(InferenceServerException, match="'classification' is not supported"):
        client.infer("small", [image_input()], outputs=[triton.InferRequestedOutput("scores", class_count=2)])


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
