"""Faults of the endpoint under load: what its clients see when it is updated, killed, overloaded, or asked for more.

    python tests/chaos/serve_faults.py                          all of them, in default mode and behind HAProxy
    python tests/chaos/serve_faults.py --mode haproxy --only kill,overload
    python tests/chaos/serve_faults.py --short                  the form for CI: a small model, default mode

The load comes from a process of its own at half of the rate that was measured first. Each fault prints its figures; a
broken promise is one sentence, and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the cnn_ray beside these tests
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos.serve_server import NAME, Load, Server, served
from material import Material, gather_images

RETRYABLE = {"429", "502", "503", "504"}
TAIL = 3.0
"""p99 of accepted requests under overload over the unloaded p99, at most."""
OVERLOAD = 5
ONGOING = 3
"""max_ongoing_requests of the overload: what is accepted waits for at most so many before it."""
UPDATE_S = 120.0
"""The load of a rolling update lasts until the old replicas are gone, at most so long."""
SCALES_UP_S, SCALES_DOWN_S = 60.0, 90.0


@dataclass
class Ground:
    """What a fault has to work with, and what it finds."""

    folder: Path
    mode: str
    seconds: float
    broken: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def settings(self, **changed: Any) -> dict[str, Any]:
        """Settings of ServeConfig in this mode."""
        return {"model": f"{NAME}@champion", "haproxy": self.mode == "haproxy", "num_cpus": 0.4, **changed}

    def promise(self, kept: bool, sentence: str) -> None:
        """Notes the sentence where the promise is broken."""
        if not kept:
            self.broken.append(sentence)


def capacity(server: Server, folder: Path) -> float:
    """Requests a second of the server with 32 connections."""
    Load(server, folder, "--connections", "8", "--seconds", "1").result()
    return Load(server, folder, "--connections", "32", "--seconds", "3").result()[0]["rate"]


def half_load(ground: Ground, server: Server, rate: float, *options: str, seconds: float | None = None) -> Load:
    """Half of the rate, for as long as a fault takes."""
    usual = ("--connections", "512", "--seconds", str(seconds or ground.seconds))
    return Load(server, ground.folder, "--rate", f"{rate / 2:.2f}", *usual, *options)


def alias_switch(ground: Ground) -> None:
    """The alias moves to another version: nobody notices but for the version in the answers."""
    from cnn_ray.artifact import set_alias

    models = str(ground.folder / "models")
    set_alias(models, NAME, "champion", 1)
    with served(ground.folder, **ground.settings(max_replicas=1)) as server:
        load = half_load(ground, server, capacity(server, ground.folder))
        time.sleep(ground.seconds / 3)
        set_alias(models, NAME, "champion", 2)
        summary, requests = load.result()
    _all_answered(ground, summary)
    last = max(requests, key=lambda request: request["sent_s"] + request["latency_s"])
    ground.promise(last["version"] == "2", f"the last answer was from version {last['version']}, not from 2")
    ground.figures |= _told(summary) | {"versions": summary["versions"]}


def rolling_update(ground: Ground) -> None:
    """All replicas are replaced by others with another setting: no request fails."""
    with served(ground.folder, **ground.settings(min_replicas=2, max_replicas=2)) as server:
        before = server.replicas()
        load = half_load(ground, server, capacity(server, ground.folder), seconds=UPDATE_S)
        time.sleep(ground.seconds / 6)
        start = time.monotonic()
        server.redeploy(ground.folder / "redeploy.log", request_timeout_s=29)
        gone = _until(lambda: not before & server.replicas(), UPDATE_S)  # the old ones drain after the deployment
        took = time.monotonic() - start
        time.sleep(ground.seconds / 6)
        load.stop()
        summary, _ = load.result()
    ground.promise(gone is not None, "the old replicas still live")
    _all_answered(ground, summary)
    ground.figures |= _told(summary) | {"update_s": round(took, 1)}


def kill(ground: Ground) -> None:
    """SIGKILL of one of two replicas: what was in flight on it may fail, in a way that says `try again`."""
    _kill(ground, retry=False)


def kill_with_retry(ground: Ground) -> None:
    """The same with the documented client retry: no request fails."""
    _kill(ground, retry=True)


def _kill(ground: Ground, *, retry: bool) -> None:
    with served(ground.folder, **ground.settings(min_replicas=2, max_replicas=2)) as server:
        rate = capacity(server, ground.folder)
        load = half_load(ground, server, rate, *(["--retry"] if retry else []))
        time.sleep(ground.seconds / 3)
        victim = min(server.replicas())
        os.kill(victim, signal.SIGKILL)
        killed_s = time.time()
        summary, requests = load.result()
    failed = [request for request in requests if request["status"] != 200]
    killed_s -= summary["start_unix_s"]
    outside = [r for r in failed if r["sent_s"] > killed_s or r["sent_s"] + r["latency_s"] < killed_s]
    strange = sorted({str(r["status"]) for r in failed} - RETRYABLE - {"0"})
    ground.promise(not summary["wrong"], f"{summary['wrong']} wrong answers")
    ground.promise(not strange, f"failed with {', '.join(strange)}, which does not say `try again`")
    ground.promise(not outside, f"{len(outside)} requests failed that were not in flight at the kill")
    ground.promise(not (retry and failed), f"{len(failed)} requests failed in spite of the retry")
    ground.figures |= _told(summary) | {"failed": len(failed), "retried": summary["retried"]}


def overload(ground: Ground) -> None:
    """Five times what the server can: 200 or 429 with Retry-After, and who is accepted does not wait long."""
    with served(ground.folder, **ground.settings(max_replicas=1, max_ongoing_requests=ONGOING)) as server:
        alone, _ = Load(server, ground.folder, "--connections", "1", "--seconds", "6").result()
        most, _ = Load(server, ground.folder, "--connections", str(ONGOING), "--seconds", "4").result()
        rate = OVERLOAD * most["rate"]
        options = ("--rate", f"{rate:.2f}", "--connections", "2000", "--seconds", str(min(ground.seconds, 10)))
        summary, _ = Load(server, ground.folder, *options).result()
    strange = set(summary["statuses"]) - {"200", "429"}
    ground.promise(not strange, f"answers with {', '.join(sorted(strange))}: {summary['statuses']}")
    ground.promise(not summary["not_told_when"], f"{summary['not_told_when']} refusals without Retry-After")
    ground.promise(not summary["wrong"], f"{summary['wrong']} wrong answers")
    ratio = summary["p99_ms"] / alone["p99_ms"]
    ground.promise(
        ratio <= TAIL, f"p99 of accepted requests is {ratio:.1f} times the unloaded p99, allowed are {TAIL:g}"
    )
    ground.figures |= _told(summary) | {
        "offered": round(rate),
        "accepted": round(summary["rate"]),
        "unloaded_p99_ms": round(alone["p99_ms"], 1),
        "ratio": round(ratio, 2),
        "late": summary["late"],
        "max_ongoing_requests": ONGOING,
    }


def autoscaling(ground: Ground) -> None:
    """Load rises: replicas rise. Load falls: replicas fall. No request fails."""
    settings = ground.settings(
        min_replicas=1, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=2, downscale_delay_s=4
    )
    with served(ground.folder, **settings) as server:
        load = Load(server, ground.folder, "--connections", "12", "--seconds", str(max(ground.seconds, 30)))
        up = _until(lambda: len(server.replicas()) == 2, SCALES_UP_S)
        summary, _ = load.result()
        down = _until(lambda: len(server.replicas()) == 1, SCALES_DOWN_S)
    ground.promise(up is not None, f"no second replica within {SCALES_UP_S:.0f} s of load")
    ground.promise(down is not None, f"still two replicas {SCALES_DOWN_S:.0f} s after the load")
    _all_answered(ground, summary)
    ground.figures |= _told(summary) | {"up_s": up, "down_s": down}


FAULTS: dict[str, Callable[[Ground], None]] = {
    "alias": alias_switch,
    "update": rolling_update,
    "kill": kill,
    "kill_retry": kill_with_retry,
    "overload": overload,
    "autoscaling": autoscaling,
}


def _until(true: Callable[[], bool], limit_s: float) -> float | None:
    start = time.monotonic()
    while time.monotonic() - start < limit_s:
        if true():
            return round(time.monotonic() - start, 1)
        time.sleep(0.2)
    return None


def _all_answered(ground: Ground, summary: dict[str, Any]) -> None:
    failed = {status: count for status, count in summary["statuses"].items() if status != "200"}
    ground.promise(not failed, f"requests failed: {failed}")
    ground.promise(not summary["wrong"], f"{summary['wrong']} wrong answers")
    ground.promise(not summary["late"], f"{summary['late']} requests found 512 others waiting")


def _told(summary: dict[str, Any]) -> dict[str, Any]:
    times = {name: round(summary[name], 1) for name in ("p50_ms", "p99_ms", "max_ms")}
    return {"statuses": summary["statuses"], "wrong": summary["wrong"], **times}


def prepare(folder: Path, *, architecture: str, size_px: int, count: int) -> None:
    """Two versions with different weights, images, and the scores that each version must answer for each image."""
    import numpy as np

    from cnn_ray.artifact import load_artifact, set_alias
    from cnn_ray.images import DecodedImage, ImageCaps, decode
    from cnn_ray.predictor import load_predictor

    models = folder / "models"
    about = gather_images([], folder / "images", count)
    print(f"bodies: {about}; model: {architecture} {size_px} px", flush=True)
    material = Material(str(folder / "images"), str(models), architecture, size_px, count, 0, 16)
    publish_versions(material)
    set_alias(str(models), NAME, "champion", 1)
    expected: dict[str, dict[str, list[float]]] = {}
    for version in (1, 2):
        artifact = load_artifact(str(models), f"{NAME}@{version}")
        predictor = load_predictor(artifact, engine="openvino", precision="f32")
        expected[str(version)] = {}
        for path in sorted((folder / "images").iterdir()):
            image = decode(path.read_bytes(), artifact.size_px, ImageCaps())
            if not isinstance(image, DecodedImage):
                raise RuntimeError(f"{path.name}: {image.code}")
            scores = predictor.predict(image.pixels[None].astype(np.uint8))[0]
            named = dict(zip(artifact.labels, scores.tolist(), strict=True))
            expected[str(version)][path.name] = [named[label] for label in sorted(named)]
    telling = {json.dumps(scores) for by_name in expected.values() for scores in by_name.values()}
    if len(telling) < count:  # as good as one answer for all: a wrong one would not be seen
        raise RuntimeError(f"Expected different scores for different images. Received: {len(telling)} different ones.")
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def publish_versions(material: Material) -> None:
    """Versions 1 and 2; the weights of each are random and different. In a child: TensorFlow is not wanted here."""
    from processes import run

    bench = Path(__file__).resolve().parents[1] / "bench"
    code = f"import sys; sys.path[:0] = [{str(bench)!r}, {str(bench.parents[1])!r}]\n"
    code += "from material import Material, publish\n"
    code += "for seed in (1, 2): publish(Material.from_json(sys.argv[1]), seed)"
    run([sys.executable, "-c", code, material.to_json()], 300)


def main() -> int:
    """0 if every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("default", "haproxy", "both"), help="default: both")
    parser.add_argument("--only", default=",".join(FAULTS), help=f"of {','.join(FAULTS)}")
    parser.add_argument("--seconds", type=float, help="how long the load of one fault lasts (default 30)")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--work", help="folder for the temporary files")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is ended in any case
    model: dict[str, Any] = {"architecture": "EfficientNetB0", "size_px": 224, "count": 32}
    if options.short:
        model = {"architecture": "simple_cnn", "size_px": 64, "count": 16}
        options.mode, options.seconds = options.mode or "default", options.seconds or 10
    modes = ("default", "haproxy") if options.mode in (None, "both") else (options.mode,)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="cnn_ray-faults-", dir=options.work) as folder:
        prepare(Path(folder), **model)
        for mode in modes:
            for name in options.only.split(","):
                ground = Ground(Path(folder), mode, options.seconds or 30)
                FAULTS[name](ground)
                found[f"{mode}/{name}"] = {**ground.figures, "broken": ground.broken}
                print(f"{mode:8} {name:12} {'BROKEN' if ground.broken else 'kept'} {ground.figures}", flush=True)
                for sentence in ground.broken:
                    print(f"{'':21} {sentence}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "faults": found}, indent=1))
    return 1 if any(figures["broken"] for figures in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
