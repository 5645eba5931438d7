"""Whole runs on storage that fails, disks that are full, decoders that crash: what is kept, what it costs to go on.

Runs are processes of their own; storage is moto behind the fault proxy of tests/chaos, which counts what is fetched.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chaos.proxy import FAULTS, FaultProxy, s3_settings
from factories import image_bytes, write_images

from cnn_ray import outputs, storage_retry
from cnn_ray.errors import ChangedError, PlanError
from cnn_ray.storage import Store, open_store

IMAGES, SHARD_SIZE = 300, 8
PARTS = math.ceil(IMAGES / SHARD_SIZE)
CHAOS = Path(__file__).parents[1] / "chaos"


class Stage:
    """An S3 with 300 images behind the proxy, and the bytes of an undisturbed run."""

    def __init__(self, proxy: FaultProxy, models: str) -> None:
        self.proxy = proxy
        self.models = models
        self.input = "s3://faults/in"
        self.image_bytes = sum(len(image_bytes(seed)) for seed in range(IMAGES))
        self.reference: dict[str, bytes] = {}
        self._number = 0

    def output(self) -> str:
        self._number += 1
        return f"s3://faults/out-{self._number}"

    def start(self, output: str, source: str | None = None) -> subprocess.Popen[str]:
        environment = os.environ | s3_settings(self.proxy.url) | {"CHAOS_SHORT_WAITS": "1", "COLUMNS": "500"}
        environment["PYTHONPATH"] = str(CHAOS / "site")
        return start_run(self.models, source or self.input, output, environment)

    def run(self, output: str) -> tuple[int, str]:
        return ends_with(self.start(output))


def start_run(models: str, source: str, output: str, environment: dict[str, str], size: int = SHARD_SIZE):
    command = [sys.executable, "-m", "cnn_ray.cli", "score", source, output, "--runner", "local", "--model", "small@1"]
    command += ["--models-uri", models, "--shard-size", str(size), "--num-threads", "1", "--no-report"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=pipe, text=True)


def ends_with(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


def partition(output: str) -> Store:
    return open_store(f"{output}/model=small/version=1")


def committed(output: str) -> dict[str, bytes]:
    store = partition(output)
    return {key: store.get(key) for prefix in ("part-", "_quarantine/", "_plan") for key in store.keys(prefix)}


def parts(output: str) -> list[str]:
    return partition(output).keys("part-")


def one_sentence(said: str) -> str:
    """The only message of a run that ended early: no traceback, no warning beside it."""
    lines = [line for line in said.splitlines() if "Expected" in line or "Traceback" in line or "WARNING" in line]
    assert len(lines) == 1, said
    assert lines[0].startswith("cnn-ray: Expected ")
    assert " Received: " in lines[0]
    assert " Next: " in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def built(s3_server: str, small_models: str) -> Iterator[Stage]:
    import boto3

    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="faults")
    store = open_store("s3://faults/in")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: store.put(f"shot-{seed:04d}.png", image_bytes(seed)), range(IMAGES)))
    with FaultProxy(s3_server, input_path="/faults/in/") as proxy:
        stage = Stage(proxy, small_models)
        output = stage.output()
        code, said = stage.run(output)
        assert code == 0, said
        stage.reference = committed(output)
        yield stage


@pytest.fixture
def stage(built: Stage) -> Iterator[Stage]:
    built.proxy.calm()
    built.proxy.reset_counters()
    yield built
    built.proxy.calm()


def check_equal(stage: Stage, output: str) -> None:
    assert committed(output) == stage.reference
    assert outputs.read(partition(output).uri).num_rows == IMAGES
    assert outputs.read_quarantine(partition(output).uri).num_rows == 0


# ---- storage that fails


def test_one_request_in_five_fails_and_no_row_does(stage: Stage) -> None:
    """All kinds of faults together on every kind of request: retried, never a row of the quarantine."""
    stage.proxy.set(seed=7, faults={"all": {name: 0.2 / len(FAULTS) for name in FAULTS}}, stall_s=0.05)
    output = stage.output()
    code, said = stage.run(output)
    assert code == 0, said
    counted = stage.proxy.counters()
    requests = sum(n for name, n in counted.items() if name.endswith(".requests"))
    assert counted["faults"] > 0.15 * requests > 50
    hit = {name for name in FAULTS if any(counted.get(f"{kind}.{name}") for kind in ("get", "put", "read", "list"))}
    assert hit == set(FAULTS)
    stage.proxy.calm()
    check_equal(stage, output)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_one_request_in_five_fails_in_one_way(stage: Stage, fault: str) -> None:
    stage.proxy.set(seed=8, faults={"all": {fault: 0.2}}, stall_s=0.05)
    output = stage.output()
    code, said = stage.run(output)
    assert code == 0, said
    assert stage.proxy.counters()["faults"] > 50
    stage.proxy.calm()
    check_equal(stage, output)


def test_an_outage_ends_in_75_and_what_is_committed_stays(stage: Stage) -> None:
    output = stage.output()
    stage.proxy.set(outage_after=220)
    start = time.monotonic()
    code, said = stage.run(output)
    took_s = time.monotonic() - start
    assert (code, took_s < 30) == (75, True), said  # waits of a few seconds here, 90 s at most in the product
    assert "try again later" in one_sentence(said)
    stage.proxy.calm()
    kept = committed(output)
    assert 0 < len(parts(output)) < PARTS
    with pytest.raises(PlanError, match="no manifest"):
        outputs.read(partition(output).uri)
    stage.proxy.reset_counters()
    assert stage.run(output)[0] == 0
    fetched = stage.proxy.counters()["get.requests"]
    assert fetched == IMAGES - SHARD_SIZE * sum(name.startswith("part-") for name in kept)
    assert kept.items() <= committed(output).items()
    check_equal(stage, output)


def test_waits_of_the_product_are_bounded_and_outlast_a_fault_rate_of_a_fifth() -> None:
    waits = [
        min(storage_retry.BACKOFF_MAX_S, storage_retry.BACKOFF_BASE_S * 2**n) for n in range(storage_retry.ATTEMPTS - 1)
    ]
    assert sum(waits) <= storage_retry.RETRY_TOTAL_S <= 60
    assert sum(waits) / 2 >= 15  # full jitter takes half of it: an outage of seconds ends no run
    assert 0.2**storage_retry.ATTEMPTS * 1_000_000 < 0.2


@pytest.mark.slow
def test_credentials_that_expire_for_a_while_are_survived(stage: Stage) -> None:
    output = stage.output()
    process = stage.start(output)
    wait_for_parts(output, 3, process)
    stage.proxy.set(expired=True)
    time.sleep(0.1)
    stage.proxy.set(expired=False)
    code, said = ends_with(process)
    assert code == 0, said
    assert stage.proxy.counters()["faults"] > 0
    check_equal(stage, output)


@pytest.mark.slow
def test_credentials_that_stay_expired_end_in_75(stage: Stage) -> None:
    output = stage.output()
    process = stage.start(output)
    wait_for_parts(output, 3, process)
    stage.proxy.set(expired=True)
    code, said = ends_with(process)
    assert code == 75, said
    assert "ExpiredToken" in one_sentence(said)
    stage.proxy.calm()
    assert stage.run(output)[0] == 0
    check_equal(stage, output)


def wait_for_parts(output: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(parts(output)) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_a_kill_at_nine_tenths_at_most_an_eighth_is_fetched_again(stage: Stage) -> None:
    """SIGKILL with 90 % of the parts committed; the rerun fetches at most 12 % of the bytes, counted at the proxy."""
    output, done = stage.output(), math.ceil(0.9 * PARTS)
    process = stage.start(output)
    probes = ["_probe-* (4 conditional writes)"] * 4
    before = len([*probes, "_lease.json", "_plan/*.parquet", "_plan-g0001.json"])
    trip = {"kind": "put", "nth": before + done, "when": "after", "pid": process.pid, "signal": int(signal.SIGKILL)}
    stage.proxy.set(trip=trip)
    assert ends_with(process)[0] == -signal.SIGKILL
    assert len(parts(output)) == done
    stage.proxy.calm()
    stage.proxy.reset_counters()
    assert stage.run(output)[0] == 0
    counted = stage.proxy.counters()
    assert 0 < counted["get.body_bytes"] <= 0.12 * stage.image_bytes
    assert counted["get.requests"] == IMAGES - done * SHARD_SIZE
    check_equal(stage, output)


# ---- the proxy itself


def test_the_proxy_answers_as_s3_does_and_holds_64_slow_gets_at_once(stage: Stage, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", stage.proxy.url)
    store = open_store(stage.input)
    name, raw = "shot-0000.png", image_bytes(0)
    etag = store.head(name).etag
    assert store.get(name, if_match=etag) == raw
    with pytest.raises(ChangedError):
        store.get(name, if_match="0" * 32)
    assert len(store.keys()) == IMAGES
    import boto3

    client = boto3.client("s3", endpoint_url=stage.proxy.url)
    for asked, expected in (("bytes=5-9", raw[5:10]), ("bytes=-4", raw[-4:]), ("bytes=8-", raw[8:])):
        answer = client.get_object(Bucket="faults", Key=f"in/{name}", Range=asked)
        assert answer["Body"].read() == expected
        assert answer["ContentRange"].endswith(f"/{len(raw)}")
    stage.proxy.reset_counters()
    stage.proxy.set(latency_s=0.05)
    start = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda n: store.get(f"shot-{n % IMAGES:04d}.png"), range(1280)))
    assert 1.0 <= time.monotonic() - start < 4  # 20 rounds of 50 ms
    assert stage.proxy.counters()["most_in_flight"] >= 60
    assert stage.proxy.counters()["get.requests"] == 1280


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this container may not mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_goes_on_when_there_is_space(
    tmp_path: Path, small_disk: Path, small_models: str
) -> None:
    source = write_images(tmp_path / "in", 60, bad=1)
    output = str(small_disk / "out")

    def run(where: str) -> tuple[int, str]:
        return ends_with(start_run(small_models, str(source), where, dict(os.environ), 4))

    code, said = run(output)
    assert code == 2, said
    assert "Expected free space on the disk of" in one_sentence(said)
    store = partition(output)
    assert 0 < len(store.keys("part-")) < 16
    assert store.keys("_manifest") == []
    for name in store.keys("part-"):
        assert pq.read_table(Path(store.uri) / name).num_rows <= 4
    names = [path.name for path in Path(store.uri).iterdir()]
    assert not [name for name in names if "tmp" in name]
    with pytest.raises(PlanError, match="no manifest"):
        outputs.read(store.uri)
    kept = committed(output)
    remount(small_disk, "size=8m")
    assert run(output)[0] == 0
    assert kept.items() <= committed(output).items()
    other = str(tmp_path / "other")
    assert run(other)[0] == 0
    assert committed(output) == committed(other)


def test_a_read_only_output_is_one_sentence_and_nothing_changes(
    tmp_path: Path, small_disk: Path, small_models: str
) -> None:
    source = write_images(tmp_path / "in", 4)
    remount(small_disk, "ro")
    code, said = ends_with(start_run(small_models, str(source), str(small_disk / "out"), dict(os.environ)))
    assert code == 2, said
    assert "Read-only file system" in one_sentence(said)
    assert files_below(small_disk) == {}
    remount(small_disk, "rw")
    assert ends_with(start_run(small_models, str(source), str(small_disk / "out"), dict(os.environ)))[0] == 0


# ---- decoders


CRASHING_DECODE = """
import importlib.abc, importlib.machinery, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "cnn_ray.images":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            decode = module.decode
            def crashing(data, *rest):
                if b"SIGSEGV, please" in data:
                    os.kill(os.getpid(), signal.SIGSEGV)
                return decode(data, *rest)
            module.decode = crashing
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_a_file_that_crashes_its_decoder_costs_one_row(tmp_path: Path, small_models: str) -> None:
    """The crash is made by a sitecustomize of this test, in the decoder processes alone: the driver would die of it."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(CRASHING_DECODE)
    source = write_images(tmp_path / "in", 40)
    for name in ("shot-0005.png", "shot-0006.png", "shot-0030.png"):
        (source / name).write_bytes(image_bytes(int(name[5:9])) + b"SIGSEGV, please")
    output = str(tmp_path / "out")
    environment = os.environ | {"PYTHONPATH": str(site)}
    process = start_run(small_models, str(source), output, environment)
    code, said = ends_with(process)
    assert code == 4, said  # 3 of 40 are more than 5 %: the run is whole, and the rate is what readers refuse
    store = partition(output)
    quarantine = outputs.read_quarantine(store.uri).to_pylist()
    assert [(Path(row["uri"]).name, row["code"], row["detail"]) for row in quarantine] == [
        (name, "decoder_crash", "the decoder ended with SIGSEGV")
        for name in ("shot-0005.png", "shot-0006.png", "shot-0030.png")
    ]
    scored = sum(pq.read_table(Path(store.uri) / name).num_rows for name in store.keys("part-"))
    assert scored == 37
