"""A published version against labelled images: scores, figures with intervals, a page and JSON. Edits no model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cnn_ray.artifact import Artifact, load_artifact
from cnn_ray.config import DataConfig, EvaluateConfig, LabelledScoresConfig
from cnn_ray.dataset import LabelledSet, absolute_uri, read_labelled_set
from cnn_ray.errors import DataError
from cnn_ray.evaluation_page import build_page
from cnn_ray.images import ImageCaps
from cnn_ray.inspection import EXAMPLES, refuse_unreadable
from cnn_ray.judged import EvaluationResult, LabelledScores, Mistake, Part
from cnn_ray.metrics import Estimate, Ranked, Resamples, estimate, figures
from cnn_ray.predictor import Predictor, load_predictor
from cnn_ray.reader import ImageReader, read_threads
from cnn_ray.records import RowFailure
from cnn_ray.storage import open_store
from cnn_ray.storage_options import use_storage_options

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
MISTAKES_SHOWN = 24
GROUPS_SHOWN = 20
LEAST_FOR_AUC = 3
"""Positives and negatives that a source needs before an area within it is quoted."""
PAGE, JSON_FILE = "evaluation.html", "evaluation.json"
TOUCHED = "_evaluations"


def score_labelled(config: LabelledScoresConfig, artifact: Artifact) -> LabelledScores:
    """Scores of the version for the images of the asked side, on the configured engine and precision.

    Labels are matched by name: the data may hold fewer classes, and in any order. Unreadable images are left out and
    counted. Pixels are dropped as soon as they are scored.

    Raises:
        DataError: a label that the model does not know, no image on that side, or none that can be read.
        ArtifactError: damaged files, or this node lacks the engine or precision.
    """
    labelled, split = judged_set(config, artifact)
    unknown = [label for label in labelled.labels if label not in artifact.labels]
    if unknown:
        raise DataError(
            f"Expected the labels of {artifact.reference}: {', '.join(artifact.labels[:20])}. Received: {unknown[0]!r} "
            f"in {config.data.uri}. Next: correct the labels, or name the right model."
        )
    rows = np.arange(len(labelled.uris)) if split == "all" else labelled.rows(split)
    if len(rows) == 0:
        raise DataError(
            f"Expected images in {split} of {config.data.uri}. Received: none. "
            f"Next: --split all, or data with a {split} part (data.test_fraction, data.split_column)."
        )
    predictor = load_predictor(
        artifact, engine=config.engine, precision=config.precision, num_threads=config.num_threads
    )
    caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
    uris = [labelled.uris[row] for row in rows]
    scores, kept, unreadable = predict_images(predictor, labelled.root_uri, uris, caps)
    if len(kept) == 0:
        raise DataError(f"Expected readable images in {config.data.uri}. Received: {unreadable}. Next: check data.uri.")
    readable = set(kept.tolist())
    examples = [uri for k, uri in enumerate(uris) if k not in readable][:EXAMPLES]
    refuse_unreadable(unreadable, examples, len(uris), config.data.max_unreadable_rate, config.data.uri)
    rows = rows[kept]
    index = np.array([artifact.labels.index(label) for label in labelled.labels])
    return LabelledScores(
        artifact=artifact,
        engine=predictor.engine,
        precision=predictor.precision,
        scores=scores,
        truth=index[labelled.label_ids[rows]],
        uris=tuple(labelled.uris[row] for row in rows),
        groups=None if labelled.groups is None else tuple(labelled.groups[row] for row in rows),
        sources=None if labelled.sources is None else tuple(labelled.sources[row] for row in rows),
        root_uri=labelled.root_uri,
        data_digest=labelled.digest(),
        split=split,
        unreadable=unreadable,
    )


def score_again(config: LabelledScoresConfig, scored: LabelledScores, artifact: Artifact) -> LabelledScores:
    """Another version's scores for the very images of `scored`, row by row; labels are matched by name.

    Raises:
        DataError: an image that was read before cannot be read any more.
        ArtifactError: damaged files, or this node lacks the engine or precision.
    """
    predictor = load_predictor(
        artifact, engine=config.engine, precision=config.precision, num_threads=config.num_threads
    )
    caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
    scores, kept, unreadable = predict_images(predictor, scored.root_uri, scored.uris, caps)
    if len(kept) != len(scored.uris):
        raise DataError(
            f"Expected the images of {config.data.uri} to stay as they are. Received: {unreadable} at the second read. "
            "Next: run the command again."
        )
    index = np.array([artifact.labels.index(label) for label in scored.artifact.labels])
    return replace(
        scored,
        artifact=artifact,
        engine=predictor.engine,
        precision=predictor.precision,
        scores=scores,
        truth=index[scored.truth],
    )


def judged_set(config: LabelledScoresConfig, artifact: Artifact) -> tuple[LabelledSet, str]:
    """(the labelled images, the side that is to be scored).

    On the data that the model was trained on, a split that is drawn must be the one of the training: settings that are
    not given are those of the training, and the result is compared with the digest in the artifact. Judging a model on
    images that it learnt from by mistake would flatter it.

    Raises:
        DataError: the split is not that of the training.
    """
    told = artifact.description.training
    learnt: dict[str, Any] = told.get("config", {}).get("data", {})
    same = learnt.get("uri") == absolute_uri(config.data.uri)
    side = config.split if config.split != "auto" else ("validation" if same else "all")
    given = read_labelled_set(config.data, split=False)
    if side == "all" or (len(given.rows(side)) and (config.data.split_column is not None or side == "test")):
        return given, side
    if not same:
        return read_labelled_set(config.data), side
    own = config.data.model_dump(include=config.data.model_fields_set)
    labelled = read_labelled_set(DataConfig(**{**learnt, **own}))
    if labelled.digest() != told["data_digest"]:
        raise DataError(
            f"Expected the split that {artifact.reference} was trained with. Received: another one, as images or "
            f"settings of {config.data.uri} have changed since. Next: give {told['split_uri']} as the data, with "
            "--data-split-column split."
        )
    return labelled, side


def predict_images(
    predictor: Predictor, root_uri: str, uris: Sequence[str], caps: ImageCaps
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(scores float32 [K, C], positions int64 [K] of the readable images, unreadable ones by code).

    The next portion is decoded in threads while one is predicted.
    """
    reader, size_px = ImageReader(root_uri, caps), predictor.artifact.size_px
    scores: list[np.ndarray] = []
    kept: list[int] = []
    unreadable: dict[str, int] = {}
    with ThreadPoolExecutor(read_threads(root_uri)) as pool:
        starts = range(0, len(uris), ROWS_AT_ONCE)
        portions = [uris[k : k + ROWS_AT_ONCE] for k in starts]
        following = [pool.submit(reader.read, uri, size_px) for uri in portions[0]] if portions else []
        for number, start in enumerate(starts):
            images = [job.result() for job in following]
            if number + 1 < len(portions):
                following = [pool.submit(reader.read, uri, size_px) for uri in portions[number + 1]]
            good = [k for k, image in enumerate(images) if not isinstance(image, RowFailure)]
            for image in images:
                if isinstance(image, RowFailure):
                    unreadable[str(image.code)] = unreadable.get(str(image.code), 0) + 1
            if good:
                pixels = np.stack([image.pixels for image in images if not isinstance(image, RowFailure)])
                scores.append(predictor.predict_in_batches(pixels, 32))
                kept += [start + k for k in good]
    shape = (0, len(predictor.artifact.labels))
    return (np.concatenate(scores) if scores else np.zeros(shape, np.float32)), np.array(kept, np.int64), unreadable


def run_evaluation(config: EvaluateConfig) -> EvaluationResult:
    """What the version gets right and wrong; evaluation.json and evaluation.html lie under output_uri afterwards.

    A test set is to be touched once: judging a version on the side `test` is recorded beside the model, and the result
    names the versions that were judged on the same images before.

    Raises:
        ArtifactError, DataError, StorageError: as `score_labelled`, or the output cannot be written.
    """
    use_storage_options(config)
    artifact = load_artifact(config.models_uri, config.model)
    open_store(config.output_uri).check_writable()
    scored = score_labelled(config, artifact)
    result = EvaluationResult(
        reference=artifact.reference,
        engine=scored.engine,
        precision=scored.precision,
        split=scored.split,
        data_uri=config.data.uri,
        data_digest=scored.data_digest,
        earlier=_touch(config, artifact, scored.data_digest) if scored.split == "test" else (),
        unreadable=scored.unreadable,
        figures=figures(
            scored.scores,
            scored.truth,
            artifact.labels,
            positive=scored.positive,
            threshold=artifact.threshold,
            groups=scored.groups,
            samples=config.bootstrap_samples,
            confidence=config.confidence,
            seed=config.seed,
        ),
        sources=_parts(config, scored, scored.sources),
        groups=_parts(config, scored, scored.groups)[:GROUPS_SHOWN],
        mistakes=_mistakes(scored),
    )
    folder = f"{artifact.name}/{artifact.version}/{scored.data_digest[:12]}-{scored.split}"
    store = open_store(f"{config.output_uri.rstrip('/')}/{folder}")
    store.put(JSON_FILE, json.dumps(as_json(result), indent=2).encode())
    page = build_page(result, scored, _thumbnails(result, scored))
    store.put(PAGE, page.encode("utf-8", "backslashreplace"))
    uris = {"page_uri": store.uri_of(PAGE), "json_uri": store.uri_of(JSON_FILE)}
    return EvaluationResult(**{**vars(result), **uris})


def dry_run(config: EvaluateConfig) -> str:
    """What an evaluation would do, in one sentence."""
    artifact = load_artifact(config.models_uri, config.model)
    labelled, split = judged_set(config, artifact)
    count = len(labelled.uris) if split == "all" else len(labelled.rows(split))
    return f"Would evaluate {artifact.reference} on {count} images of {config.data.uri} ({split})."


def as_json(result: EvaluationResult) -> dict[str, Any]:
    """The result as JSON values."""
    return {key: value for key, value in asdict(result).items() if key not in ("page_uri", "json_uri")}


def _parts(config: EvaluateConfig, scored: LabelledScores, names: tuple[str, ...] | None) -> tuple[Part, ...]:
    """Figures by source or group, the largest first."""
    if names is None:
        return ()
    column = np.asarray(names)
    found: list[Part] = []
    values, counts = np.unique(column, return_counts=True)
    for name in values[np.lexsort((values, -counts))]:
        rows = np.flatnonzero(column == name)
        hits = scored.scores[rows].argmax(1) == scored.truth[rows]
        positives, area = None, Estimate(None)
        if scored.positive is not None:
            positive = scored.truth[rows] == scored.positive
            positives = int(positive.sum())
            if min(positives, len(rows) - positives) >= LEAST_FOR_AUC:
                inner = None if scored.groups is None else [scored.groups[row] for row in rows]
                ranked = Ranked(scored.scores[rows, scored.positive], positive)
                drawn = Resamples(len(rows), inner, config.bootstrap_samples, config.seed)
                area = estimate(ranked.roc_auc, drawn, config.confidence)
        found.append(Part(str(name), len(rows), positives, float(hits.mean()), area))
    return tuple(found)


def _mistakes(scored: LabelledScores) -> tuple[Mistake, ...]:
    answered = scored.scores.argmax(1)
    top = scored.scores.max(1)
    wrong = np.flatnonzero(answered != scored.truth)
    worst = wrong[np.argsort(-top[wrong], kind="stable")][:MISTAKES_SHOWN]
    labels = scored.artifact.labels
    return tuple(Mistake(scored.uris[k], labels[scored.truth[k]], labels[answered[k]], float(top[k])) for k in worst)


def _thumbnails(result: EvaluationResult, scored: LabelledScores) -> dict[str, bytes]:
    """uri -> JPEG made from pixels: no byte of the file reaches the page."""
    import cv2

    reader = ImageReader(scored.root_uri)
    found: dict[str, bytes] = {}
    for mistake in result.mistakes:
        image = reader.read(mistake.uri, (180, 240))
        if not isinstance(image, RowFailure):
            encoded = cv2.imencode(".jpg", image.pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
            found[mistake.uri] = encoded.tobytes()
    return found


def _touch(config: EvaluateConfig, artifact: Artifact, data_digest: str) -> tuple[str, ...]:
    """The versions that were judged on this test set before; afterwards this one is on record too."""
    store = open_store(f"{config.models_uri.rstrip('/')}/{artifact.name}")
    prefix = f"{TOUCHED}/{data_digest[:12]}/"
    earlier = sorted(key for key in store.keys(prefix) if key.endswith(".json"))
    versions = [str(json.loads(store.get(key))["model"]) for key in earlier]
    record = {
        "model": artifact.reference,
        "data_uri": config.data.uri,
        "at": datetime.now(UTC).isoformat("T", "seconds"),
    }
    number = len(earlier) + 1
    while not store.put_if_absent(f"{prefix}{number:05}.json", json.dumps(record).encode()):
        number += 1
    return tuple(versions)
