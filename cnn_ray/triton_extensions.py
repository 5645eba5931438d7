# pyright: strict
"""Triton's extensions of the Open Inference Protocol v2 that its own clients ask for, as pure functions.

Follows Triton's extension_classification.md, extension_model_configuration.md, extension_model_repository.md and
extension_statistics.md. Models are not loaded or unloaded over HTTP: an alias of the store decides what is served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cnn_ray import json_bodies
from cnn_ray.request_errors import RequestError

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics")
"""What the server metadata names."""

State: TypeAlias = Literal["READY", "UNAVAILABLE"]

NOT_IN_MEMORY = "not in memory: a request for this version loads it"


@dataclass(slots=True)
class VersionCounts:
    """Requests, images and calls of one model version."""

    successes: int = 0
    success_s: float = 0.0
    failures: int = 0
    failure_s: float = 0.0
    images: int = 0
    calls: int = 0
    call_s: float = 0.0


def classified(scores: npt.NDArray[np.float32], labels: Sequence[str], most: int) -> list[list[str]]:
    """Return for each row its best classes, best first and at most so many, each as "score:index:label"."""
    # stable: of equal scores the first class comes first, as for the output `label`
    best = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    return [
        [f"{_decimal(row[index])}:{index}:{labels[index]}" for index in indices.tolist()]
        for row, indices in zip(scores, best, strict=True)
    ]


def build_config(name: str, labels: Sequence[str], size_px: tuple[int, int], max_instances: int) -> bytes:
    """Return the JSON of a model's configuration: Triton's ModelConfig message, dimensions without the batch.

    Of the two inputs a request has one, so each is optional.
    """
    no_dims: list[int] = []
    return json_bodies.build(
        {
            "name": name,
            "platform": "tensorflow_savedmodel",
            "backend": "tensorflow",
            "max_batch_size": max_instances,
            "input": [
                {
                    "name": "image",
                    "data_type": "TYPE_STRING",
                    "format": "FORMAT_NONE",
                    "dims": no_dims,
                    "optional": True,
                },
                {
                    "name": "pixels",
                    "data_type": "TYPE_UINT8",
                    "format": "FORMAT_NHWC",
                    "dims": [*size_px, 3],
                    "optional": True,
                },
            ],
            "output": [
                {"name": "label", "data_type": "TYPE_STRING", "dims": no_dims},
                {"name": "scores", "data_type": "TYPE_FP32", "dims": [len(labels)]},
            ],
        }
    )


def parse_index(body: bytes) -> bool:
    """Return whether an index request wants only models that are ready. An empty body wants all, as in Triton.

    Raises:
        RequestError: the body is not an index request.
    """
    if not body:
        return False
    ready: object = json_bodies.parse_object(body).get("ready")
    if ready is not None and not isinstance(ready, bool):
        raise RequestError("Expected 'ready' as true or false.")
    return bool(ready)


def build_index(entries: Iterable[tuple[str, int, State, str]]) -> bytes:
    """Return the JSON of the index, of (model, version, state, reason)."""
    return json_bodies.build(
        [
            {"name": name, "version": str(version), "state": state, "reason": reason}
            for name, version, state, reason in entries
        ]
    )


def refuse_control(action: str) -> RequestError:
    """Return the error for a request to load or unload a model."""
    return RequestError(
        f"Expected models to be loaded as the store's aliases say. Received: a request to {action} one. "
        "Next: move the alias with `cnn-ray model promote`; the server follows."
    )


def build_statistics(
    versions: Iterable[tuple[str, int]],
    counts: Mapping[tuple[str, int], VersionCounts],
    last_ms: Mapping[tuple[str, int], int],
) -> bytes:
    """Return the JSON of the statistics of (model, version); zero where nothing is counted or measured."""
    stats = [_statistics(key, counts.get(key, VersionCounts()), last_ms.get(key, 0)) for key in versions]
    return json_bodies.build({"model_stats": stats})


def _statistics(key: tuple[str, int], counts: VersionCounts, last_ms: int) -> dict[str, Any]:
    unmeasured = _duration(0, 0.0)
    return {
        "name": key[0],
        "version": str(key[1]),
        "last_inference": last_ms,
        "inference_count": counts.images,
        "execution_count": counts.calls,
        "inference_stats": {
            "success": _duration(counts.successes, counts.success_s),
            "fail": _duration(counts.failures, counts.failure_s),
            "queue": unmeasured,
            "compute_input": unmeasured,
            "compute_infer": _duration(counts.calls, counts.call_s),
            "compute_output": unmeasured,
            "cache_hit": unmeasured,
            "cache_miss": unmeasured,
        },
        "batch_stats": [],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _decimal(score: np.float32) -> str:
    """Return the shortest decimal that is the same float32 again, without an exponent."""
    return np.format_float_positional(score, unique=True, trim="0")
