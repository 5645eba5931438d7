"""artifact -> scores for a batch of uint8 pixels: the only inference path of scoring, evaluation and serving.

Engines: `openvino` (saved IR; fast on CPUs; ready without importing TensorFlow) and `tensorflow` (frozen concrete
function; on a GPU with XLA and mixed precision). An engine or precision that this node lacks is an error, never a
silent change of the answers.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cnn_ray.artifact import OPENVINO_FILES, WEIGHTS, Artifact, fetch_files
from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ArtifactError, ConfigError
from cnn_ray.memory import keep_freed_memory

if TYPE_CHECKING:
    import keras

Pixels: TypeAlias = NDArray[np.uint8]
Scores: TypeAlias = NDArray[np.float32]
Compute: TypeAlias = Callable[[Pixels], Scores]

PROBES, LEAST_PROBES, PROBING_S = 64, 24, 3.0
"""Images of noise on which two graphs are compared; fewer, but not too few, where that takes longer than so many
seconds. The nets that differ did so on 15 % of the images at the least (LeNet-5), most on two of three."""
PRECISIONS = {"openvino": ("f32", "bf16"), "tensorflow": ("f32", "mixed_bfloat16", "mixed_float16")}
"""What each engine can be asked for."""


class Predictor:
    """Scores of one artifact on one engine and precision; safe to call from several threads at once."""

    def __init__(self, artifact: Artifact, engine: str, precision: str, compute: Compute, concurrency: int = 1) -> None:
        """`concurrency` is how many calls at the same time use the whole node."""
        self.artifact = artifact
        self.engine = engine
        self.precision = precision
        self.concurrency = concurrency
        self._compute = compute

    def predict(self, pixels: Pixels) -> Scores:
        """Scores float32 [N, C] in label order for uint8 RGB pixels [N, H, W, 3] of the model's size.

        A row's score does not depend on the other rows of the batch.

        Raises:
            ConfigError: another shape or dtype.
        """
        height, width = self.artifact.size_px
        if pixels.ndim != 4 or pixels.shape[1:] != (height, width, 3) or pixels.dtype != np.uint8:
            raise ConfigError(
                f"Expected uint8 pixels [N, {height}, {width}, 3]. Received: {pixels.dtype} {list(pixels.shape)}. "
                "Next: resize to the model's input."
            )
        if len(pixels) == 0:
            return np.zeros((0, len(self.artifact.labels)), np.float32)
        return self._compute(pixels)

    def predict_in_batches(self, pixels: Pixels, batch_size: int) -> Scores:
        """Scores float32 [N, C] of any number of rows, computed batch_size rows at a time."""
        starts = range(0, max(len(pixels), 1), batch_size)
        return np.concatenate([self.predict(pixels[start : start + batch_size]) for start in starts])


def load_predictor(
    artifact: Artifact,
    *,
    engine: str = "auto",
    precision: str = "auto",
    num_threads: int = 0,
    use_gpu: bool = False,
    serving: bool = False,
) -> Predictor:
    """The predictor of the artifact, warmed up with one image; `auto` is resolved by `choose_engine`.

    With `serving`, openvino computes in the calling thread: one thread per call under load, all threads for a call that
    is alone. So one client gets the shortest answer, and many get the most answers, with the same bits.

    Raises:
        ArtifactError: damaged files, or this node lacks the engine or precision.
        ConfigError: no such engine or precision.
    """
    engine, precision = choose_engine(artifact, engine, precision, use_gpu=use_gpu)
    concurrency = 1
    if engine == "openvino":
        path = str(fetch_files(artifact, OPENVINO_FILES) / OPENVINO_FILES[0])
        if serving:
            concurrency = num_threads or cpu_count()
            compute = compile_for_serving(path, precision, concurrency)
        else:
            compute = compile_openvino(path, precision, num_threads)
    else:
        compute = _tensorflow_from_artifact(artifact, precision, num_threads)
    predictor = Predictor(artifact, engine, precision, compute, concurrency)
    warm = predictor.predict(np.zeros((1, *artifact.size_px, 3), np.uint8))
    if warm.shape != (1, len(artifact.labels)):
        raise ArtifactError(
            f"Expected {len(artifact.labels)} scores per image from {artifact.reference}. "
            f"Received: {warm.shape[-1]} from {engine}. Next: publish the model again."
        )
    return predictor


def choose_engine(artifact: Artifact, engine: str, precision: str, *, use_gpu: bool = False) -> tuple[str, str]:
    """(engine, precision) with `auto` resolved: TensorFlow where a GPU is asked for, else OpenVINO.

    A precision other than f32 is taken by `auto` only where the figures measured at export allow it, and only where
    this node has it in hardware: bf16 moved a MobileNetV2 by up to 0.235, so it is never a default by belief.

    Raises:
        ConfigError: no such engine or precision, or the artifact's own figures forbid it.
    """
    engine = ("tensorflow" if use_gpu else "openvino") if engine == "auto" else engine
    if engine not in PRECISIONS or precision not in ("auto", *PRECISIONS[engine]):
        raise ConfigError(
            f"Expected for {engine} one of the precisions {', '.join(PRECISIONS.get(engine, ()))}. "
            f"Received: {precision}. Next: leave precision out to let the model's figures decide."
        )
    figures = artifact.description.engines.get(engine, {})
    if precision == "auto":
        fast = [p for p in PRECISIONS[engine] if p != "f32" and p in figures and figures[p].allowed]
        usable = [p for p in fast if (use_gpu if engine == "tensorflow" else p in openvino_precisions())]
        return engine, usable[0] if usable else "f32"
    measured = figures.get(precision)
    if measured is not None and not measured.allowed:
        raise ConfigError(
            f"Expected a precision that {artifact.reference} keeps its answers in. Received: {engine} {precision} "
            f"({measured.flips} of {measured.images} labels flipped at export, largest difference "
            f"{measured.max_abs_diff:.2g}). Next: use f32."
        )
    return engine, precision


def import_openvino() -> Any:
    """The openvino package, imported without its telemetry: a security team's scorer calls nobody at home."""
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # openvino then takes its own stub
    import openvino

    return openvino


def openvino_precisions() -> tuple[str, ...]:
    """The precisions that this node's CPU computes in hardware."""
    capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", "bf16") if "BF16" in capabilities else ("f32",)


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_openvino(path: str, precision: str, num_threads: int) -> Compute:
    """A function of uint8 [N, H, W, 3] giving float32 [N, C], from a saved OpenVINO IR; several threads may call it.

    Images are computed one by one in a graph of fixed shape [1, H, W, 3], as many at a time as there are threads. So a
    score cannot depend on its batch, and it is faster: see tests/bench.

    Raises:
        ArtifactError: this CPU lacks the precision (OpenVINO would silently compute in another one).
    """
    threads = num_threads or cpu_count()
    infer = _compile_single(path, precision, threads, streams=threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="openvino")

    def compute(pixels: Pixels) -> Scores:
        pixels = np.ascontiguousarray(pixels)
        return np.concatenate(list(pool.map(infer, (pixels[k : k + 1] for k in range(len(pixels))))))

    return compute


def compile_for_serving(path: str, precision: str, num_threads: int) -> Compute:
    """The same function with the same bits for requests that come one by one, from up to `num_threads` callers.

    Two graphs: all threads for one image (4.1 ms for an EfficientNetB0 on 2 cores, where one thread takes 7.1) while
    only one call is running, one thread per image (3.7 ms each, over all) while there are more. Threads that share a
    sum add it up in another order: a model in which that changes a bit has the second graph alone.

    Raises:
        ArtifactError: as above.
    """
    narrow = _compile_single(path, precision, num_threads, streams=num_threads)
    wide = _compile_single(path, precision, num_threads, streams=1) if num_threads > 1 else narrow
    if not _same_bits(wide, narrow, path):
        wide = narrow
    running: list[None] = []  # append and pop are atomic

    def compute(pixels: Pixels) -> Scores:
        pixels = np.ascontiguousarray(pixels)
        running.append(None)
        try:
            rows = (pixels[k : k + 1] for k in range(len(pixels)))
            return np.concatenate([(wide if len(running) == 1 else narrow)(row) for row in rows])
        finally:
            running.pop()

    return compute


def _same_bits(one: Compute, other: Compute, path: str) -> bool:
    """Whether the graphs answer noise alike to the bit: the order of additions is in a graph, not in its data."""
    _, *shape = import_openvino().Core().read_model(path).inputs[0].partial_shape
    random, start = np.random.default_rng(0), time.monotonic()
    for number in range(PROBES):
        if time.monotonic() - start > PROBING_S:
            return number >= LEAST_PROBES
        noise = random.integers(0, 256, (1, *(side.get_length() for side in shape)), np.uint8)
        if not np.array_equal(one(noise), other(noise)):
            return False
    return True


def _compile_single(path: str, precision: str, threads: int, *, streams: int) -> Compute:
    """A function of one image uint8 [1, H, W, 3], run by the calling thread's own infer request."""
    if precision not in openvino_precisions():
        raise ArtifactError(
            f"Expected a CPU with {precision}. Received: one without. "
            "Next: run where the plan was made for, or score into another output with --precision f32."
        )
    keep_freed_memory()
    options = {
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # decode threads share these cores
    }
    core = import_openvino().Core()
    graph = core.read_model(path)
    graph.reshape([1, *list(graph.inputs[0].partial_shape)[1:]])
    compiled = core.compile_model(graph, "CPU", options)
    local = threading.local()  # an infer request serves one thread

    def infer(image: Pixels) -> Scores:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return np.array(local.request.infer({0: image}, share_inputs=True)[0], np.float32)

    return infer


def freeze_tensorflow(model: keras.Model, precision: str) -> Compute:
    """A function of uint8 [N, H, W, 3] giving float32 [N, C], from the frozen graph of a Keras model.

    Freezing folds the variables into constants: 15.8 against 22.2 ms per image for `model.predict` (EfficientNetB0).
    """
    import tensorflow as tf

    gpu = bool(tf.config.list_physical_devices("GPU"))
    if precision != "f32" and not gpu:
        raise ArtifactError(
            f"Expected a GPU for {precision}. Received: none on this node. Next: use --precision f32, or a GPU node."
        )
    frozen = frozen_graph(model, jit_compile=gpu or None)
    return lambda pixels: frozen(tf.constant(pixels))[0].numpy()


def frozen_graph(model: keras.Model, *, jit_compile: bool | None = None) -> Any:
    """The model's inference as a TensorFlow concrete function of uint8 [N, H, W, 3] whose weights are constants."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    height, width = model.input_shape[1:3]
    call = tf.function(lambda pixels: model(pixels, training=False), jit_compile=jit_compile)
    concrete = call.get_concrete_function(tf.TensorSpec([None, height, width, 3], tf.uint8, name="pixels"))
    return convert_variables_to_constants_v2(concrete)


def _tensorflow_from_artifact(artifact: Artifact, precision: str, num_threads: int) -> Compute:
    folder = fetch_files(artifact, (WEIGHTS,))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    if num_threads:
        _limit_threads(tf, num_threads)
    model = rebuild_model(artifact.description.definition, len(artifact.labels), str(folder / WEIGHTS), precision)
    return freeze_tensorflow(model, precision)


def _limit_threads(tf: Any, num_threads: int) -> None:
    try:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    except RuntimeError:  # TensorFlow already runs in this process with the threads it has: only speed differs
        return


def rebuild_model(
    definition: ModelDefinition, num_classes: int, weights_path: str, precision: str = "f32"
) -> keras.Model:
    """The Keras model of a description, built by our own code: only numbers come from the weights file.

    Raises:
        ArtifactError: the weights do not fit the description.
    """
    import keras

    from cnn_ray.model import build_classifier

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32" if precision == "f32" else precision)
    try:
        model = build_classifier(definition.model_copy(update={"weights": None}), num_classes)
        model.load_weights(weights_path)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"Expected weights of {definition.architecture} with {num_classes} classes. Received: {reason}. "
            "Next: publish the model again."
        ) from None
    finally:
        keras.config.set_dtype_policy(before)
    return model
