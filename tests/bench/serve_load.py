"""Requests per second and latency of the endpoint against named rivals, by number of connections; see README.md.

Usage: python tests/bench/serve_load.py [--images DIR ...] [--only a,b] [--connections 1,8,32,128] [--short]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from material import Material, gather_images, publish
from processes import run, tree_cpu_s, wait_for_quiet
from serve_contestants import CONTESTANTS, Contestant, serving

BODIES = 64
SHORT = ("uvicorn_ours", "ours")
CLIENT = Path(__file__).with_name("serve_client.py")
UVICORN = ("uvicorn_threads", "uvicorn_inline")
"""Two ways to write the same small server: the bars are about the one that is faster in the run."""
RATE_BARS = (
    ("ours", UVICORN, 0.75),
    ("ours_haproxy", UVICORN, 1.2),
    ("ours", ("ray_serve",), 1.0),
    ("ours", ("litserve", "litserve_tuned", "litserve_batched"), 1.0),
    ("ours", ("bentoml", "bentoml_tuned"), 1.0),
    ("ours_haproxy", ("ray_serve_haproxy",), 1.0),
)
"""(contestant, against the fastest of these, at least): ratios of the median rates at 32 connections."""
P50_BAR = 1.4
"""p50 of ours_haproxy at one connection over the quicker uvicorn's, at most."""


@dataclass(frozen=True)
class Result:
    """One contestant at one number of connections in one round; times in ms; CPU of all its processes."""

    rate: float
    p50_ms: float
    p99_ms: float
    server_cpu_ms: float
    client_cpu_ms: float
    failed: int


Results = dict[str, dict[int, list[Result]]]


def main() -> None:
    arguments = _arguments()
    if arguments.publish:
        return publish(Material.from_json(arguments.publish))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contestant is ended and the temporary folder removed
    with tempfile.TemporaryDirectory(prefix="cnn_ray-bench-", dir=arguments.work) as folder:
        _measure(arguments, Path(folder))
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="folders; default: drawn pages of 1366x768")
    parser.add_argument("--only", help=f"contestants, of {','.join(CONTESTANTS)} (default all)")
    parser.add_argument("--connections", help="numbers of connections (default 1,8,32,128)")
    parser.add_argument("--seconds", type=float, help="measured seconds at each of them (default 6)")
    parser.add_argument("--rounds", type=int, help="each contestant runs this often, in turns (default 3)")
    parser.add_argument("--architecture", help="default EfficientNetB0")
    parser.add_argument("--size", type=int, help="model input in px (default 224)")
    parser.add_argument("--short", action="store_true", help="does it run at all (CI): a small model, no rivals")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--quiet", type=float, default=0, help="seconds to wait for idle cores before a run")
    parser.add_argument("--work", help="folder for the temporary files")
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    defaults: dict[str, Any] = {"rounds": 3, "seconds": 6.0, "architecture": "EfficientNetB0", "size": 224}
    defaults |= {"only": ",".join(CONTESTANTS), "connections": "1,8,32,128"}
    if arguments.short:  # too few requests for a figure that means anything
        defaults = {"rounds": 1, "seconds": 2.0, "architecture": "simple_cnn", "size": 64}
        defaults |= {"only": ",".join(SHORT), "connections": "1,8"}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    unknown = set(arguments.only.split(",")) - set(CONTESTANTS)
    if unknown:
        parser.error(f"Expected of --only: {', '.join(CONTESTANTS)}. Received: {', '.join(sorted(unknown))}.")
    return arguments


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    material = _material(arguments, folder)
    about = gather_images(arguments.images, folder / "images", material.count)
    run([sys.executable, str(Path(__file__).resolve()), "--publish", material.to_json()], 300)
    chosen = [CONTESTANTS[name] for name in CONTESTANTS if name in arguments.only.split(",")]
    numbers = [int(number) for number in arguments.connections.split(",")]
    results: Results = {contestant.name: {number: [] for number in numbers} for contestant in chosen}
    loads: list[float] = []
    try:
        for number in range(arguments.rounds):
            turn = number % len(chosen)
            for contestant in chosen[turn:] + chosen[:turn]:
                loads.append(wait_for_quiet(arguments.quiet))
                found = _one(contestant, material, folder, numbers, arguments.seconds)
                for connections, result in found.items():
                    results[contestant.name][connections].append(result)
                told = ", ".join(f"{c}: {r.rate:.1f}/s p50 {r.p50_ms:.1f} ms" for c, r in found.items())
                print(
                    f"round {number + 1} of {arguments.rounds}: {contestant.name} {told}", file=sys.stderr, flush=True
                )
    finally:  # ended early: what was measured is still told
        if loads:
            _tell(arguments, about, material, results, loads)


def _tell(arguments: argparse.Namespace, about: str, material: Material, results: Results, loads: list[float]) -> None:
    machine = f"{len(os.sched_getaffinity(0))} cores, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    lines = [
        f"machine: {machine}; others used {min(loads):.2f} to {max(loads):.2f} cores before the runs",
        f"bodies: {about}",
        f"model: {material.architecture} {material.size_px} px, random weights, OpenVINO f32, one replica or worker; "
        f"{arguments.rounds} rounds in turns of {arguments.seconds:g} s, median (lowest-highest)",
        "",
        *table(results),
        "",
        *(["no bar: too few requests for a rate"] if arguments.short else bars(results)),
    ]
    print("\n".join(lines))
    if arguments.json:
        figures = {n: {c: [vars(r) for r in rs] for c, rs in by.items()} for n, by in results.items()}
        record = {"machine": machine, "loads": loads, "bodies": about, "results": figures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _material(arguments: argparse.Namespace, folder: Path) -> Material:
    return Material(
        images=str(folder / "images"),
        models=str(folder / "models"),
        architecture=arguments.architecture,
        size_px=arguments.size,
        count=16 if arguments.short else BODIES,
        shard_size=0,
        batch_size=16,
    )


def _one(
    contestant: Contestant, material: Material, folder: Path, numbers: list[int], seconds: float
) -> dict[int, Result]:
    found: dict[int, Result] = {}
    with serving(contestant, material, folder / f"{contestant.name}.log") as url:
        send(url, material.images, "--connections", "8", "--seconds", "1")
        for connections in numbers:
            before = tree_cpu_s()
            told = send(url, material.images, "--connections", str(connections), "--seconds", str(seconds))
            good = told["statuses"].get("200", 0)
            if not good:
                raise RuntimeError(f"Expected answers from {contestant.name}. Received: {told['statuses']}.")
            found[connections] = Result(
                rate=told["rate"],
                p50_ms=told["p50_ms"],
                p99_ms=told["p99_ms"],
                server_cpu_ms=1000 * (tree_cpu_s() - before) / good,
                client_cpu_ms=told["client_cpu_ms"],
                failed=told["requests"] - good + told["wrong"],
            )
    return found


def send(url: str, images: str, *options: str) -> dict[str, Any]:
    """What the load generator, a process of its own, counted.

    Raises:
        subprocess.CalledProcessError: it failed; its own words are on standard error.
    """
    done = subprocess.run(
        [sys.executable, str(CLIENT), url, images, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(results: Results) -> list[str]:
    """One line for each contestant and number of connections."""
    head = f"{'':18} {'conn':>4} {'requests/s':24} {'of uvicorn':>10} {'p50 ms':>8} {'p99 ms':>8}"
    rows = [f"{head} {'CPU ms':>7} {'failed':>6}"]
    for connections in sorted({number for by in results.values() for number in by}):
        base = max((r for name in UVICORN if (r := _rate(results, name, connections)) is not None), default=None)
        for name, by in results.items():
            if not (runs := by[connections]):
                continue
            rates = [run.rate for run in runs]
            ratio = "-" if base is None else f"{_median(rates) / base:.2f}"
            rows.append(
                f"{name:18} {connections:>4} {_spread(rates):24} {ratio:>10} "
                f"{_median([r.p50_ms for r in runs]):>8.1f} {_median([r.p99_ms for r in runs]):>8.1f} "
                f"{_median([r.server_cpu_ms for r in runs]):>7.1f} {sum(r.failed for r in runs):>6}"
            )
    return rows


def bars(results: Results) -> list[str]:
    """Each bar: reached or not, with the figure."""
    lines = []
    for name, others, least in RATE_BARS:
        rates = {other: rate for other in others if (rate := _rate(results, other, 32)) is not None}
        ours = _rate(results, name, 32)
        if rates and ours is not None:
            fastest = max(rates, key=lambda other: rates[other])
            verdict = _verdict(ours / rates[fastest] >= least, ours / rates[fastest])
            lines.append(f"bar: {name} at least {least:g} x {fastest} at 32 connections: {verdict}")
    p50s = {name: _median([r.p50_ms for r in runs]) for name in UVICORN if (runs := results.get(name, {}).get(1))}
    ours_runs = results.get("ours_haproxy", {}).get(1)
    if p50s and ours_runs:
        quickest = min(p50s, key=lambda other: p50s[other])
        ratio = _median([run.p50_ms for run in ours_runs]) / p50s[quickest]
        lines.append(
            f"bar: p50 of ours_haproxy at most {P50_BAR} x {quickest} at 1: {_verdict(ratio <= P50_BAR, ratio)}"
        )
    return lines


def _verdict(reached: bool, figure: float) -> str:
    return f"{'reached' if reached else 'NOT reached'}, {figure:.2f}"


def _rate(results: Results, name: str, connections: int) -> float | None:
    """Median; None where it did not run."""
    runs = results.get(name, {}).get(connections)
    return _median([run.rate for run in runs]) if runs else None


def _median(figures: list[float]) -> float:
    return statistics.median(figures)


def _spread(figures: list[float]) -> str:
    return f"{_median(figures):.1f} ({min(figures):.1f}-{max(figures):.1f})"


if __name__ == "__main__":
    started = time.monotonic()
    main()
    if "--publish" not in sys.argv:
        print(f"took {time.monotonic() - started:.0f} s", file=sys.stderr)
