"""How long listing and planning take, and how much memory, from ten thousand to ten million objects.

    python tests/bench/planning.py                    # 10^4 .. 10^7; some minutes
    python tests/bench/planning.py --max 1e6          # short form
    python tests/bench/planning.py --latency-ms 50    # each answer of the server waits, as S3's do
    python tests/bench/planning.py --manifest names   # a CSV of all locations and a note, in another order; up to 10^6
    python tests/bench/planning.py --manifest etags   # the same with etags and sizes, which need no request

A fake S3 (planning_server.py) lists made-up objects in a process of its own; for each size a fresh process lists them
through `cnn_ray.inputs.list_inputs` and writes the plan's pages into a folder, as a run does. The server computes on
the same cores, so `wall` holds its time too and `server CPU` says how much that is. `RSS` is the peak beyond what the
process had after its imports and its first request. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planning_server import Objects

HERE = Path(__file__).resolve().parent
BAR_WALL_S, BAR_RSS_MIB, BAR_OBJECTS = 90, 1024, 10_000_000
MANIFEST_BAR_WALL_S, MANIFEST_BAR_OBJECTS = 60, 1_000_000
INPUT = "s3://bench/screens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=float, default=1e7, help="largest number of objects")
    parser.add_argument("--latency-ms", type=float, default=0, help="what the server waits before each answer")
    parser.add_argument("--manifest", choices=["names", "etags"], help="plan a manifest instead of a prefix")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(plan(arguments.child, arguments.manifest)))
        return
    largest = min(arguments.max, MANIFEST_BAR_OBJECTS) if arguments.manifest else arguments.max
    print("   objects   wall s   our CPU s   server CPU s   RSS MiB   pages   shards   requests/1000 objects")
    rows = [measure(count, arguments.latency_ms, arguments.manifest) for count in sizes(int(largest))]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def sizes(largest: int) -> list[int]:
    return [10**power for power in range(4, 8) if 10**power <= largest]


def measure(count: int, latency_ms: float, manifest: str | None) -> dict[str, float]:
    """The figures of one size, printed too."""
    command = [sys.executable, str(HERE / "planning_server.py"), str(count), "--latency-ms", str(latency_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"  # type: ignore[union-attr]
            environment = os.environ | {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "PYTHONPATH": str(HERE.parent.parent),
            }
            child = [sys.executable, __file__, "--child", str(count), *(["--manifest", manifest] if manifest else [])]
            done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout)
            with urllib.request.urlopen(f"{endpoint}/busy") as answer:
                row["server_cpu_s"] = float(answer.read())
        finally:
            server.kill()
    show(row, (MANIFEST_BAR_OBJECTS, MANIFEST_BAR_WALL_S) if manifest else (BAR_OBJECTS, BAR_WALL_S))
    return row


def show(row: dict[str, float], bar: tuple[int, float]) -> None:
    per_thousand = row["requests"] * 1000 / row["objects"]
    print(
        f"{row['objects']:10,.0f} {row['wall_s']:8.2f} {row['cpu_s']:11.2f} {row['server_cpu_s']:14.2f} "
        f"{row['rss_mib']:9.0f} {row['pages']:7.0f} {row['shards']:8.0f} {per_thousand:23.2f}",
        flush=True,
    )
    objects, wall_s = bar
    if row["objects"] == objects:
        reached = row["wall_s"] <= wall_s and row["rss_mib"] <= BAR_RSS_MIB
        print(f"bar (at most {wall_s} s and {BAR_RSS_MIB} MiB): {'reached' if reached else 'NOT reached'}")


def write_manifest(path: Path, objects: Objects, kind: str) -> None:
    """A CSV of all objects in an order that is not theirs: every 7919th, from each start."""
    from planning_server import FACTOR, PRIME

    with path.open("w", encoding="ascii") as file:
        file.write("uri,note,etag,size\n" if kind == "etags" else "uri,note\n")
        for first in range(7919):
            for number in range(first, objects.count, 7919):
                more = f",{number * FACTOR % PRIME:032x},{50_000 + number % 99_991}" if kind == "etags" else ""
                file.write(f"s3://bench/{objects.name(number)},seen by team {number % 97}{more}\n")


def plan(count: int, manifest: str | None) -> dict[str, float]:
    """What listing and planning took in this process, after the plan was found complete and in order."""
    from planning_server import Objects

    from cnn_ray import storage_s3
    from cnn_ray.inputs import list_inputs
    from cnn_ray.plan import Frozen, make_plan
    from cnn_ray.storage import open_store

    requests = 0
    once = storage_s3.S3Store._once

    def counted(*positional, **named):
        nonlocal requests
        requests += 1
        return once(*positional, **named)

    storage_s3.S3Store._once = counted  # type: ignore[method-assign]
    open_store(INPUT).check_writable()
    requests, before_kib = 0, memory_kib("VmRSS")
    frozen = Frozen(
        input_uri=INPUT, uri_column="uri", model="m", version=1, model_digest="d", engine="openvino", precision="f32",
        threshold=0.5, max_image_pixels=1, max_image_bytes=1, shard_size=0, limit=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = INPUT
        if manifest:
            source = f"{folder}/screens.csv"
            write_manifest(Path(source), Objects(count), manifest)
        wall, cpu = time.monotonic(), time.process_time()
        made = make_plan(list_inputs(source, "uri"), frozen, open_store(f"{folder}/plan").put_if_absent)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    objects = Objects(count)
    ends = [uri for page in made.pages for uri in (page.first_uri, page.last_uri)]
    starts = [0, *accumulate(page.rows for page in made.pages)]
    numbers = [number for start, end in pairwise(starts) for number in (start, end - 1)]
    if made.planned_rows != count or ends != [f"s3://bench/{objects.name(n)}" for n in numbers]:
        raise RuntimeError(f"the plan of {count} objects is not what the server lists")
    return {
        "objects": count, "wall_s": wall, "cpu_s": cpu, "rss_mib": (memory_kib("VmHWM") - before_kib) / 1024,
        "pages": len(made.pages), "shards": made.shards, "requests": requests,
    }  # fmt: skip


def memory_kib(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"no {field} in /proc/self/status")
    return int(found[1])


if __name__ == "__main__":
    main()
