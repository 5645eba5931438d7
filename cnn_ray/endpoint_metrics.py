"""What an endpoint counts, for Prometheus: each replica counts for itself, the board adds the replicas up.

A scrape reaches one replica of many, by chance. So replicas report a `Snapshot` (plain tuples) every few seconds to
one `MetricsBoard`, and whichever replica is scraped answers with the board's sums. They never fall: what a replica
counted stays in them when it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ACTIONS = frozenset(
    (
        *("predict", "classify", "explain", "status", "metadata"),
        *("infer", "server_metadata", "model_metadata", "model_ready", "health"),
        *("model_config", "model_statistics", "server_statistics", "repository_index", "repository_control"),
        *("metrics", "page", "openapi"),
    )
)
"""Values of the label `action`; anything else is counted as other, so that no client invents time series."""
INFERENCES = frozenset(("predict", "classify", "explain", "infer"))
"""Of these, the ones that a model answers."""
MAX_VERSIONS = 500
"""Model versions that get time series of their own in one process; later ones are counted without model and version."""
LIVE_S = 15.0
"""A replica that has not reported for this long is gone: its gauges count no more."""
KEPT_S = 3600.0
"""Until then a replica that was taken for gone may report again without being counted twice."""

_REQUEST_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WORK_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 10)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

Key = tuple[str, tuple[tuple[str, str], ...]]
"""Sample name and its labels."""


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one metric at one moment."""

    name: str
    help: str
    kind: str
    """counter, gauge, histogram or summary."""
    samples: tuple[tuple[Key, float], ...]


Snapshot = tuple[Family, ...]
"""What one replica counted since it started; picklable."""


class EndpointMetrics:
    """The counts of one replica. Thread-safe; a call costs one to three microseconds."""

    def __init__(self) -> None:
        """All counts zero, in a registry of its own: nothing else of the process is in it."""
        self._registry = registry = CollectorRegistry()
        self._versions: set[tuple[str, str]] = set()
        self._last_ms: dict[tuple[str, int], int] = {}
        self._requests = Counter(
            "cnn_ray_requests",
            "Requests answered, by status code; model and version where one was loaded for it.",
            ("action", "code", "model", "version"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "cnn_ray_request_seconds",
            "Time from the first byte of a request to its answer.",
            ("action",),
            registry=registry,
            buckets=_REQUEST_BUCKETS_S,
        )
        self._batch_size = Histogram(
            "cnn_ray_batch_size", "Images per call of the model.", registry=registry, buckets=_BATCH_BUCKETS
        )
        self._predict_seconds = Histogram(
            "cnn_ray_predict_seconds", "Time per call of the model.", registry=registry, buckets=_WORK_BUCKETS_S
        )
        self._decode_seconds = Histogram(
            "cnn_ray_decode_seconds", "Time to decode one image.", registry=registry, buckets=_WORK_BUCKETS_S
        )
        self._rejected = Counter(
            "cnn_ray_rejected", "Requests refused to protect the endpoint.", ("reason",), registry=registry
        )
        self._count_by_model(registry)
        self._queue = Gauge("cnn_ray_queue", "Images waiting for the model.", registry=registry)
        self._in_flight = Gauge("cnn_ray_in_flight", "Requests being answered.", registry=registry)
        self._loaded_models = Gauge("cnn_ray_loaded_models", "Model versions in memory.", registry=registry)

        self._failed_versions = Gauge(
            "cnn_ray_failed_versions",
            "Versions that an alias means now and that cannot be loaded; the ones before them answer.",
            ("model", "version"),
            registry=registry,
        )

    def _count_by_model(self, registry: CollectorRegistry) -> None:
        model = ("model", "version")
        self._model_requests = Summary(
            "cnn_ray_model_request_seconds",
            "Time of requests that a model answered (success), or that failed after one was found (fail).",
            (*model, "outcome"),
            registry=registry,
        )
        self._model_images = Counter("cnn_ray_model_images", "Images that a model scored.", model, registry=registry)
        self._model_calls = Summary("cnn_ray_model_call_seconds", "Time per call of a model.", model, registry=registry)

    def started(self) -> None:
        """One more request is being answered."""
        self._in_flight.inc()

    def finished(self, action: str, code: int, seconds: float, model: str = "", version: int | None = None) -> None:
        """A request that `started` is answered. Model and version count where `loaded` named them at some time."""
        self._in_flight.dec()
        shown = action if action in ACTIONS else "other"
        served = (model, str(version))
        if served not in self._versions:
            served = ("", "")
        self._requests.labels(shown, str(code), *served).inc()
        self._request_seconds.labels(shown).observe(seconds)
        if action in INFERENCES and version is not None and served[0]:
            self._model_requests.labels(*served, "success" if code == 200 else "fail").observe(seconds)
            self._last_ms[model, version] = time.time_ns() // 1_000_000

    def predicted(self, images: int, seconds: float, model: str = "", version: int | None = None) -> None:
        """The model was called once, with that many images; a version that was called has been loaded."""
        self._batch_size.observe(images)
        self._predict_seconds.observe(seconds)
        if version is not None and self._is_counted((model, str(version))):
            self._model_images.labels(model, str(version)).inc(images)
            self._model_calls.labels(model, str(version)).observe(seconds)

    @property
    def last_ms(self) -> dict[tuple[str, int], int]:
        """When this replica last answered with (model, version), in milliseconds since 1970."""
        return self._last_ms

    def decoded(self, seconds: float) -> None:
        """One image was decoded."""
        self._decode_seconds.observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of the caller's few constants, never text of a client."""
        self._rejected.labels(reason).inc()

    def waiting(self, images: int) -> None:
        """That many images wait for the model now."""
        self._queue.set(images)

    def loaded(self, versions: Iterable[tuple[str, int]]) -> None:
        """These (model, version) are in memory now."""
        pairs = {(model, str(version)) for model, version in versions}
        self._loaded_models.set(len(pairs))
        for pair in sorted(pairs - self._versions):
            self._is_counted(pair)

    def _is_counted(self, served: tuple[str, str]) -> bool:
        """Return whether the version has time series of its own; it gets them while there is room."""
        if served not in self._versions and len(self._versions) < MAX_VERSIONS:
            self._versions.add(served)
        return served in self._versions

    def failed(self, versions: Iterable[tuple[str, int]]) -> None:
        """An alias means these (model, version), and they cannot be loaded."""
        self._failed_versions.clear()
        for model, version in versions:
            self._failed_versions.labels(model, str(version)).set(1)

    def snapshot(self) -> Snapshot:
        """All counts now."""
        return tuple(
            Family(
                metric.name,
                metric.documentation,
                metric.type,
                tuple(
                    ((sample.name, tuple(sample.labels.items())), sample.value)
                    for sample in metric.samples
                    if not sample.name.endswith("_created")
                ),
            )
            for metric in self._registry.collect()
        )


def render(snapshots: Mapping[str, Snapshot]) -> bytes:
    """The replicas' sums in Prometheus' text format; counters, histograms and gauges alike are added up."""
    return _text(_summed(snapshots.values()))


def _summed(snapshots: Iterable[Snapshot]) -> Snapshot:
    families: dict[str, Family] = {}
    sums: dict[str, dict[Key, float]] = {}
    for family in (family for snapshot in snapshots for family in snapshot):
        families.setdefault(family.name, family)
        into = sums.setdefault(family.name, {})
        for key, value in family.samples:
            into[key] = into.get(key, 0.0) + value
    return tuple(
        Family(family.name, family.help, family.kind, tuple(sums[family.name].items())) for family in families.values()
    )


def _counters(snapshot: Snapshot) -> Snapshot:
    return tuple(family for family in snapshot if family.kind != "gauge")


class _Collector(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for family in self._snapshot:
            metric = Metric(family.name, family.help, family.kind)
            for (name, labels), value in family.samples:
                metric.add_sample(name, dict(labels), value)
            yield metric


def _text(snapshot: Snapshot) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))
    return generate_latest(registry)


@dataclass(slots=True)
class _Heard:
    at: float
    snapshot: Snapshot


class MetricsBoard:
    """The last snapshot of every replica, and what replicas that are long gone counted. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """A board that nobody has reported to; `clock` gives seconds."""
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._gone: Snapshot = ()

    def report(self, replica: str, snapshot: Snapshot) -> None:
        """The replica's counts are these now. One that starts again from zero under its old name is added on top."""
        before = self._heard.get(replica)
        if before is not None and _fell(before.snapshot, snapshot):
            self._gone = _summed((self._gone, _counters(before.snapshot)))
        self._heard[replica] = _Heard(self._clock(), snapshot)
        self._bury()

    def render(self) -> bytes:
        """All replicas' sums in Prometheus' text format: gauges of those alive, counters of all there ever were."""
        now = self._clock()
        heard = (
            heard.snapshot if now - heard.at <= LIVE_S else _counters(heard.snapshot) for heard in self._heard.values()
        )
        return _text(_summed((*heard, self._gone)))

    def _bury(self) -> None:
        now = self._clock()
        for replica, heard in list(self._heard.items()):
            if now - heard.at > KEPT_S:
                self._gone = _summed((self._gone, _counters(heard.snapshot)))
                del self._heard[replica]


def _fell(before: Snapshot, after: Snapshot) -> bool:
    values = {key: value for family in _counters(after) for key, value in family.samples}
    return any(values.get(key, 0.0) < value for family in _counters(before) for key, value in family.samples)
