"""Images per second of `cnn-ray score` against the hardware's floor and against named rivals; see README.md.

Usage: python tests/bench/throughput.py [--images DIR ...] [--count N] [--rounds 3] [--short] [--json FILE] [--only a,b]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from figures import Mark, Result, bars, result_of, table
from material import REFERENCE, Material, forget_reads, gather_images, publish
from processes import Run, run, wait_for_quiet
from rivals import environment

ORDER = ("floor", "opencv_floor", "local", "ray", "daft", "tf_data", "ray_recipe")
OURS = ("local", "ray")
TIMEOUT_S = 900.0
SHORT = ("floor", "local", "ray")


def main() -> None:
    arguments = _arguments()
    if arguments.contestant:
        return _be_contestant(arguments.contestant, Material.from_json(arguments.material))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contestant is ended and the temporary folder removed
    with tempfile.TemporaryDirectory(prefix="cnn_ray-bench-", dir=arguments.work) as folder:
        _measure(arguments, Path(folder))
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="folders; default: drawn pages of 1366x768")
    parser.add_argument("--count", type=int, help="images per run; fewer files are copied again (default 2048)")
    parser.add_argument("--rounds", type=int, help="each contestant runs this often, in turns (default 3)")
    parser.add_argument("--architecture", help="default EfficientNetB0")
    parser.add_argument("--size", type=int, help="model input in px (default 224)")
    parser.add_argument("--shard-size", type=int, help="images per shard of ours (default 0: as cnn-ray chooses)")
    parser.add_argument(
        "--short", action="store_true", help="does it run at all: simple_cnn, 120 images, 1 round, ours"
    )
    parser.add_argument(
        "--only", help=f"contestants, of {','.join(ORDER)} (default all, with --short the first of ours)"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--quiet", type=float, default=0, help="seconds to wait for idle cores before a run (default 0)"
    )
    parser.add_argument("--work", help="folder for the temporary files")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--material", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    defaults = {"count": 2048, "rounds": 3, "architecture": "EfficientNetB0", "size": 224, "shard_size": 0}
    if arguments.short:  # too few images for a steady state: no figure of it means anything
        defaults = {"count": 120, "rounds": 1, "architecture": "simple_cnn", "size": 64, "shard_size": 24}
    defaults["only"] = ",".join(SHORT if arguments.short else ORDER)
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    unknown = set(arguments.only.split(",")) - set(ORDER)
    if unknown:
        parser.error(f"Expected of --only: {', '.join(ORDER)}. Received: {', '.join(sorted(unknown))}.")
    if arguments.count < 100:
        parser.error(f"Expected --count of 100 or more. Received: {arguments.count}.")
    return arguments


def _be_contestant(name: str, material: Material) -> None:
    if name == "publish":
        return publish(material)
    from contestants import floor

    sys.stdout.write(json.dumps(floor(material)) + "\n")
    return None


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    chosen = [name for name in ORDER if name in arguments.only.split(",")]
    python = environment.interpreter() if set(chosen) & set(environment.RIVALS) else ""
    about = gather_images(arguments.images, folder / "images", arguments.count)
    material = Material(
        images=str(folder / "images"),
        models=str(folder / "models"),
        architecture=arguments.architecture,
        size_px=arguments.size,
        count=arguments.count,
        shard_size=arguments.shard_size,
        batch_size=32,
    )
    run(own_command("publish", material), TIMEOUT_S)
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    loads: list[float] = []
    for number in range(arguments.rounds):
        turn = number % len(chosen)
        for name in chosen[turn:] + chosen[:turn]:
            loads.append(wait_for_quiet(arguments.quiet))
            print(f"round {number + 1} of {arguments.rounds}: {name} ", end="", file=sys.stderr, flush=True)
            result = _one(name, material, folder / f"out-{name}-{number}", python)
            results[name].append(result)
            print(f"{result.steady:.1f} images/s, {result.wall_s:.1f} s", file=sys.stderr, flush=True)
    machine = f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    shards = f"shards of {material.shard_size}" if material.shard_size else "shards as cnn-ray chooses them"
    lines = [
        f"machine: {machine}; others used {min(loads):.2f} to {max(loads):.2f} cores before the runs",
        f"data: {about}",
        f"model: {material.architecture} {material.size_px} px, random weights, f32, batches of {material.batch_size}, "
        f"{shards}; {arguments.rounds} rounds in turns, median (lowest-highest)",
        "",
        *table(results, material.count),
    ]
    if set(OURS) <= set(chosen):
        lines += ["", _equality(folder)]
    lines += ["", *(["no bar: too few images for a rate"] if arguments.short else bars(results))]
    print("\n".join(lines))
    if arguments.json:
        record: dict[str, Any] = {"machine": machine, "loads": loads, "data": about, "material": asdict(material)}
        record["results"] = {name: [asdict(result) for result in runs] for name, runs in results.items()}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _one(name: str, material: Material, output: Path, python: str) -> Result:
    if name in OURS:
        command = score_command(material, output, name)
    elif name in environment.RIVALS:
        command = [python, environment.script(name), material.for_rivals()]
    else:
        command = own_command(name, material)
    forget_reads(material)
    done: Run = run(command, TIMEOUT_S)
    found: dict[str, Any] = {} if name in OURS else json.loads(done.output.splitlines()[-1])
    marks = commits(output) if name in OURS else [(float(at), int(rows)) for at, rows in found["marks"]]
    return result_of(marks, material, done, found)


def score_command(material: Material, output: Path, runner: str, images: str | None = None) -> list[str]:
    """`cnn-ray score` as typed, by this interpreter."""
    command = [sys.executable, "-m", "cnn_ray.cli", "score", images or material.images]
    command += [str(output), "--model", REFERENCE, "--models-uri", material.models, "--engine", "openvino"]
    command += ["--precision", "f32", "--batch-size", str(material.batch_size), "--runner", runner]
    return command + (["--shard-size", str(material.shard_size)] if material.shard_size else [])


def own_command(name: str, material: Material) -> list[str]:
    """This program as the contestant, or to publish."""
    return [sys.executable, str(Path(__file__).resolve()), "--contestant", name, "--material", material.to_json()]


def commits(output: Path) -> list[Mark]:
    """Marks from the parts' own times: progress is reported later than a part is committed."""
    import pyarrow.parquet as pq

    parts = sorted((path.stat().st_mtime, path) for path in output.rglob("part-*.parquet"))
    marks, rows = [], 0
    for at, path in parts:
        rows += pq.read_metadata(path).num_rows
        marks.append((at, rows))
    return marks


def _equality(folder: Path) -> str:
    from cnn_ray.outputs import read

    tables = [read(str(next((folder / f"out-{name}-0").rglob("_manifest-*")).parent)) for name in OURS]
    same = tables[0].sort_by("uri").equals(tables[1].sort_by("uri"))
    return f"ray's output {'equals' if same else 'DIFFERS from'} local's ({tables[0].num_rows} rows)"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    started = time.monotonic()
    main()
    if "--contestant" not in sys.argv:
        print(f"took {time.monotonic() - started:.0f} s", file=sys.stderr)
