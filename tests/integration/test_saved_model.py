"""A published version in TensorFlow's own loader, in a process that has neither cnn_ray nor Keras: what TensorFlow
Serving would answer for encoded screenshots, against our answers.

TensorFlow decodes and resizes inside the graph, and neither is ours: it does not scale a JPEG while decoding, and takes
the area mean in one step. Measured on drawn screenshots of six sizes, 120 as PNG and 120 as baseline JPEG, as mean and
largest |difference| of scores: the trained simple_cnn below 0.003 and 0.053 (PNG), 0.003 and 0.036 (JPEG), no flip;
another one 0.005 and 0.029, 0.007 and 0.045, 1 flip of 120 each; MobileNetV2 with a head trained on 160 drawn
screenshots, at 224 px, 0.007 and 0.064, 0.009 and 0.113, no flip.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnn_ray.artifact import Artifact
from cnn_ray.config import ModelDefinition
from cnn_ray.drawing import LABELS, draw_screenshot, encode
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.predictor import load_predictor

SIZES_PX = ((1366, 768), (1920, 1080), (360, 800), (1280, 720), (1024, 768), (412, 915))
TOLERANCE = (0.02, 0.15)
"""Mean and largest |difference| of scores; at most 2.5 % of the labels flip."""
RANDOM_WEIGHTS_TOLERANCE = (0.001, 0.005)
"""Random weights make little of any image, so little of a difference too."""
FLIP_RATE = 0.025
LOAD = """
import sys
sys.modules["cnn_ray"] = sys.modules["keras"] = None  # importing either is an error from here on
from pathlib import Path
import numpy as np
import tensorflow as tf
serving = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
encoded = [path.read_bytes() for path in sorted(Path(sys.argv[2]).iterdir())]
answers = [serving(image_bytes=tf.constant(encoded[k : k + 8])) for k in range(0, len(encoded), 8)]
scores, classes = (np.concatenate([a[key].numpy() for a in answers]) for key in ("scores", "classes"))
np.savez(sys.argv[3], scores=scores, classes=classes.astype(str))
"""


def draw(folder: Path, count: int, seed: int, suffixes: tuple[str, ...] = ("PNG", "JPEG")) -> list[Path]:
    """Files of drawn screenshots, labels and formats in turn, in the order of their names."""
    folder.mkdir()
    paths: list[Path] = []
    for k in range(count):
        format = suffixes[k // 2 % len(suffixes)]
        width_px, height_px = SIZES_PX[k // 4 % len(SIZES_PX)]
        path = folder / f"{k:04d}.{format.lower()}"
        page = draw_screenshot(LABELS[k % 2], seed + k, width_px=width_px, height_px=height_px)
        path.write_bytes(encode(page, format, seed + k))
        paths.append(path)
    return paths


def pixels_of(paths: list[Path], size_px: tuple[int, int]) -> np.ndarray:
    images = [decode(path.read_bytes(), size_px, ImageCaps()) for path in paths]
    assert all(isinstance(image, DecodedImage) for image in images)
    return np.stack([image.pixels for image in images])


def in_a_fresh_process(artifact: Artifact, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(scores [N, C], classes [N, C]) by TensorFlow alone."""
    out = folder.parent / "answers.npz"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, artifact.uri, str(folder), str(out)]
    ran = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with np.load(out) as answers:
        return answers["scores"], answers["classes"]


def agree(artifact: Artifact, paths: list[Path], tolerance: tuple[float, float]) -> str:
    """The figures as a line, after they were found within the tolerance; PNG and JPEG each for itself."""
    theirs, classes = in_a_fresh_process(artifact, paths[0].parent)
    ours = load_predictor(artifact, engine="openvino", precision="f32").predict(pixels_of(paths, artifact.size_px))
    assert classes.tolist() == [list(artifact.labels)] * len(paths)
    assert theirs.dtype == np.float32
    lines = []
    for suffix in (".png", ".jpeg"):
        chosen = np.array([path.suffix == suffix for path in paths])
        difference = np.abs(ours - theirs)[chosen]
        flips = int((ours.argmax(1) != theirs.argmax(1))[chosen].sum())
        lines.append(
            f"{suffix} mean {difference.mean():.4f} max {difference.max():.4f} flips {flips} of {chosen.sum()}"
        )
        assert difference.mean() <= tolerance[0], lines[-1]
        assert difference.max() <= tolerance[1], lines[-1]
        assert flips <= max(1, FLIP_RATE * chosen.sum()), lines[-1]
    return "; ".join(lines)


def test_tensorflow_alone_answers_as_we_do(small_artifact, tmp_path, capsys):
    line = agree(small_artifact, draw(tmp_path / "shots", 24, seed=50_000), RANDOM_WEIGHTS_TOLERANCE)

    with capsys.disabled():
        print(f"\nsmall@1: {line}")


@pytest.mark.slow
def test_tensorflow_alone_answers_as_we_do_for_a_trained_model(tmp_path, capsys):
    import keras

    from cnn_ray.export import publish_artifact
    from cnn_ray.model import build_classifier

    definition = ModelDefinition(architecture="simple_cnn", input_size_px=96)
    keras.utils.set_random_seed(0)
    model = build_classifier(definition, len(LABELS), seed=0)
    learnt = pixels_of(draw(tmp_path / "learnt", 160, seed=10_000), (96, 96))
    truth = np.arange(160) % 2
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy")
    model.fit(learnt, truth, epochs=8, batch_size=16, verbose=0)
    artifact = publish_artifact(
        model,
        models_uri=str(tmp_path / "models"),
        name="trained",
        definition=definition,
        labels=LABELS,
        positive_label="phishing",
        threshold=0.5,
        validation_pixels=learnt[:64],
        validation_labels=truth[:64],
        training={},
    )
    paths = draw(tmp_path / "shots", 240, seed=50_000)

    line = agree(artifact, paths, TOLERANCE)

    scores = load_predictor(artifact, engine="openvino", precision="f32").predict(pixels_of(paths, (96, 96)))
    assert scores[:, 1].std() > 0.2, "a model that knows nothing would agree with anybody"
    with capsys.disabled():
        print(f"\ntrained@1: {line}")
