"""The training figures of README: CIFAR-10, 17 Flowers and screenshots, through the product's own commands.

    python tests/bench/training_figures.py cifar10 --data DIR
    python tests/bench/training_figures.py flowers17 --data DIR
    python tests/bench/training_figures.py screens --data DIR

DIR holds cifar10_jpeg_12k.npz, flowers17/, screens/ and backbones/. Models and pages go to --output. A second run keeps
what is finished. On 2 cores: about 25, 30 and 15 minutes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cnn_ray.artifact import load_artifact
from cnn_ray.compare import run_comparison
from cnn_ray.config import CompareConfig, DataConfig, LabelledScoresConfig, TrainConfig, build_config, load_yaml
from cnn_ray.console_training import print_comparison, print_training
from cnn_ray.dataset import read_labelled_set
from cnn_ray.evaluate import score_labelled
from cnn_ray.flags import stderr_console, stdout_console
from cnn_ray.metrics import figures
from cnn_ray.ray_session import connected
from cnn_ray.splitting import join_groups
from cnn_ray.train import run_training

JOBS = Path(__file__).parents[2] / "jobs"
MOBILENET = "backbones/mobilenetv2_1.0_224_imagenet_dequant_notop.weights.h5"
FOLDS = 4


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def compare(config: CompareConfig) -> None:
    console = stderr_console()
    result = run_comparison(config, on_training=lambda event: print_training(event, console))
    print_comparison(result, stdout_console())


def below(output: Path) -> dict[str, Any]:
    return {"models_uri": str(output / "models"), "runs_uri": str(output / "runs")}


def cifar10(data: Path, output: Path) -> None:
    base = {"data": {"uri": str(data / "cifar10_jpeg_12k.npz")}, **below(output)}
    own = {"base": base, "output_uri": str(output / "comparisons")}
    compare(build_config(CompareConfig, load_yaml(JOBS / "compare_cifar10.yaml"), own))


def flowers17(data: Path, output: Path) -> None:
    manifest = output / "flowers17.csv"
    rows = [
        (str(path.resolve()), path.parent.name, side)
        for side in ("train", "test")
        for path in sorted((data / "flowers17" / side).glob("*/*.jpg"))
    ]
    write_csv(manifest, ("uri", "label", "split"), rows)
    base = {
        "data": {"uri": str(manifest), "split_column": "split", "validation_fraction": 0.1},
        "allow": ["label_leakage"],
        **below(output),
    }
    given = load_yaml(JOBS / "compare_flowers17.yaml")
    transfer = {"model": {"weights": str((data / MOBILENET).resolve())}}
    own = {"base": base, "output_uri": str(output / "comparisons"), "variants": {"transfer": transfer}}
    labelled = read_labelled_set(DataConfig(**base["data"]))
    train = set(labelled.twins[labelled.rows("train")].tolist())
    leaked = sum(int(labelled.twins[row]) in train for row in labelled.rows("test"))
    say(f"{leaked} of {len(labelled.rows('test'))} test images look like one in train")
    compare(build_config(CompareConfig, given, own))


def screens(data: Path, output: Path) -> None:
    """Grouped cross-validation: every screenshot is scored by a model that never saw its domain."""
    rows = read_screens(data)
    folds = draw_folds(rows, data)
    parts: list[dict[str, Any]] = []
    with connected():
        for fold in range(FOLDS):
            manifest = output / f"screens-{fold}.csv"
            sides = ["test" if folds[k] == fold else "train" for k in range(len(rows))]
            lines = [(r["uri"], r["label"], r["group"], r["source"], s) for r, s in zip(rows, sides, strict=True)]
            write_csv(manifest, ("uri", "label", "group", "source", "split"), draw_sides(lines))
            parts.append(score_fold(screens_config(data, output, manifest, fold), output, fold))
    names = ("scores", "truth", "groups", "sources")
    scores, truth, groups, sources = (np.concatenate([part[name] for part in parts]) for name in names)
    np.savez(output / "screens-scores.npz", scores=scores, truth=truth, groups=groups, sources=sources)
    report("all", scores, truth, groups)
    for source in ("phishsnap", "visualphish24"):
        inside = sources == source
        report(f"within {source}", scores[inside], truth[inside], groups[inside])
    by_source = {name: np.mean(truth[sources == name] == 1) for name in np.unique(sources)}
    guess = np.array([by_source[name] for name in sources])
    report("answering by source alone", np.stack([1 - guess, guess], 1), truth, groups)


def read_screens(data: Path) -> list[dict[str, str]]:
    with (data / "screens" / "manifest.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["uri"] = str((data / "screens" / row["file"]).resolve())
        row["label"] = "legitimate" if row["label"] == "legitimate" else "phishing"
    return rows


def draw_folds(rows: list[dict[str, str]], data: Path) -> np.ndarray:
    """Fold of each row: whole domains with their near-duplicates, labels and sources spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    from cnn_ray.inspection import inspect_images
    from cnn_ray.near_duplicates import find_twins

    twins = find_twins(inspect_images(str((data / "screens").resolve()), [row["uri"] for row in rows])[0])
    groups = join_groups([row["group"] for row in rows], twins)
    kinds = [f"{row['source']} {row['label']}" for row in rows]
    counts = Counter(kinds)
    kinds = [kind if counts[kind] >= FOLDS else kind.rpartition(" ")[2] for kind in kinds]
    folds = np.zeros(len(rows), int)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for fold, (_, test) in enumerate(splitter.split(np.zeros(len(rows)), kinds, groups)):
        folds[test] = fold
    return folds


def draw_sides(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Every sixth domain of the training part for validation, drawn by its name."""
    domains = sorted({line[2] for line in lines if line[4] == "train"})
    chosen = set(domains[::6])
    return [(*line[:4], "validation" if line[4] == "train" and line[2] in chosen else line[4]) for line in lines]


def screens_config(data: Path, output: Path, manifest: Path, fold: int) -> TrainConfig:
    given = load_yaml(JOBS / "train_screens_mobilenetv2.yaml")
    own = {
        "name": f"screens-fold{fold}",
        "data": {"uri": str(manifest), "uri_column": "uri", "split_column": "split", "source_column": "source"},
        "model": {"weights": str((data / MOBILENET).resolve())},
        **below(output),
    }
    return build_config(TrainConfig, given, own)


def score_fold(config: TrainConfig, output: Path, fold: int) -> dict[str, Any]:
    kept = output / "models" / config.name / "1" / "artifact.json"
    reference = f"{config.name}@1" if kept.exists() else run_training(config).reference
    judged = LabelledScoresConfig(
        model=reference, models_uri=config.models_uri, data=config.data, split="test", precision="f32"
    )
    scored = score_labelled(judged, load_artifact(config.models_uri, reference))
    say(f"fold {fold}: {len(scored.truth)} screenshots scored by {reference}")
    positive = scored.positive
    order = [1 - positive, positive] if positive is not None else [0, 1]
    return {
        "scores": scored.scores[:, order],
        "truth": (scored.truth == positive).astype(int),
        "groups": np.array(scored.groups),
        "sources": np.array(scored.sources),
    }


def report(name: str, scores: np.ndarray, truth: np.ndarray, groups: np.ndarray) -> None:
    found = figures(scores, truth, ("legitimate", "phishing"), positive=1, groups=groups.tolist())
    binary = found.binary
    if binary is None or binary.roc_auc.value is None:
        say(f"{name}: one kind only")
        return
    area, precision = binary.roc_auc, binary.pr_auc
    recalls = ", ".join(
        f"recall {r.recall.value:.2f} at FPR {r.max_fpr:.1%}{'' if r.supported else ' (too few negatives)'}"
        for r in binary.recall_at_fpr
    )
    say(
        f"{name}: {binary.positives} phishing, {binary.negatives} legitimate; ROC-AUC {area.value:.3f} "
        f"({area.low:.3f} to {area.high:.3f}), PR-AUC {precision.value:.3f}; {recalls}"
    )


def write_csv(path: Path, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cifar10", "flowers17", "screens"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("training-figures"))
    arguments = parser.parse_args()
    run = {"cifar10": cifar10, "flowers17": flowers17, "screens": screens}[arguments.what]
    run(arguments.data.resolve(), arguments.output.resolve())


if __name__ == "__main__":
    main()
