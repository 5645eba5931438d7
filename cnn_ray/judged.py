"""What an evaluation is made of: scores beside the truth, and what was found in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnn_ray.artifact import Artifact
from cnn_ray.metrics import Estimate, Figures


@dataclass(frozen=True)
class LabelledScores:
    """Scores of one version for labelled images that could be read."""

    artifact: Artifact
    engine: str
    precision: str
    scores: np.ndarray
    """float32 [K, C] in the model's label order"""
    truth: np.ndarray
    """int64 [K], indices into the model's labels"""
    uris: tuple[str, ...]
    groups: tuple[str, ...] | None
    sources: tuple[str, ...] | None
    root_uri: str
    data_digest: str
    split: str
    """The side that was scored."""
    unreadable: dict[str, int]
    """code -> number of images that are left out"""

    @property
    def positive(self) -> int | None:
        """Index of the positive label."""
        label = self.artifact.positive_label
        return None if label is None else self.artifact.labels.index(label)


@dataclass(frozen=True)
class Part:
    """Figures within one source or group; those that make no sense there are None."""

    name: str
    images: int
    positives: int | None
    accuracy: float
    roc_auc: Estimate


@dataclass(frozen=True)
class Mistake:
    """A confident wrong answer."""

    uri: str
    truth: str
    answered: str
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """All that an evaluation found, and where its page lies."""

    reference: str
    engine: str
    precision: str
    split: str
    data_uri: str
    data_digest: str
    earlier: tuple[str, ...]
    """Versions that were judged on this very test set before, oldest first; empty for other sides."""
    unreadable: dict[str, int]
    figures: Figures
    sources: tuple[Part, ...]
    groups: tuple[Part, ...]
    mistakes: tuple[Mistake, ...]
    page_uri: str = ""
    json_uri: str = ""
