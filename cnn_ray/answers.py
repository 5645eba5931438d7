"""What is asked of a model -> the answer: both protocols, and the short form for people and scripts.

No limits, keys, deadlines or logs here: `cnn_ray.endpoint` has those around every request. Nothing here opens a path or
URL that a caller names: a model name is looked up among the configured ones, a version is a number.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from cnn_ray import image_bodies, open_inference, protocol, triton_extensions
from cnn_ray.batcher import Pixels, Scores
from cnn_ray.config import ServeConfig
from cnn_ray.errors import ArtifactError, CnnRayError
from cnn_ray.explain import Occlusion, drawn_size, overlay_png
from cnn_ray.images import DecodedImage
from cnn_ray.model_counts import read_counts
from cnn_ray.records import RowFailure
from cnn_ray.served_models import ImageDecoder, ServedModel, ServedModels

JSON = "application/json"
T = TypeVar("T")

LARGE_BODY_BYTES = 256 * 1024
"""From here on a body is parsed in a thread, for others' sake; below, a thread costs more than the parsing."""
MOST_PARSING = 2
"""Large bodies that are parsed at the same time: 64 MiB of JSON are half a gigabyte of Python values for a moment."""
EXPLAIN_BATCH = 8
"""Variants of an explanation that wait for the model at a time, so that others' images come between them."""


def _reason(error: CnnRayError) -> str:
    found = re.search(r"Received: (.+?)\. Next: ", str(error)) if isinstance(error, ArtifactError) else None
    received = found.group(1) if found else "an error"
    return f"The version cannot be loaded: {received}. The one before it answers. See the log of the server."


@dataclass(slots=True)
class Call:
    """One HTTP request, and what is learnt of it on its way."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes = b""
    key: str | None = None
    action: str = ""
    model: str = ""
    version: int | None = None
    instances: int = 0
    decode_s: float = 0.0
    predict_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What was counted: the metrics of all replicas as text, and when this replica last answered with a version."""

    metrics_text: Callable[[], Awaitable[bytes]]
    last_ms: Mapping[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP response."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict[str, str])


class Answers:
    """Answers of the configured models; for use in one event loop."""

    def __init__(self, config: ServeConfig, models: ServedModels, decoder: ImageDecoder, figures: Figures) -> None:
        self._config = config
        self._models = models
        self._decoder = decoder
        self._figures = figures
        self._explaining = asyncio.Semaphore(1)
        self._parsers = ThreadPoolExecutor(MOST_PARSING, thread_name_prefix="parse")
        self._images = 0

    async def tensorflow(self, call: Call, route: protocol.Route) -> Answer:
        """The answer to a request of TensorFlow Serving's REST API, or to one of our own forms of it.

        Raises:
            RequestError: it cannot be answered; the message is for the client.
        """
        if route.action in ("status", "metadata"):
            return await self._description(call, route)
        version = self._models.version_of(route.name, route.label) if route.label is not None else route.version
        model = None
        if route.label is None or version is not None:
            model = await self._version(call, route.name, version)
        if model is None:
            raise protocol.model_not_found(route)
        artifact = model.artifact
        content_type = call.headers.get("content-type")
        image = await self._parse(call, lambda: image_bodies.image_of(content_type, call.body))
        if route.action == "explain":
            return Answer(200, await self._explain(call, model, image), "image/png")
        if image is not None and route.action == "predict":
            scores = await self._scores(call, model, (image,))
            body = protocol.build_verdict(
                artifact.name,
                artifact.version,
                artifact.labels,
                scores[0],
                positive_label=artifact.positive_label,
                threshold=artifact.threshold,
            )
            return Answer(200, body)
        if route.action == "classify":
            images = await self._parse(
                call, lambda: protocol.parse_classify(call.body, max_instances=self._config.max_instances)
            )
            scores = await self._scores(call, model, images)
            return Answer(200, protocol.build_classifications(artifact.labels, scores))
        parsed = await self._parse(
            call,
            lambda: protocol.parse_predict(
                call.body, size_px=artifact.size_px, max_instances=self._config.max_instances
            ),
        )
        scores = await self._scores(call, model, parsed.inputs)
        return Answer(200, protocol.build_predictions(parsed, artifact.labels, scores))

    async def open_inference(self, call: Call, route: open_inference.Route) -> Answer:
        """The answer to a request of the Open Inference Protocol (v2).

        Raises:
            RequestError: it cannot be answered; the message is for the client.
        """
        if route.action in ("live", "ready"):
            return Answer(200, open_inference.build_health(route.action))
        if route.action == "server_metadata":
            return Answer(200, open_inference.build_server_metadata())
        if route.action == "server_statistics":
            return await self._statistics(self._loaded_of(None))
        if route.action == "repository_index":
            return await self._index(call)
        if route.action == "repository_control":
            raise triton_extensions.refuse_control(call.path.rpartition("/")[2])
        if route.action != "infer":
            return await self._model_description(call, route)
        model = await self._version(call, route.name, route.version)
        if model is None:
            raise open_inference.model_not_found(route)
        artifact = model.artifact
        parsed = await self._parse(
            call,
            lambda: open_inference.parse_infer(
                call.body,
                call.headers.get("inference-header-content-length"),
                size_px=artifact.size_px,
                max_instances=self._config.max_instances,
            ),
        )
        scores = await self._scores(call, model, parsed.inputs)
        body, header_length = open_inference.build_infer(
            parsed, artifact.name, artifact.version, artifact.labels, scores
        )
        if header_length is None:
            return Answer(200, body)
        return Answer(200, body, "application/octet-stream", {"Inference-Header-Content-Length": str(header_length)})

    async def _description(self, call: Call, route: protocol.Route) -> Answer:
        version = route.version
        if version is None:
            version = self._models.version_of(route.name, route.label)
        failures = self._failures(route.name)
        if version in failures and route.action == "status":
            return Answer(200, protocol.build_status((), {version: failures[version]}))
        artifact = None if version is None else await self._models.describe(route.name, version)
        if artifact is None:
            raise protocol.model_not_found(route)
        call.model, call.version = artifact.name, artifact.version
        if route.action == "metadata":
            body = protocol.build_metadata(artifact.name, artifact.version, artifact.labels, artifact.size_px)
            return Answer(200, body)
        versions = {artifact.version}
        if route.version is None and route.label is None:
            versions |= self._loaded_versions(route.name)
        else:
            failures = {}
        return Answer(200, protocol.build_status([(version, "AVAILABLE") for version in versions], failures))

    async def _model_description(self, call: Call, route: open_inference.Route) -> Answer:
        version = self._models.version_of(route.name) if route.version is None else route.version
        if version in self._failures(route.name) and route.action == "model_ready":
            return Answer(503, open_inference.build_model_ready(route.name, ready=False))
        artifact = None if version is None else await self._models.describe(route.name, version)
        if artifact is None:
            raise open_inference.model_not_found(route)
        call.model, call.version = artifact.name, artifact.version
        if route.action == "model_ready":
            return Answer(200, open_inference.build_model_ready(artifact.name))
        if route.action == "model_config":
            most = self._config.max_instances
            return Answer(200, triton_extensions.build_config(artifact.name, artifact.labels, artifact.size_px, most))
        if route.action == "model_statistics":
            own = {(artifact.name, artifact.version)}
            return await self._statistics(own if route.version is not None else own | self._loaded_of(route.name))
        versions = sorted({artifact.version} | self._loaded_versions(route.name))
        body = open_inference.build_model_metadata(artifact.name, versions, artifact.labels, artifact.size_px)
        return Answer(200, body)

    async def _statistics(self, versions: set[tuple[str, int]]) -> Answer:
        """Return what all replicas counted of the versions; when each last answered is of this replica alone."""
        text = await self._figures.metrics_text()
        counts = await asyncio.get_running_loop().run_in_executor(None, read_counts, text)
        return Answer(200, triton_extensions.build_statistics(sorted(versions), counts, self._figures.last_ms))

    async def _index(self, call: Call) -> Answer:
        """Return every version of the configured models: those in memory, and unless only those are asked for, the
        ones that cannot be loaded and the ones that a request would load."""
        only_ready = await self._parse(call, lambda: triton_extensions.parse_index(call.body))
        loaded = self._loaded_of(None)
        entries: list[tuple[str, int, triton_extensions.State, str]] = []
        for name in sorted(self._models.names):
            failures = self._failures(name)
            stored = frozenset[int]() if only_ready else await self._models.versions(name)
            for version in sorted(stored | self._loaded_versions(name) | (set() if only_ready else set(failures))):
                if (name, version) in loaded:
                    entries.append((name, version, "READY", ""))
                else:
                    reason = failures.get(version, triton_extensions.NOT_IN_MEMORY)
                    entries.append((name, version, "UNAVAILABLE", reason))
        return Answer(200, triton_extensions.build_index(entries))

    def _loaded_of(self, name: str | None) -> set[tuple[str, int]]:
        """Return (model, version) of all in memory, or of one model's."""
        keys = {(model.artifact.name, model.artifact.version) for model in self._models.loaded}
        return {key for key in keys if name in (None, key[0])}

    def _failures(self, name: str) -> dict[int, str]:
        """Return the model's versions that an alias means and that cannot be loaded, with a reason for clients: what a
        damaged file is called, but not where it lies."""
        return {version: _reason(error) for (_, version), error in self._models.failed(name).items()}

    def _loaded_versions(self, name: str) -> set[int]:
        return {model.artifact.version for model in self._models.loaded if model.artifact.name == name}

    async def _version(self, call: Call, name: str, version: int | None) -> ServedModel | None:
        if version is None:
            version = self._models.canary_version(name, call.body) if call.body else self._models.version_of(name)
        if version is None:
            return None
        model = await self._models.get(name, version)
        if model is not None:
            call.model, call.version = name, version
        return model

    async def _explain(self, call: Call, model: ServedModel, image: bytes | None) -> bytes:
        if image is None:
            parsed = await self._parse(
                call, lambda: protocol.parse_predict(call.body, size_px=model.artifact.size_px, max_instances=1)
            )
            if isinstance(parsed.inputs, np.ndarray):
                raise protocol.RequestError("Expected an encoded image to explain. Received: pixels.")
            image = parsed.inputs[0]
        if self._explaining.locked():
            raise protocol.OverloadedError("Another explanation is being made. Next: try again.")
        async with self._explaining:
            call.instances = 1
            decoded = (await self._decode(call, model, (image,)))[0]
            base = (await self._predict(call, model, [decoded.pixels]))[0]
            best = int(base.argmax())
            occlusion = Occlusion(decoded.pixels)
            scores: list[Scores] = []
            for variants in occlusion.batches(EXPLAIN_BATCH):
                scores.append((await self._predict(call, model, variants))[:, best])
            heat = occlusion.heat(float(base[best]), np.concatenate(scores))
            size = (decoded.width_px, decoded.height_px)
            drawn = await self._decoder.decode(image, drawn_size(*size))
            shown = decoded if isinstance(drawn, RowFailure) else drawn
            draw = partial(overlay_png, shown.pixels, heat, *size)
            return await asyncio.get_running_loop().run_in_executor(None, draw)

    async def _scores(self, call: Call, model: ServedModel, inputs: Sequence[bytes] | Pixels) -> Scores:
        """Scores float32 [N, C] of encoded images or pixels uint8 [N, H, W, 3]."""
        count = call.instances = len(inputs)
        most = self._config.max_instances + self._config.max_ongoing_requests
        if self._images + count > most:
            raise protocol.OverloadedError(f"{self._images} images are being scored, at most {most} can be.")
        self._images += count
        try:
            if isinstance(inputs, np.ndarray):
                return await self._predict(call, model, inputs)
            return await self._predict(call, model, [i.pixels for i in await self._decode(call, model, inputs)])
        finally:
            self._images -= count

    async def _decode(self, call: Call, model: ServedModel, images: Sequence[bytes]) -> list[DecodedImage]:
        start = time.perf_counter()
        size_px = model.artifact.size_px
        if len(images) == 1:
            answers = [await self._decoder.decode(images[0], size_px)]
        else:
            answers = await asyncio.gather(*(self._decoder.decode(data, size_px) for data in images))
        call.decode_s += time.perf_counter() - start
        decoded: list[DecodedImage] = []
        for index, answer in enumerate(answers):
            if isinstance(answer, RowFailure):
                raise protocol.row_error(index, answer)
            decoded.append(answer)
        return decoded

    async def _predict(self, call: Call, model: ServedModel, rows: Iterable[Pixels]) -> Scores:
        start = time.perf_counter()
        scores = await model.batcher.scores(rows)
        call.predict_s += time.perf_counter() - start
        return scores

    async def _parse(self, call: Call, work: Callable[[], T]) -> T:
        if len(call.body) < LARGE_BODY_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._parsers, work)
