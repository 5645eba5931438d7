"""Rate of `cnn-ray score` on a manifest of s3:// locations, against the same objects by their prefix (bar 0.95).

    python tests/bench/manifest.py [--count 20000] [--rounds 3] [--json FILE]
    python tests/bench/manifest.py --short      # 1,000 objects, one round: does it run at all

A made-up S3 (image_server.py) holds one small image under all names; a small net scores it, so that reading is most of
the work. The manifest is a local CSV of absolute locations in another order, without etags. Both go through the local
runner into a folder. The rate is that of all rows: from the start of the command to the last part. Rounds alternate.
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

import cv2
import numpy as np
from material import Material
from planning import INPUT, write_manifest
from planning_server import Objects
from processes import run
from throughput import TIMEOUT_S, commits, own_command, score_command

HERE = Path(__file__).resolve().parent
BAR = 0.95
SIDE_PX = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="objects (default 20000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="1,000 objects, one round: figures mean nothing")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    count, rounds = (1000, 1) if arguments.short else (arguments.count, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="cnn_ray-manifest-") as name:
        folder = Path(name)
        material = Material("", str(folder / "models"), "simple_cnn", 64, count, 0, 32)
        run(own_command("publish", material), TIMEOUT_S)
        image, listed = folder / "image.jpg", folder / "screens.csv"
        cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8))
        write_manifest(listed, Objects(count), "names")
        command = [sys.executable, str(HERE / "image_server.py"), str(count), str(image)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                os.environ |= _settings(int(server.stdout.readline()))  # type: ignore[union-attr]
                rates = _rates(material, {"prefix": INPUT, "manifest": str(listed)}, rounds, folder)
            finally:
                server.kill()
    _show(rates)
    if arguments.json:
        arguments.json.write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")


def _settings(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "PYTHONPATH": str(HERE.parent.parent),
    }


def _rates(material: Material, inputs: dict[str, str], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Images/s of each input, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in inputs}
    for number in range(rounds):
        for name in list(inputs)[:: 1 if number % 2 == 0 else -1]:
            output, start = folder / f"{name}-{number}", time.time()
            run([*score_command(material, output, "local", inputs[name]), "--no-report"], TIMEOUT_S)
            last, rows = commits(output)[-1]
            if rows != material.count:
                raise RuntimeError(f"{name}: {rows} of {material.count} objects were scored")
            rates[name].append(rows / (last - start))
            print(f"round {number + 1}: {name} {rates[name][-1]:.1f} images/s", file=sys.stderr, flush=True)
    return rates


def _show(rates: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name:8} {medians[name]:.1f} images/s ({min(found):.1f}-{max(found):.1f})")
    ratio = medians["manifest"] / medians["prefix"]
    print(f"bar: a manifest at least {BAR} x the prefix: {'reached' if ratio >= BAR else 'NOT reached'}, {ratio:.2f}")


if __name__ == "__main__":
    main()
