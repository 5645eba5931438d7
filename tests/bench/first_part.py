"""Seconds from the command to the first committed part, and where they go.

    python tests/bench/first_part.py [--images DIR ...] [--count 1024] [--cold] [--json FILE]

`cnn-ray score` in a fresh process each time, local (5 times, bar 3 s) and on a Ray that it starts itself (3 times, bar
15 s): from just before the process starts to the time of the first part file. `--cold` first drops the interpreter's
packages, the model and the images from the kernel's page cache, as on a machine that just started.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from material import Material, forget_reads, gather_images, read_times
from processes import run
from throughput import TIMEOUT_S, own_command, score_command

RUNS = {"local": (5, 3.0), "ray": (3, 15.0)}
"""Runner -> how often it is measured, and at most how many seconds."""
PHASES = ("plan written", "first image read", "first part")
TOP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="folders; default: drawn pages")
    parser.add_argument("--count", type=int, default=1024, help="images of a run (default 1024)")
    parser.add_argument("--only", choices=tuple(RUNS), help="one runner")
    parser.add_argument("--cold", action="store_true", help="nothing in the page cache")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cnn_ray-first-") as folder:
        material = make_material(arguments.images, Path(folder), arguments.count)
        found = {}
        for runner, (times, bar) in RUNS.items():
            if arguments.only in (None, runner):
                found[runner] = [_one(runner, material, Path(folder), k, arguments.cold) for k in range(times)]
                _show(runner, found[runner], bar)
        _show_imports(material, Path(folder) / "imports")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def make_material(images: list[Path], folder: Path, count: int) -> Material:
    """EfficientNetB0 at 224 px published below the folder, and `count` images."""
    print(gather_images(images, folder / "images", count))
    material = Material(
        images=str(folder / "images"),
        models=str(folder / "models"),
        architecture="EfficientNetB0",
        size_px=224,
        count=count,
        shard_size=0,
        batch_size=32,
    )
    run(own_command("publish", material), TIMEOUT_S)
    return material


def _one(runner: str, material: Material, folder: Path, number: int, cold: bool) -> dict[str, float]:
    """Phase -> seconds since the command."""
    output = folder / f"{runner}-{number}"
    forget_reads(material)
    if cold:
        _drop_from_cache(Path(sys.prefix) / "lib", Path(material.models), Path(material.images))
    start = time.time()
    run(score_command(material, output, runner), TIMEOUT_S)
    partition = next(output.rglob("_manifest-*")).parent
    reads = read_times(material)
    moments = {
        "plan written": min(path.stat().st_mtime for path in partition.glob("_plan-*")),
        "first image read": reads[0] if reads else float("nan"),
        "first part": min(path.stat().st_mtime for path in partition.glob("part-*")),
    }
    return {phase: moments[phase] - start for phase in PHASES}


def _show(runner: str, found: list[dict[str, float]], bar: float) -> None:
    firsts = [one["first part"] for one in found]
    median = statistics.median(firsts)
    verdict = "reached" if median <= bar else "NOT reached"
    print(f"bar: {runner} at most {bar:g} s to the first part: {verdict}, {median:.2f} s ", end="")
    print(f"(median of {len(found)}, {min(firsts):.2f}-{max(firsts):.2f})")
    before = 0.0
    for phase in PHASES:
        at = statistics.median(one[phase] for one in found)
        print(f"    {at:6.2f} s  {phase} (+{at - before:.2f})")
        before = at


def _show_imports(material: Material, output: Path) -> None:
    """Which packages the local runner's process imports, by their own time."""
    command = score_command(material, output, "local")
    done = run([command[0], "-X", "importtime", *command[1:]], TIMEOUT_S)
    own: collections.Counter[str] = collections.Counter()
    for line in done.errors.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and len(parts) == 3 and parts[0].strip().isdigit():
            own[parts[2].strip().partition(".")[0]] += int(parts[0])
    print(f"imports of the local runner, {sum(own.values()) / 1e6:.2f} s under -X importtime:")
    for package, microseconds in own.most_common(TOP):
        print(f"    {microseconds / 1e6:6.2f} s  {package}")


def _drop_from_cache(*folders: Path) -> None:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


if __name__ == "__main__":
    main()
