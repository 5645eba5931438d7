"""What all rounds share: servers, model, input, the undisturbed run; and what must hold of a partition."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from chaos.proxy import FaultProxy, MotoServer, s3_settings
from factories import image_bytes

from cnn_ray import outputs
from cnn_ray.drawn_files import EXPECTED_QUARANTINE, hostile_files
from cnn_ray.errors import PlanError
from cnn_ray.storage import Store, open_store

TESTS = Path(__file__).parents[1]
BUCKET = "chaos"
INPUT = f"s3://{BUCKET}/in"
SHARD_SIZE = 8
WRITTEN_ONCE = ("part-", "_quarantine/", "_plan")
VARYING = ("started_at", "finished_at", "config", "runner", "libraries", "wait_s", "busy_s", "images_per_s")
"""Fields of a manifest that tell about one attempt and not about the answers."""


class Violation(Exception):
    """A promise was broken; the text says which."""


class World:
    """Servers, model and input of a chaos run, in `folder`. This process talks to moto, the runs to the proxy."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder = folder
        self.models = str(folder / "models")
        code = "import sys; from factories import publish_small_artifact; publish_small_artifact(sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", code, self.models],
            check=True,
            env={**os.environ, "PYTHONPATH": str(TESTS), "TF_CPP_MIN_LOG_LEVEL": "3"},
            stderr=subprocess.DEVNULL,
        )
        self.moto = MotoServer()
        self.proxy = FaultProxy(self.moto.url, input_path=f"/{BUCKET}/in/")
        os.environ.update(s3_settings(self.moto.url))
        import boto3

        self._client = boto3.client("s3")
        self._client.create_bucket(Bucket=BUCKET)
        hostile = hostile_files()
        files = {f"shot-{seed:04d}.png": image_bytes(seed) for seed in range(images)} | hostile
        store = open_store(INPUT)
        for name, raw in files.items():
            store.put(name, raw)
        self.listing = Counter((f"{INPUT}/{name}", hashlib.md5(raw).hexdigest()) for name, raw in files.items())  # noqa: S324
        self.input_bytes = sum(len(raw) for raw in files.values())
        self.hostile = {f"{INPUT}/{name}": code for name, code in EXPECTED_QUARANTINE.items()}
        self.reference: dict[str, bytes] = {}
        self.reference_manifest: dict[str, Any] = {}

    def environment(self) -> dict[str, str]:
        """Environment of the runs: S3 is the proxy, waits are short, cnn_ray and the tests can be imported."""
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "chaos" / "site")])
        own = {"PYTHONPATH": path, "CHAOS_SHORT_WAITS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        own |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread, and the runs are forks
        own |= {"NO_COLOR": "1", "XDG_CACHE_HOME": str(self.folder / "cache"), "COLUMNS": "200"}
        return {**os.environ, **s3_settings(self.proxy.url), **own}

    def arguments(self, output: str, runner: str) -> list[str]:
        """The command line of a run."""
        flags = {
            "--model": "small@1",
            "--models-uri": self.models,
            "--runner": runner,
            "--shard-size": str(SHARD_SIZE),
            "--num-threads": "1",
        }
        if runner == "ray":
            flags["--num-predict-actors"] = "2"
        return ["score", INPUT, output, *(word for pair in flags.items() for word in pair)]

    def keep_reference(self, partition: str) -> None:
        """The run in `partition` is what all others are compared with."""
        self.reference = committed(open_store(partition))
        self.reference_manifest = lasting(open_store(partition))
        self.check_finished(partition)

    def has_manifest(self, partition: str) -> bool:
        """Whether a reader would find one; asked often, so with one client for all (a new one takes 0.2 s of CPU)."""
        prefix = f"{partition.removeprefix(f's3://{BUCKET}/')}/_manifest"
        return self._client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["KeyCount"] > 0

    def check_readers(self, partition: str) -> bool:
        """Whether a reader sees a run; if so the whole one.

        Raises:
            Violation: a reader that trusts the manifest saw something else.
        """
        try:
            table = outputs.read(partition)
        except PlanError as error:
            if "no manifest" not in str(error):
                raise Violation(f"a reader met a damaged run: {error}") from error
            return False
        expected = Counter(pair for pair in self.listing.elements() if pair[0] not in self.hostile)
        if pairs(table) != expected:
            raise Violation(f"a reader saw {table.num_rows} rows of a run that should hold {expected.total()}")
        return True

    def check_finished(self, partition: str) -> None:
        """Nothing: the run is complete, exactly once, and equal to the undisturbed one.

        Raises:
            Violation: it is not.
        """
        store = open_store(partition)
        if not self.check_readers(partition):
            raise Violation("exit code 0 without a manifest")
        files = committed(store)
        planned = _rows(files, "_plan/")
        scored, quarantined = _rows(files, "part-"), _rows(files, "_quarantine/")
        if planned != self.listing:
            raise Violation(f"the plan is not the listing: {_difference(planned, self.listing)}")
        if scored + quarantined != planned:
            raise Violation(f"lost or doubled: {_difference(scored + quarantined, planned)}")
        bad = outputs.read_quarantine(partition)
        codes = dict(zip(bad["uri"].to_pylist(), bad["code"].to_pylist(), strict=True))
        if codes != self.hostile:
            raise Violation(f"quarantine holds {codes}")
        if files != self.reference:
            names = sorted(n for n in files.keys() | self.reference.keys() if files.get(n) != self.reference.get(n))
            raise Violation(f"other bytes than the undisturbed run: {names}")
        if lasting(store) != self.reference_manifest:
            raise Violation("the manifest says something else than that of the undisturbed run")

    def keep_evidence(self, partition: str, folder: Path) -> None:
        """Every object of the partition lies in `folder`."""
        store = open_store(partition)
        for key in store.keys():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(store.get(key))

    def close(self) -> None:
        """The servers are gone."""
        self.proxy.close()
        self.moto.close()


class Starter:
    """The warm parent: starts runs one after the other."""

    def __init__(self, world: World, runner: str, environment: dict[str, str]) -> None:
        self._running = 0
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "chaos" / "warm_parent.py"), runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(world.folder / f"warm-{runner}.log").open("w"),
            env=environment,
            text=True,
        )

    def start(self, arguments: list[str], log: Path) -> int:
        """pid of the run."""
        stream = self._process.stdin
        if stream is not None:
            stream.write(json.dumps({"args": arguments, "log": str(log)}) + "\n")
            stream.flush()
        self._running = self._answer()["pid"]
        return self._running

    def code(self) -> int:
        """Exit code of the run that was started last, which is waited for."""
        code = self._answer()["code"]
        self._running = 0
        return code

    def _answer(self) -> dict[str, int]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"The warm parent ended with {self._process.wait()}; see its log.")
        return json.loads(line)

    def close(self) -> None:
        """The parent is gone, and a run that was left."""
        if self._running:
            os.kill(self._running, signal.SIGKILL)
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(30)


def committed(store: Store) -> dict[str, bytes]:
    """Name -> bytes of everything in a partition that is written once and depends on the input alone."""
    return {key: store.get(key) for prefix in WRITTEN_ONCE for key in store.keys(prefix)}


def lasting(store: Store) -> dict[str, Any]:
    """What the only manifest says about the answers.

    Raises:
        Violation: there is not exactly one.
    """
    names = [key for key in store.keys("_manifest") if key.endswith(".json")]
    if len(names) != 1:
        raise Violation(f"expected one manifest, found {names}")
    return _without_varying(json.loads(store.get(names[0])))


def _without_varying(value: Any) -> Any:
    """The JSON value without VARYING fields at any depth."""
    if isinstance(value, dict):
        return {name: _without_varying(inner) for name, inner in value.items() if name not in VARYING}
    return [_without_varying(inner) for inner in value] if isinstance(value, list) else value


def pairs(table: pa.Table) -> Counter[tuple[str, str]]:
    """The multiset of (uri, etag) of a table."""
    return Counter(zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True))


def _rows(files: dict[str, bytes], prefix: str) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for name, raw in files.items():
        if name.startswith(prefix) and name.endswith(".parquet"):
            total += pairs(pq.read_table(io.BytesIO(raw), columns=["uri", "etag"]))
    return total


def _difference(found: Counter, expected: Counter) -> str:
    return f"too many {list((found - expected).elements())[:5]}, missing {list((expected - found).elements())[:5]}"


def wait_until_gone(pids: set[int], seconds: float, is_it: Any) -> set[int]:
    """Those of the processes that are still there after the time."""
    deadline = time.monotonic() + seconds
    while (left := {pid for pid in pids if is_it(pid)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
