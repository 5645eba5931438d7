"""Images per second of `cnn-ray score` against the hardware's floor and against two documented recipes; see README.md.

Usage: python tests/bench/throughput.py [--images DIR] [--count N] [--rounds 3] [--short] [--json FILE] [--only a,b]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from material import REFERENCE, Material, forget_reads, gather_images, publish, read_times

ORDER = ("floor", "local", "ray", "ray_recipe", "tf_data")
OURS = ("local", "ray")
TIMEOUT_S = 900.0
BARS = (("local", "floor", 0.9), ("ray", "local", 0.95), ("local", "ray_recipe", 3.0))
"""(contestant, against, at least): ratios of the median steady rates."""
RATES = {"steady": "steady", "from_read": "from the first read"}

Mark = tuple[float, int]


@dataclass(frozen=True)
class Result:
    """One contestant in one round. The lasting rate lies between the two: `steady` runs from the first shard's worth of
    scored images to the last image, and flatters who decoded a lot before; `from_read` (None on a noatime mount) counts
    all images from the first read on, with the rest of the model's loading and the last images' way out."""

    steady: float
    from_read: float | None
    wall_s: float
    cpu_s: float


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
    parser.add_argument("--images", type=Path, help="folder of images; default: drawn pages of 1366x768")
    parser.add_argument("--count", type=int, help="images per run; fewer files are linked again (default 640)")
    parser.add_argument("--rounds", type=int, help="each contestant runs this often, in turns (default 3)")
    parser.add_argument("--architecture", help="default EfficientNetB0")
    parser.add_argument("--size", type=int, help="model input in px (default 224)")
    parser.add_argument("--shard-size", type=int, help="images per shard of ours (default 64)")
    parser.add_argument("--short", action="store_true", help="does it run at all: simple_cnn, 120 images, 1 round")
    parser.add_argument("--only", default=",".join(ORDER), help=f"contestants, of {','.join(ORDER)}")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--work", help="folder for the temporary files")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--material", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    defaults = {"count": 640, "rounds": 3, "architecture": "EfficientNetB0", "size": 224, "shard_size": 64}
    if arguments.short:  # too few images for a steady state: no figure of it means anything
        defaults = {"count": 120, "rounds": 1, "architecture": "simple_cnn", "size": 64, "shard_size": 24}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    unknown = set(arguments.only.split(",")) - set(ORDER)
    if unknown:
        parser.error(f"Expected of --only: {', '.join(ORDER)}. Received: {', '.join(sorted(unknown))}.")
    if arguments.count < 3 * arguments.shard_size:
        parser.error(f"Expected --count of 3 shards or more. Received: {arguments.count}.")
    return arguments


def _be_contestant(name: str, material: Material) -> None:
    if name == "publish":
        publish(material)
        marks = []
    else:
        from contestants import CONTESTANTS

        marks = CONTESTANTS[name](material)
    print(json.dumps(marks), flush=True)


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    about = gather_images(arguments.images, folder / "images", arguments.count)
    material = Material(
        images=str(folder / "images"),
        models=str(folder / "models"),
        weights=str(folder / "models" / REFERENCE.replace("@", "/") / "model.weights.h5"),
        architecture=arguments.architecture,
        size_px=arguments.size,
        count=arguments.count,
        shard_size=arguments.shard_size,
        batch_size=32,
    )
    _run_contestant("publish", material)
    chosen = [name for name in ORDER if name in arguments.only.split(",")]
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    load = os.getloadavg()[0]
    for number in range(arguments.rounds):
        turn = number % len(chosen)
        for name in chosen[turn:] + chosen[:turn]:
            print(f"round {number + 1} of {arguments.rounds}: {name} ", end="", file=sys.stderr, flush=True)
            result = _one(name, material, folder / f"out-{name}-{number}")
            results[name].append(result)
            print(f"{result.steady:.1f} images/s, {result.wall_s:.1f} s", file=sys.stderr, flush=True)
    machine = f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    lines = [
        f"machine: {machine}, load before the first run {load:.1f}",
        f"data: {about}",
        f"model: {material.architecture} {material.size_px} px, batches of {material.batch_size}, "
        f"shards of {material.shard_size}, {arguments.rounds} rounds in turns, median (lowest-highest)",
        "",
        *_table(results, material),
    ]
    if set(OURS) <= set(chosen):
        lines += ["", _equality(folder)]
    lines += ["", *_bars(results)]
    print("\n".join(lines))
    if arguments.json:
        record: dict[str, Any] = {"machine": machine, "data": about, "material": asdict(material)}
        record["results"] = {name: [asdict(result) for result in runs] for name, runs in results.items()}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _one(name: str, material: Material, output: Path) -> Result:
    from processes import run

    if name not in OURS:
        return _run_contestant(name, material)
    command = [sys.executable, "-c", "from cnn_ray.cli import main; main()", "score", material.images, str(output)]
    command += ["--model", REFERENCE, "--models-uri", material.models, "--engine", "openvino", "--precision", "f32"]
    command += ["--shard-size", str(material.shard_size), "--batch-size", str(material.batch_size), "--runner", name]
    forget_reads(material)
    done = run(command, TIMEOUT_S)
    return _result(_commits(output), material, done.wall_s, done.cpu_s)


def _run_contestant(name: str, material: Material) -> Result:
    from processes import run

    command = [sys.executable, str(Path(__file__).resolve()), "--contestant", name, "--material", material.to_json()]
    forget_reads(material)
    done = run(command, TIMEOUT_S)
    marks = [(float(at), int(rows)) for at, rows in json.loads(done.output.splitlines()[-1])]
    if name == "publish":
        return Result(0.0, None, done.wall_s, done.cpu_s)
    return _result(marks, material, done.wall_s, done.cpu_s)


def _commits(output: Path) -> list[Mark]:
    """Marks from the parts' own times: progress is reported later than a part is committed."""
    import pyarrow.parquet as pq

    parts = sorted((path.stat().st_mtime, path) for path in output.rglob("part-*.parquet"))
    marks, rows = [], 0
    for at, path in parts:
        rows += pq.read_metadata(path).num_rows
        marks.append((at, rows))
    return marks


def _result(marks: list[Mark], material: Material, wall_s: float, cpu_s: float) -> Result:
    if not marks or marks[-1][1] != material.count:
        raise RuntimeError(f"Expected {material.count} scored images. Received: {marks[-1][1] if marks else 0}.")
    first, last = next(mark for mark in marks if mark[1] >= material.shard_size), marks[-1]
    if first == last:
        raise RuntimeError(f"Expected results in several steps. Received: all {last[1]} at once. Raise --count.")
    reads = read_times(material)
    from_read = material.count / (last[0] - reads[0]) if reads else None
    return Result((last[1] - first[1]) / max(last[0] - first[0], 1e-3), from_read, wall_s, cpu_s)


def _table(results: dict[str, list[Result]], material: Material) -> list[str]:
    head = f"{'':11} {'steady images/s':22} {'of floor':>8} {'x recipe':>8}   {'from first read':22} {'of floor':>8}"
    rows = [f"{head} {'x recipe':>8}   {'command to exit':22} {'CPU ms/image':>12}"]
    for name, runs in results.items():
        cells = [f"{name:11}"]
        for rate in RATES:
            figures = [figure for result in runs if (figure := getattr(result, rate)) is not None]
            median = f"{statistics.median(figures):.1f} ({min(figures):.1f}-{max(figures):.1f})" if figures else "-"
            ratios = [_ratio(results, name, other, rate) for other in ("floor", "ray_recipe")]
            cells.append(f"{median:22} " + " ".join(f"{'-' if r is None else f'{r:.2f}':>8}" for r in ratios) + "  ")
        wall = statistics.median(result.wall_s for result in runs)
        cpu = 1000 * statistics.median(result.cpu_s for result in runs) / material.count
        rows.append(" ".join([*cells, f"{f'{wall:.1f} s, {material.count / wall:.1f} images/s':22} {cpu:>12.1f}"]))
    return rows


def _ratio(results: dict[str, list[Result]], name: str, other: str, rate: str) -> float | None:
    medians = []
    for who in (name, other):
        figures = [figure for result in results.get(who, []) if (figure := getattr(result, rate)) is not None]
        if not figures:
            return None
        medians.append(statistics.median(figures))
    return medians[0] / medians[1]


def _bars(results: dict[str, list[Result]]) -> list[str]:
    """A bar is reached, or not, where both rates say so; where they differ it stays open."""
    lines = []
    for name, other, least in BARS:
        ratios = [ratio for rate in RATES if (ratio := _ratio(results, name, other, rate)) is not None]
        if ratios:
            reached = [ratio >= least for ratio in ratios]
            verdict = "reached" if all(reached) else "open, raise --count" if any(reached) else "NOT reached"
            shown = ", ".join(f"{ratio:.2f} {what}" for ratio, what in zip(ratios, RATES.values(), strict=False))
            lines.append(f"bar: {name} at least {least:g} x {other}: {verdict} ({shown})")
    return lines


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
