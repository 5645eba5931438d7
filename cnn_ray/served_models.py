"""The model versions that a replica answers with: loaded warm, followed when an alias moves, forgotten when unused.

`NAME` alone means what the configured reference means now. Any other version or alias of a configured name is loaded
when somebody asks; the least recently used ones go. A version that was in use stays whole until its last request is
answered: requests hold the object, and what nobody holds is freed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cnn_ray.artifact import Artifact, list_versions, load_artifact, read_aliases, split_reference
from cnn_ray.batcher import Batcher
from cnn_ray.config import ServeConfig
from cnn_ray.decoders import Decoders
from cnn_ray.errors import ArtifactError, CnnRayError
from cnn_ray.images import DecodedImage, ImageCaps
from cnn_ray.predictor import Predictor, cpu_count, load_predictor
from cnn_ray.records import RowFailure
from cnn_ray.request_errors import OverloadedError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LARGEST_INPUT_PX = 2048
"""Model inputs, and drawings of explanations, have at most this many pixels squared; memory nobody touches is free."""
MOST_LOADING = 2
"""Versions that are being loaded at the same time because somebody asked; more are told to come back."""
MOST_DESCRIBED = 64
RETRY_FAILED_S = 30.0
"""A version that could not be loaded is tried again after this time: each try reads all of it."""
CANARY_SLOTS = 10_000
"""The canary's share is exact to a hundredth of a percent."""


class ImageDecoder:
    """Encoded bytes -> pixels, by child processes: a file that kills its decoder costs one answer."""

    def __init__(self, caps: ImageCaps, observe: Callable[[float], None]) -> None:
        """The child processes are warm; `observe` is told the seconds of each image."""
        count = cpu_count()
        self._observe = observe
        self._decoders = Decoders((LARGEST_INPUT_PX, LARGEST_INPUT_PX), caps, count)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")
        list(self._threads.map(lambda _: self._decoders.decode(b"", np.empty((1, 1, 3), np.uint8)), range(4 * count)))

    async def decode(self, data: bytes, size_px: tuple[int, int]) -> DecodedImage | RowFailure:
        """The image at size_px (height, width), or why not. Cancelling it before its turn comes saves the work."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, data, size_px)

    def close(self) -> None:
        """The child processes have ended."""
        self._decoders.close()

    def _decode(self, data: bytes, size_px: tuple[int, int]) -> DecodedImage | RowFailure:
        start = time.perf_counter()
        pixels = np.empty((*size_px, 3), np.uint8)
        answer = self._decoders.decode(data, pixels)
        self._observe(time.perf_counter() - start)
        return answer if isinstance(answer, RowFailure) else DecodedImage(pixels, *answer)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One version, ready to answer."""

    artifact: Artifact
    predictor: Predictor
    batcher: Batcher

    def check(self) -> None:
        """Returns when the model answers a black image with numbers.

        Raises:
            RuntimeError: it does not.
        """
        scores = self.predictor.predict(np.zeros((1, *self.artifact.size_px, 3), np.uint8))
        if not np.isfinite(scores).all():
            raise RuntimeError(f"{self.artifact.reference} answers a black image with {scores.tolist()}")


@dataclass(frozen=True, slots=True)
class _Failure:
    error: CnnRayError
    at: float


class ServedModels:
    """The versions of one replica; for use in one event loop, after `load`."""

    def __init__(self, config: ServeConfig, observe: Callable[[int, float, str, int], None]) -> None:
        """`observe` is told of each call of a model: its rows and seconds, its name and version."""
        self._config = config
        self._observe = observe
        self._configured = dict(split_reference(reference) for reference in (config.model, *config.also))
        self._aliases: dict[str, dict[str, int]] = {}  # in force
        self._adopted: dict[str, dict[str, int] | None] = {}  # as stored; None where a version could not be loaded
        self._failed: dict[tuple[str, int], _Failure] = {}
        self._pinned: dict[tuple[str, int], ServedModel] = {}
        self._asked: OrderedDict[tuple[str, int], ServedModel] = OrderedDict()
        self._listing = asyncio.Lock()
        self._known: dict[str, tuple[float, frozenset[int]]] = {}
        self._described: OrderedDict[tuple[str, int], Artifact] = OrderedDict()
        self._loading: dict[tuple[str, int], asyncio.Task[ServedModel]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._told: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The models that are answered for."""
        return tuple(self._configured)

    @property
    def loaded(self) -> list[ServedModel]:
        """Every version in memory."""
        return [*self._pinned.values(), *self._asked.values()]

    @property
    def waiting(self) -> int:
        """Images that wait for a call of their model."""
        return sum(model.batcher.waiting for model in self.loaded)

    def load(self) -> None:
        """Afterwards all configured versions are warm.

        Raises:
            ArtifactError: a version is missing or damaged, or this node lacks the engine or precision.
        """
        for name in self._configured:
            self._aliases[name] = self._adopted[name] = read_aliases(self._config.models_uri, name)
        wanted = {key for name in self._configured for key in self._wanted(name)}
        self._pinned = {key: self._load(*key) for key in sorted(wanted)}

    async def follow(self) -> None:
        """Afterwards aliases mean what the store says now. A new version is warm before it answers, and one that cannot
        be loaded leaves the old one in its place; `failed` names it until it is repaired or the alias moves on."""
        for name in self._configured:
            try:
                stored = await self._in_loader(read_aliases, self._config.models_uri, name)
            except CnnRayError as error:
                self._tell(f"aliases of {name} are not readable: {error}")
                continue
            if stored != self._adopted[name]:
                await self._adopt(name, stored)

    async def _adopt(self, name: str, stored: dict[str, int]) -> None:
        """Let the aliases of a model mean what is stored, except for those whose version cannot be loaded."""
        in_force, fresh, failed = dict(stored), dict[tuple[str, int], ServedModel](), False
        for alias in self._followed(name):
            version = stored.get(alias)
            try:
                if version is not None:
                    fresh[name, version] = await self._loaded_unless_failed((name, version))
                elif alias == self._configured[name]:
                    raise self._alias_missing(name)
            except CnnRayError as error:
                failed = True
                if version is not None and (name, version) not in self._failed:
                    self._failed[name, version] = _Failure(error, time.monotonic())
                self._tell(f"the old versions stay: {error}")
                in_force = {k: v for k, v in in_force.items() if k != alias}
                if alias in self._aliases[name]:
                    in_force[alias] = self._aliases[name][alias]
        meant = {(name, stored[alias]) for alias in self._followed(name) if alias in stored}
        self._failed = {key: failure for key, failure in self._failed.items() if key[0] != name or key in meant}
        self._adopted[name] = None if failed else stored
        if in_force != self._aliases[name]:
            self._aliases[name] = in_force
            self._pin(name, fresh)

    def _pin(self, name: str, fresh: Mapping[tuple[str, int], ServedModel]) -> None:
        """Keep in memory what the model's aliases mean now; what they meant before may go like any other version."""
        wanted = self._wanted(name)
        before = {key: model for key, model in self._pinned.items() if key[0] == name}
        known = {**before, **self._asked, **fresh}
        kept = {key: model for key, model in self._pinned.items() if key[0] != name}
        self._pinned = kept | {key: known[key] for key in wanted if key in known}
        for key in self._pinned:
            self._asked.pop(key, None)
        for key, model in before.items():
            if key not in self._pinned:
                self._keep(key, model)
        logger.info("answering with %s", ", ".join(model.artifact.reference for model in self._pinned.values()))

    async def _loaded_unless_failed(self, key: tuple[str, int]) -> ServedModel:
        """Return the version, loaded; one that failed is tried again only after a while, because each try reads it."""
        failure = self._failed.get(key)
        if failure is not None and time.monotonic() < failure.at + RETRY_FAILED_S:
            raise failure.error
        self._failed.pop(key, None)
        return await self._loaded(key)

    def failed(self, name: str | None = None) -> dict[tuple[str, int], CnnRayError]:
        """Return the versions that an alias means now and that cannot be loaded, with the reason."""
        return {key: failure.error for key, failure in self._failed.items() if name is None or key[0] == name}

    def version_of(self, name: str, label: str | None = None) -> int | None:
        """The version that the name, or the name and an alias, mean now; None where they mean nothing."""
        configured = self._configured.get(name)
        if configured is None:
            return None
        alias = configured if label is None else label
        if label is None and alias.isdigit():
            return int(alias)
        return self._aliases.get(name, {}).get(alias)

    def canary_version(self, name: str, body: bytes) -> int | None:
        """The version that answers this very body where the request names none: stable for the same bytes."""
        canary, share = self._config.canary, self._config.canary_percent / 100
        if canary is not None and share > 0:
            slot = int.from_bytes(hashlib.blake2b(body, digest_size=8).digest()) % CANARY_SLOTS
            version = self.version_of(name, canary)
            if version is not None and slot < share * CANARY_SLOTS:
                return version
        return self.version_of(name)

    def peek(self, name: str, version: int) -> ServedModel | None:
        """The version if it is in memory."""
        return self._pinned.get((name, version)) or self._asked.get((name, version))

    async def get(self, name: str, version: int) -> ServedModel | None:
        """The version, loaded if it was not; None where there is none of that name and number.

        Raises:
            OverloadedError: others are being loaded.
            CnnRayError: it is damaged, or the store does not answer.
        """
        key = (name, version)
        if key in self._asked:
            self._asked.move_to_end(key)
        model = self.peek(name, version)
        if model is not None or name not in self._configured or version not in await self.versions(name):
            return model
        if key not in self._loading and len(self._loading) >= MOST_LOADING:
            raise OverloadedError("Other versions are being loaded. Next: try again.")
        model = await self._loaded(key)
        if key not in self._pinned:
            self._keep(key, model)
        return model

    async def describe(self, name: str, version: int) -> Artifact | None:
        """What the version says of itself, None where there is none; asking costs no model.

        Raises:
            CnnRayError: its description is damaged, or the store does not answer.
        """
        key = (name, version)
        model = self.peek(name, version)
        if model is not None:
            return model.artifact
        if name not in self._configured or version not in await self.versions(name):
            return None
        if key not in self._described:
            self._described[key] = await self._in_loader(load_artifact, self._config.models_uri, f"{name}@{version}")
            if len(self._described) > MOST_DESCRIBED:
                self._described.popitem(last=False)
        return self._described[key]

    async def versions(self, name: str) -> frozenset[int]:
        """All versions of a configured model, as the store said at most alias_poll_s ago: asking for what is not there
        does not cost a listing each time."""
        async with self._listing:
            until, known = self._known.get(name, (0.0, frozenset[int]()))
            if until < time.monotonic():
                known = await self._in_loader(list_versions, self._config.models_uri, name)
                self._known[name] = (time.monotonic() + self._config.alias_poll_s, known)
            return known

    def _followed(self, name: str) -> list[str]:
        """Return the aliases of a model whose versions are kept warm."""
        configured, canary = self._configured[name], self._config.canary
        found = [] if configured.isdigit() else [configured]
        return found + ([canary] if canary is not None and self._config.canary_percent > 0 else [])

    def _wanted(self, name: str) -> set[tuple[str, int]]:
        version = self.version_of(name)
        if version is None:
            raise self._alias_missing(name)
        canary = self.version_of(name, self._config.canary) if self._config.canary_percent > 0 else None
        return {(name, wanted) for wanted in (version, canary) if wanted is not None}

    def _alias_missing(self, name: str) -> ArtifactError:
        return ArtifactError(
            f"Expected an alias of model {name} in {self._config.models_uri}. Received: {self._configured[name]}. "
            "Next: see `cnn-ray model list`."
        )

    async def _loaded(self, key: tuple[str, int]) -> ServedModel:
        """The version, from memory or loaded once for all who wait for it, even if some of them go away."""
        model = self.peek(*key)
        if model is not None:
            return model
        if key not in self._loading:
            task = asyncio.ensure_future(self._in_loader(self._load, *key))
            task.add_done_callback(lambda done: (self._loading.pop(key), done.cancelled() or done.exception()))
            self._loading[key] = task
        return await asyncio.shield(self._loading[key])

    def _load(self, name: str, version: int) -> ServedModel:
        config = self._config
        artifact = load_artifact(config.models_uri, f"{name}@{version}")
        predictor = load_predictor(
            artifact,
            engine=config.engine,
            precision=config.precision,
            num_threads=config.num_threads,
            use_gpu=config.num_gpus > 0,
            serving=True,
        )
        batcher = Batcher(
            predictor.predict,
            # OpenVINO computes images one by one (predictor.py): a call of several would only answer later.
            max_batch_size=1 if predictor.engine == "openvino" else config.max_batch_size,
            concurrency=predictor.concurrency,
            wait_s=config.batch_wait_timeout_s,
            observe=lambda rows, seconds: self._observe(rows, seconds, name, version),
        )
        model = ServedModel(artifact, predictor, batcher)
        if max(artifact.size_px) > LARGEST_INPUT_PX:
            raise ArtifactError(
                f"Expected an input of at most {LARGEST_INPUT_PX} px. Received: {artifact.size_px} from "
                f"{artifact.reference}. Next: serve a smaller model."
            )
        model.check()
        logger.info("%s on %s %s is ready", artifact.reference, predictor.engine, predictor.precision)
        return model

    def _keep(self, key: tuple[str, int], model: ServedModel) -> None:
        self._asked[key] = model
        while self._asked and len(self._asked) + len(self._pinned) > max(
            self._config.max_loaded_models, len(self._pinned) + 1
        ):
            self._asked.popitem(last=False)

    async def _in_loader(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work, *arguments)

    def _tell(self, message: str) -> None:
        if message not in self._told and len(self._told) < CANARY_SLOTS:  # every poll would say the same
            self._told.add(message)
            logger.warning(message)
