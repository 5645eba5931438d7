"""What a comparison of trainings is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Training:
    """One finished training of a variant with one seed, and how its model does."""

    variant: str
    seed: int
    reference: str
    split: str
    images: int
    top_k: dict[str, float]
    """accuracy by k, as text for JSON"""
    log_loss: float
    train_s: float
    """Time of all epochs, without start-up."""
    parameters: int
    size_bytes: int
    """Of the weights file."""
    history: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Failure:
    """A training that ended without a model."""

    variant: str
    seed: int
    sentence: str
    exit_code: int


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds and sample standard deviation, which one seed alone does not have."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """One variant of the table."""

    variant: str
    architecture: str
    weights: str | None
    seeds: int
    parameters: int
    size_bytes: int
    top_k: dict[str, Spread]
    log_loss: Spread
    train_s: Spread
    cpu_images_per_s: float | None
    gpu_images_per_s: float | None
    curves: dict[str, list[float]] = field(repr=False)
    """Log name -> mean over the seeds, epoch by epoch."""


@dataclass(frozen=True)
class ComparisonResult:
    """The whole comparison, and where it lies."""

    name: str
    split: str
    images: int
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    page_uri: str = ""
    json_uri: str = ""
