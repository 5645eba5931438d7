"""Training speed as ratios, interleaved, medians: against plain Keras fit, over two workers, by precision and cache.

    python tests/bench/train_throughput.py [--rounds 3] [--only NAME,NAME] [--startup]

Every contestant is a process of its own (train_contestant.py) on the same drawn images and random start weights: speed
does not depend on them. One thread: the process is bound to one core. About 20 minutes; --startup measures the seconds
from the command to the first step instead (3 minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMAGES = 400
TIMEOUT_S = 600
ARCHITECTURES = ("EfficientNetB0", "ResNet50")
CONTESTANTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    # name -> (contestant and its flags, cores)
    "keras EfficientNetB0": ("EfficientNetB0", ("keras",), "0,1"),
    "ray EfficientNetB0": ("EfficientNetB0", ("ray",), "0,1"),
    "1x1 EfficientNetB0": ("EfficientNetB0", ("ray",), "0"),
    "2x1 EfficientNetB0": ("EfficientNetB0", ("ray", "--workers", "2"), "0,1"),
    "1x1 ResNet50": ("ResNet50", ("ray",), "0"),
    "2x1 ResNet50": ("ResNet50", ("ray", "--workers", "2"), "0,1"),
    "1x1 ResNet50 whole": ("ResNet50", ("ray", "--fine-tune", "--epochs", "2"), "0"),
    "2x1 ResNet50 whole": ("ResNet50", ("ray", "--workers", "2", "--fine-tune", "--epochs", "2"), "0,1"),
    "bfloat16 ResNet50": ("ResNet50", ("ray", "--precision", "mixed_bfloat16"), "0,1"),
    "float32 ResNet50": ("ResNet50", ("ray",), "0,1"),
    "keras ResNet50": ("ResNet50", ("keras",), "0,1"),
    "keras jit ResNet50": ("ResNet50", ("keras", "--jit"), "0,1"),
    "cached EfficientNetB0": ("EfficientNetB0", ("ray", "--cache", "--epochs", "10"), "0,1"),
    "every epoch EfficientNetB0": ("EfficientNetB0", ("ray", "--epochs", "10"), "0,1"),
}
RATIOS = (
    ("one Ray worker / plain Keras fit", "ray EfficientNetB0", "keras EfficientNetB0", "images_per_s", 0.97),
    ("two workers of one thread / one", "2x1 EfficientNetB0", "1x1 EfficientNetB0", "images_per_s", 1.8),
    ("two workers of one thread / one", "2x1 ResNet50", "1x1 ResNet50", "images_per_s", 1.8),
    ("two workers of one thread / one, all of it", "2x1 ResNet50 whole", "1x1 ResNet50 whole", "images_per_s", None),
    ("mixed_bfloat16 / float32, frozen", "bfloat16 ResNet50", "float32 ResNet50", "images_per_s", None),
    ("XLA / none (plain Keras fit), frozen", "keras jit ResNet50", "keras ResNet50", "images_per_s", None),
    (
        "time of 10 epochs, every epoch / cached",
        "every epoch EfficientNetB0",
        "cached EfficientNetB0",
        "all_epochs_s",
        None,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="contestants, separated by commas")
    parser.add_argument("--startup", action="store_true", help="seconds to the first step")
    arguments = parser.parse_args()
    names = list(CONTESTANTS) if arguments.only is None else arguments.only.split(",")
    if arguments.startup:
        names = ["ray EfficientNetB0", "keras EfficientNetB0"]
    with tempfile.TemporaryDirectory(prefix="cnn_ray-train-bench-") as folder:
        make_material(Path(folder), {CONTESTANTS[name][0] for name in names})
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(arguments.rounds):
            for name in names:
                found[name].append(one(name, Path(folder), startup=arguments.startup))
                sys.stdout.write(f"round {number + 1} {name}: {json.dumps(found[name][-1])}\n")
                sys.stdout.flush()
    show(found, startup=arguments.startup)


def make_material(folder: Path, architectures: set[str]) -> None:
    rng = np.random.default_rng(0)
    for label in ("cold", "warm"):
        (folder / "images" / label).mkdir(parents=True)
        for k in range(IMAGES // 2):
            blocks = rng.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(blocks).resize((96, 96)).save(folder / "images" / label / f"{k:04}.png")
    code = (
        "from cnn_ray.architectures import build_backbone, find_architecture\n"
        f"for name in {sorted(architectures)!r}:\n"
        f"    build_backbone(find_architecture(name), 96).save_weights({str(folder)!r} + f'/{{name}}.weights.h5')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), capture_output=True)


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**kept, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def one(name: str, folder: Path, *, startup: bool) -> dict[str, float]:
    architecture, flags, cores = CONTESTANTS[name]
    more = ["--epochs", "1"] if startup else []
    command = ["taskset", "-c", cores, sys.executable, str(HERE / "train_contestant.py")]
    command += [flags[0], str(folder), architecture, *flags[1:], *more]
    done = subprocess.run(
        command,
        env={**environment(), "BENCH_BEGAN": str(time.time())},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr[-1500:]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: round(value, 3) for key, value in answer.items()}


def show(found: dict[str, list[dict[str, float]]], *, startup: bool) -> None:
    if startup:
        for name, runs in found.items():
            seconds = [run["first_step_s"] for run in runs]
            middle = statistics.median(seconds)
            sys.stdout.write(f"{name}: first step after {middle:.1f} s ({min(seconds):.1f} to {max(seconds):.1f})\n")
        return
    for text, above, below, figure, bar in RATIOS:
        if found.get(above) and found.get(below):
            ratios = [a[figure] / b[figure] for a, b in zip(found[above], found[below], strict=True)]
            wanted = "" if bar is None else f", bar {bar}"
            sys.stdout.write(
                f"{text}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}{wanted}) "
                f"[{above} {statistics.median(a[figure] for a in found[above]):.1f}]\n"
            )


if __name__ == "__main__":
    main()
