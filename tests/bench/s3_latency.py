"""Rate of the local runner reading from S3 with 50 ms latency per GET, against the same files in a folder (bar 0.9).

    python tests/bench/s3_latency.py [--images DIR ...] [--count 2048] [--rounds 3] [--latency 0.05] [--json FILE]

S3 is moto behind the fault proxy of tests/chaos, which answers objects from memory after it has seen them once and adds
the latency to each GET. The proxy works on the same cores as what is measured, so its share is printed; output is a
local folder both times. Rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from figures import Result, result_of
from first_part import make_material
from material import Material, forget_reads, image_paths
from processes import run
from throughput import TIMEOUT_S, commits, score_command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chaos.proxy import FaultProxy, MotoServer, s3_settings

BAR = 0.9
BUCKET, PREFIX = "bench", "in/"
UPLOADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="folders; default: drawn pages")
    parser.add_argument("--count", type=int, default=2048, help="images of a run (default 2048)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of each GET (default 0.05)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are ended too
    with (
        tempfile.TemporaryDirectory(prefix="cnn_ray-s3-") as folder,
        MotoServer() as moto,
        FaultProxy(moto.url, f"/{BUCKET}/{PREFIX}") as proxy,
    ):
        material = make_material(arguments.images, Path(folder), arguments.count)
        os.environ |= s3_settings(proxy.url)
        _upload(material, moto.url, proxy.url)
        proxy.set(latency_s=arguments.latency)
        found: dict[str, list[Result]] = {"folder": [], "s3": []}
        extra: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            for where in ("folder", "s3") if number % 2 == 0 else ("s3", "folder"):
                proxy.reset_counters()
                before = _cpu_s(proxy.pid)
                result = _one(where, material, Path(folder) / f"{where}-{number}")
                found[where].append(result)
                print(f"round {number + 1}: {where} {result.steady:.1f} images/s", file=sys.stderr, flush=True)
                if where == "s3":
                    share = (_cpu_s(proxy.pid) - before) / result.wall_s
                    extra.append({"proxy_cores": share, **proxy.counters()})
        _show(found, extra, arguments.latency)
        if arguments.json:
            record = {name: [asdict(result) for result in results] for name, results in found.items()}
            arguments.json.write_text(json.dumps({**record, "proxy": extra}, indent=2) + "\n", encoding="utf-8")


def _upload(material: Material, server: str, proxy: str) -> None:
    """All images are in the bucket, and in the proxy's memory."""
    import boto3

    upstream, through = (boto3.client("s3", endpoint_url=url) for url in (server, proxy))
    upstream.create_bucket(Bucket=BUCKET)

    def put(path: Path) -> None:
        upstream.put_object(Bucket=BUCKET, Key=PREFIX + path.name, Body=path.read_bytes())
        through.get_object(Bucket=BUCKET, Key=PREFIX + path.name)["Body"].read()

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(put, image_paths(material)))


def _one(where: str, material: Material, output: Path) -> Result:
    images = None if where == "folder" else f"s3://{BUCKET}/{PREFIX}"
    forget_reads(material)
    done = run(score_command(material, output, "local", images), TIMEOUT_S)
    return result_of(commits(output), material, done, {})


def _show(found: dict[str, list[Result]], extra: list[dict[str, Any]], latency_s: float) -> None:
    medians = {}
    for where, results in found.items():
        rates = [result.steady for result in results]
        medians[where] = statistics.median(rates)
        cpu = statistics.median(result.cpu_ms for result in results)
        print(f"{where:7} {medians[where]:.1f} images/s ({min(rates):.1f}-{max(rates):.1f}), {cpu:.1f} CPU ms/image")
    ratio = medians["s3"] / medians["folder"]
    share = statistics.median(one["proxy_cores"] for one in extra)
    flying = max(one["most_in_flight"] for one in extra)
    print(f"proxy: {share:.2f} of the {len(os.sched_getaffinity(0))} cores, at most {flying} requests in flight")
    verdict = "reached" if ratio >= BAR else "NOT reached"
    print(f"bar: S3 with {1000 * latency_s:.0f} ms a GET at least {BAR} x the folder's rate: {verdict}, {ratio:.2f}")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
