"""Keras model -> published artifact: SavedModel, weights, OpenVINO IR; every engine is measured first."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_ray.artifact import (
    FORMAT,
    OPENVINO_FILES,
    WEIGHTS,
    Artifact,
    ArtifactDescription,
    EngineFigures,
    FileRecord,
    claim_version,
    publish_folder,
    sha256_of,
)
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ArtifactError
from cnn_ray.exif_graph import jpeg_orientation, resized_upright
from cnn_ray.images import RESIZE_RULE
from cnn_ray.predictor import (
    PRECISIONS,
    Compute,
    Pixels,
    Scores,
    compile_openvino,
    freeze_tensorflow,
    frozen_graph,
    import_openvino,
    openvino_precisions,
    rebuild_model,
)

if TYPE_CHECKING:
    import keras

MAX_F32_DIFFERENCE = 1e-4
"""Engines in float32 differ by summation order only; more than this is a wrong conversion, not rounding."""
MAX_FLIP_RATE = 0.005
"""Largest share of labels that a reduced precision may change."""
MEASURED_IMAGES = 512
"""Images on which engines are compared, at the most."""


Fit = Callable[[Path, dict[str, dict[str, EngineFigures]]], tuple[float, dict[str, Any]]]


def publish_artifact(
    model: keras.Model,
    *,
    models_uri: str,
    name: str,
    definition: ModelDefinition,
    labels: Sequence[str],
    positive_label: str | None,
    threshold: float,
    validation_pixels: Pixels,
    validation_labels: np.ndarray,
    training: Mapping[str, Any],
    fit: Fit | None = None,
) -> Artifact:
    """The next version of the model, written whole; artifact.json names every digest and every engine's figures.

    Args:
        model: uint8 pixels [N, H, W, 3] -> float32 scores [N, C].
        validation_pixels: uint8 [N, H, W, 3], real images that the engines are compared on.
        validation_labels: int [N], their class indices.
        fit: gives threshold and calibration record from the exported folder and the engines' figures.

    Raises:
        ArtifactError: an engine in float32 does not agree with Keras; nothing is published.
    """
    with tempfile.TemporaryDirectory(prefix="cnn_ray-export-") as temporary:
        folder = Path(temporary)
        model.save_weights(folder / WEIGHTS)
        _write_saved_model(model, list(labels), folder)
        _write_openvino(model, folder)
        pixels, truth = validation_pixels[:MEASURED_IMAGES], validation_labels[:MEASURED_IMAGES]
        figures = measure_engines(model, definition, folder, pixels, truth)
        calibration = None
        if fit is not None:
            threshold, calibration = fit(folder, figures)
        height, width = model.input_shape[1:3]
        description = ArtifactDescription(
            format=FORMAT,
            name=name,
            version=claim_version(models_uri, name),
            definition=definition,
            labels=tuple(labels),
            size_px=(height, width),
            resize_rule=RESIZE_RULE,
            positive_label=positive_label,
            threshold=threshold,
            calibration=calibration,
            files=_file_records(folder),
            engines=figures,
            training=dict(training),
            libraries={
                package: installed(package) for package in ("tensorflow", "keras", "openvino", "numpy", "pillow")
            },
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return publish_folder(folder, models_uri, description)


def measure_engines(
    model: keras.Model, definition: ModelDefinition, folder: Path, pixels: Pixels, truth: np.ndarray
) -> dict[str, dict[str, EngineFigures]]:
    """engine -> precision -> figures against Keras in float32, for all that this machine can compute.

    Raises:
        ArtifactError: an engine in float32 differs from Keras by more than 1e-4.
    """
    import tensorflow as tf

    reference = _in_batches(lambda batch: np.asarray(model(batch, training=False)), pixels)
    engines: dict[str, dict[str, Compute]] = {"openvino": {}, "tensorflow": {"f32": freeze_tensorflow(model, "f32")}}
    for precision in openvino_precisions():
        engines["openvino"][precision] = compile_openvino(str(folder / OPENVINO_FILES[0]), precision, 0)
    if tf.config.list_physical_devices("GPU"):
        for precision in PRECISIONS["tensorflow"][1:]:
            mixed = rebuild_model(definition, model.output_shape[-1], str(folder / WEIGHTS), precision)
            engines["tensorflow"][precision] = freeze_tensorflow(mixed, precision)
    return {
        engine: {
            p: compare_scores(f"{engine} {p}", _in_batches(c, pixels), reference, truth) for p, c in computes.items()
        }
        for engine, computes in engines.items()
    }


def compare_scores(what: str, scores: Scores, reference: Scores, truth: np.ndarray) -> EngineFigures:
    """Figures of one engine and precision, with the verdict whether `auto` may use it.

    Float32 must agree within 1e-4. A reduced precision may flip at most 0.5 % of the labels, and its accuracy must
    stay inside the 95 % Wilson interval of the reference's accuracy (Wilson 1927), so that noise is not taken for loss.

    Raises:
        ArtifactError: float32 differs by more, or any score is not finite.
    """
    difference = float(np.max(np.abs(scores - reference), initial=0.0))
    flips = int(np.sum(scores.argmax(1) != reference.argmax(1)))
    accuracy, reference_accuracy = (float(np.mean(s.argmax(1) == truth)) for s in (scores, reference))
    full = what.endswith(" f32")
    if not np.all(np.isfinite(scores)) or (full and difference > MAX_F32_DIFFERENCE):
        raise ArtifactError(
            f"Expected {what} to answer like Keras within {MAX_F32_DIFFERENCE}. Received: a difference of "
            f"{difference:.3g} and {flips} other labels on {len(truth)} images. "
            "Next: report the layer that converts wrongly; nothing was published."
        )
    low, high = _wilson_interval(reference_accuracy, len(truth))
    allowed = full or (flips <= MAX_FLIP_RATE * len(truth) and low <= accuracy <= high)
    return EngineFigures(max_abs_diff=difference, flips=flips, images=len(truth), accuracy=accuracy, allowed=allowed)


def _wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def _in_batches(compute: Compute, pixels: Pixels, batch_size: int = 32) -> Scores:
    return np.concatenate([compute(pixels[k : k + batch_size]) for k in range(0, len(pixels), batch_size)])


def _write_saved_model(model: keras.Model, labels: list[str], folder: Path) -> None:
    """Afterwards the folder is a servable: TensorFlow Serving answers from bytes or pixels without our code.

    Decoding in the graph follows images.py (stretch, area, EXIF orientation of a JPEG), but TensorFlow's decoders are
    not Pillow's: scores for the same file may differ slightly, which the serving tests state.
    """
    import keras
    import tensorflow as tf

    height, width = model.input_shape[1:3]
    names = tf.constant(labels)

    def decode(encoded: Any) -> Any:
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        image.set_shape([None, None, 3])
        return resized_upright(image, jpeg_orientation(encoded), (height, width))

    def from_bytes(image_bytes: Any) -> dict[str, Any]:
        pixels = tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec((height, width, 3), tf.uint8))
        scores = model(pixels, training=False)
        return {"classes": tf.repeat(names[tf.newaxis], tf.shape(scores)[0], axis=0), "scores": scores}

    def from_pixels(pixels: Any) -> dict[str, Any]:
        return {"scores": model(pixels, training=False)}

    archive: Any = keras.export.ExportArchive()  # typed as a union over Keras's backends
    archive.track(model)
    archive.add_endpoint("serving_default", from_bytes, [tf.TensorSpec([None], tf.string, "image_bytes")])
    archive.add_endpoint("serving_pixels", from_pixels, [tf.TensorSpec([None, height, width, 3], tf.uint8, "pixels")])
    archive.write_out(str(folder / "saved_model"), verbose=False)
    for item in (folder / "saved_model").iterdir():
        item.rename(folder / item.name)
    (folder / "saved_model").rmdir()


def _write_openvino(model: keras.Model, folder: Path) -> None:
    """Afterwards openvino/ holds the IR of the frozen graph.

    Frozen first, because the converter cannot see through variables and custom gradients: it then leaves 1 transpose
    instead of 46 in an EfficientNetB0 (21 against 33 ms per image). Keras's own export gave a 3-6x slower graph.
    """
    openvino = import_openvino()
    import tensorflow as tf

    height, width = model.input_shape[1:3]
    pixels = tf.TensorSpec([None, height, width, 3], tf.uint8, name="pixels")
    frozen = frozen_graph(model)
    concrete = tf.function(lambda pixels: frozen(pixels)[0]).get_concrete_function(pixels)
    (folder / "openvino").mkdir()
    with _converter_knows_tensorflow(tf.__version__):
        converted = openvino.convert_model(concrete)
    openvino.save_model(converted, str(folder / OPENVINO_FILES[0]), compress_to_fp16=False)


@contextmanager
def _converter_knows_tensorflow(version: str) -> Iterator[None]:
    """Tell OpenVINO's converter the version of TensorFlow inside the block.

    It asks with `exec("import tensorflow")` and `exec("del tensorflow")` in one function. Since Python 3.13 (PEP 667)
    the second `exec` does not see what the first one bound: every conversion ends with a NameError (OpenVINO 2026.4).
    """
    from openvino.frontend.tensorflow import utils

    name = "get_environment_setup"
    original = getattr(utils, name)
    setattr(utils, name, lambda _framework: {"tensorflow": version})
    try:
        yield
    finally:
        setattr(utils, name, original)


def _file_records(folder: Path) -> dict[str, FileRecord]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_of(path), size_bytes=path.stat().st_size)
        for path in files
    }
