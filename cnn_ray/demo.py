"""`cnn-ray demo`: drawn screenshots -> training -> artifact -> scores, through the same code as the real jobs."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cnn_ray import drawn_files
from cnn_ray.artifact import DESCRIPTION
from cnn_ray.config import DataConfig, ModelDefinition, PhaseConfig, ScoreConfig, TrainConfig
from cnn_ray.console import RowProgress, print_epoch, print_score_result, say, waiting
from cnn_ray.outputs import read
from cnn_ray.score import ScoreResult, run_score
from cnn_ray.storage_base import error_of_os

if TYPE_CHECKING:
    from rich.console import Console

TRAIN_IMAGES = 600
UNSEEN_IMAGES = 300
TRAIN_SEED = 1
UNSEEN_SEED = 2


def run_demo(folder: str, out: Console, console: Console) -> ScoreResult:
    """The scoring run of the demo in the folder; what an earlier demo finished there is kept and said to be.

    Results go to `out`, progress to `console`.
    """
    start = time.monotonic()
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise error_of_os(error, str(root)) from None
    data, models = root / "demo-data", root / "models"
    _draw(data, out, console)
    if (models / "demo" / "1" / DESCRIPTION).exists():
        say(out, f"Model demo@1 is already in {models}: not trained again.")
    else:
        _train(data / "train", root, out, console)
    config = ScoreConfig(
        model="demo@1",
        models_uri=str(models),
        input_uri=str(data / "screenshots"),
        output_uri=str(root / "scores"),
        runner="local",
    )
    with RowProgress("scored", console) as bar:
        result = run_score(config, lambda p: bar.update(p.rows, p.planned, p.quarantined))
    print_score_result(result, out)
    _say_accuracy(result.partition_uri, data / "screenshots-truth.csv", out)
    say(out, f"Done in {time.monotonic() - start:.0f} s. Next, try:")
    in_folder = "" if folder == "." else f" --models-uri {models}"
    say(out, f"  cnn-ray score YOUR_FOLDER scores-of-mine --model demo@1{in_folder}")
    say(out, f"  cnn-ray model show demo@1{in_folder}")
    say(out, f"  cnn-ray serve --model demo@1{in_folder}")
    return result


def _draw(data: Path, out: Console, console: Console) -> None:
    unseen = data / "screenshots"
    if (data / "complete").exists():
        say(out, f"Drawings are already in {data}: not drawn again.")
        return
    total = TRAIN_IMAGES + UNSEEN_IMAGES
    with RowProgress("drawn", console) as bar:
        drawn_files.write_labelled(data / "train", TRAIN_IMAGES, TRAIN_SEED, progress=lambda n: bar.update(n, total))
        drawn_files.write_unlabelled(
            unseen, UNSEEN_IMAGES, UNSEEN_SEED, progress=lambda n: bar.update(TRAIN_IMAGES + n, total)
        )
        for name, raw in drawn_files.hostile_files().items():
            (unseen / name).write_bytes(raw)
    (data / "complete").touch()


def _train(images: Path, root: Path, out: Console, console: Console) -> None:
    from cnn_ray.train import run_training

    config = TrainConfig(
        name="demo",
        models_uri=str(root / "models"),
        runs_uri=str(root / "runs"),
        data=DataConfig(uri=str(images)),
        model=ModelDefinition(architecture="simple_cnn", input_size_px=64),
        train=PhaseConfig(epochs=12, learning_rate=1e-3),
        allow=("no_augmentation",),  # drawings have no noise to be robust against, and it doubles the time
    )
    with waiting(console, f"Training {config.model.architecture}: Ray starts, then {config.train.epochs} epochs"):
        result = run_training(config, on_epoch=lambda metrics: print_epoch(metrics, console))
    say(out, f"Model: {result.reference} in {result.artifact_uri}")


def _say_accuracy(partition_uri: str, truth_file: Path, out: Console) -> None:
    with truth_file.open(encoding="utf-8", newline="") as stream:
        truth = {row["file"]: row["label"] for row in csv.DictReader(stream)}
    scored = read(partition_uri).select(["uri", "label"]).to_pylist()
    pairs = [(truth[name], row["label"]) for row in scored if (name := Path(row["uri"]).name) in truth]
    right = sum(expected == got for expected, got in pairs)
    say(out, f"Accuracy on {len(pairs)} unseen drawings: {right / len(pairs):.3f}")
