"""Two runs for one partition: who may work, what the other one hears, and that a late holder does no harm."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import write_images

from cnn_ray import outputs
from cnn_ray.errors import BusyError, UnavailableError
from cnn_ray.lease import LEASE, Lease, process_identity
from cnn_ray.storage import LocalStore, Store, open_store

NAMES = ("part-", "_quarantine/", "_plan")


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def document(**changes: object) -> bytes:
    """The lease of a process on another host that would hold it for 60 s more."""
    now = time.time()
    fields = {"host": "elsewhere", "pid": 7, "process": "boot:1:2", "since_s": now - 100, "expires_s": now + 50}
    return json.dumps({**fields, "duration_s": 60, **changes}).encode()


def taken(store: Store, duration_s: float = 60) -> bool:
    """Whether a new run may work."""
    try:
        with Lease(store, duration_s):
            return True
    except BusyError:
        return False


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('s3_uri')}/out" if request.param == "s3" else str(tmp_path / "out")


# ---- what a document says


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_a_living_holder_elsewhere_is_named_with_its_start(store: Store) -> None:
    store.put(LEASE, document(since_s=0))
    with pytest.raises(BusyError, match=r"process 7 on elsewhere works on it since 1970-01-01T00:00:00\+00:00"):
        Lease(store, 60).__enter__()


def test_a_released_and_a_damaged_lease_block_nobody(store: Store) -> None:
    for raw in (document(expires_s=0), b"{", b""):
        store.put(LEASE, raw)
        assert taken(store)


def test_a_holder_that_died_here_is_replaced_at_once(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = {"host": socket.gethostname(), "pid": child.pid, "process": process_identity(child.pid)}
    store.put(LEASE, document(**here))
    assert not taken(store)
    child.kill()
    wait_for(lambda: process_identity(child.pid) is None)  # not waited for yet: a zombie is dead too
    assert Path(f"/proc/{child.pid}").exists()
    assert taken(store)
    child.wait()
    store.put(LEASE, document(**here))
    assert taken(store)


def test_a_reused_pid_is_not_the_holder(store: Store) -> None:
    machine = (process_identity(os.getpid()) or "").rpartition(":")[0]
    store.put(LEASE, document(host=socket.gethostname(), pid=os.getpid(), process=f"{machine}:1"))
    assert taken(store)


def test_another_container_with_the_same_host_name_is_not_judged_by_our_pids(store: Store) -> None:
    store.put(LEASE, document(host=socket.gethostname(), pid=2**22 - 3, process="boot:other-namespace:1"))
    assert not taken(store)


def test_what_expired_long_ago_is_replaced_at_once(store: Store) -> None:
    store.put(LEASE, document(expires_s=time.time() - 3600))
    start = time.monotonic()
    assert taken(store)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("skew_s", [-5, 3600], ids=["expired by our clock", "written by a clock an hour ahead"])
def test_clocks_that_differ_take_no_lease_from_a_living_holder(store: Store, skew_s: float) -> None:
    """The holder renews with a clock of its own; only the heartbeat tells that it lives."""
    lease = {"duration_s": 1.2, "expires_s": time.time() + skew_s}
    store.put(LEASE, document(**lease))
    renewed = threading.Timer(0.3, lambda: store.put(LEASE, document(**{**lease, "expires_s": time.time() + skew_s})))
    renewed.start()
    assert not taken(store)
    renewed.join()
    start = time.monotonic()
    assert taken(store)  # it renewed once and never again
    assert 0.5 < time.monotonic() - start < 5


def test_a_lease_released_while_it_is_watched_is_free(store: Store) -> None:
    store.put(LEASE, document(duration_s=1.2, expires_s=time.time() - 5))
    release = threading.Timer(0.2, lambda: store.put(LEASE, document(expires_s=0)))
    release.start()
    assert taken(store)
    release.join()


# ---- a held lease


def test_a_held_lease_is_renewed_and_released(store: Store) -> None:
    def expires_s() -> float:
        return json.loads(store.get(LEASE))["expires_s"]

    with Lease(store, 0.4):
        first = expires_s()
        wait_for(lambda: expires_s() > first, 5)
        assert not taken(store)
    assert expires_s() == 0


def test_heartbeats_that_fail_for_longer_than_the_lease_stop_nothing(store: Store, monkeypatch) -> None:
    failed = []
    put_if_match = LocalStore.put_if_match

    def failing(self: LocalStore, key: str, data: bytes, version: str) -> str | None:
        put_if_match(self, key, data, version)  # written, but the answer is lost: the known token is stale now
        failed.append(1)
        raise UnavailableError("Expected an answer. Received: none. Next: try again later.")

    with Lease(store, 0.2):
        monkeypatch.setattr(LocalStore, "put_if_match", failing)
        wait_for(lambda: len(failed) >= 6, 5)
        monkeypatch.undo()
        before = json.loads(store.get(LEASE))["expires_s"]
        wait_for(lambda: json.loads(store.get(LEASE))["expires_s"] > before, 5)  # it is still ours, and goes on
        assert not taken(store, 0.2)
    assert json.loads(store.get(LEASE))["expires_s"] == 0


def test_a_storage_that_is_away_does_not_hold_up_the_end(store: Store, monkeypatch) -> None:
    stuck = threading.Event()
    monkeypatch.setattr("cnn_ray.lease.RELEASE_S", 0.2)
    start = time.monotonic()
    with Lease(store, 60):
        monkeypatch.setattr(LocalStore, "put_if_match", lambda *_: stuck.wait(20))
    assert time.monotonic() - start < 5
    stuck.set()


def test_two_that_start_together_have_one_winner(output: str, tmp_path: Path) -> None:
    Path(output).mkdir(parents=True, exist_ok=True) if output.startswith("/") else None
    code = (
        "import sys, time; from cnn_ray.lease import Lease; from cnn_ray.storage import open_store;"
        "from cnn_ray.errors import BusyError\n"
        "lease = Lease(open_store(sys.argv[1]), 60)\nprint('ready', flush=True)\ninput()\n"
        "try:\n    lease.__enter__()\n    print('won', flush=True)\n    input()\nexcept BusyError:\n    print('busy')\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    assert sorted(racer.stdout.readline() for racer in racers) == ["busy\n", "busy\n", "won\n"]
    for racer in racers:
        racer.kill()
        racer.communicate()


# ---- whole runs


class Run:
    """`cnn-ray score` as a process; one image a shard, so that there is time to stop it in the middle."""

    def __init__(self, models: str, source: Path, output: str, lease_s: int) -> None:
        flags = {"--model": "small@1", "--models-uri": models, "--shard-size": "1", "--lease-s": str(lease_s)}
        command = [sys.executable, "-m", "cnn_ray.cli", "score", str(source), output, "--runner", "local"]
        command += [word for pair in flags.items() for word in pair]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.store = open_store(f"{output}/model=small/version=1")

    def stop_in_the_middle(self) -> None:
        wait_for(lambda: self.process.poll() is not None or len(self.store.keys("part-")) >= 3)
        self.process.send_signal(signal.SIGSTOP)
        assert self.process.poll() is None
        assert self.store.keys("_manifest") == []

    def ends_with(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


def committed(store: Store) -> dict[str, tuple[bytes, str]]:
    """Bytes and etag (which on disk holds the time of writing) of everything that is written once only."""
    keys = [key for prefix in NAMES for key in store.keys(prefix)]
    return {key: (store.get(key), store.head(key).etag) for key in keys}


def data_of(store: Store) -> dict[str, bytes]:
    return {key: raw for key, (raw, _) in committed(store).items()}


@pytest.mark.slow
def test_the_second_run_says_who_works_and_takes_over_when_that_one_dies(
    tmp_path: Path, small_models: str, output: str
) -> None:
    source = write_images(tmp_path / "in", 60)
    first = Run(small_models, source, output, lease_s=60)
    first.stop_in_the_middle()
    code, said = Run(small_models, source, output, lease_s=60).ends_with()
    assert code == 75, said
    assert f"process {first.process.pid} on {socket.gethostname()} works on it since 20" in said
    first.process.kill()  # stopped or not, and nobody waits for it yet
    before = committed(first.store)
    start = time.monotonic()
    code, said = Run(small_models, source, output, lease_s=60).ends_with()
    assert (code, time.monotonic() - start < 30) == (0, True), said
    assert before.items() <= committed(first.store).items()
    assert outputs.read(first.store.uri).num_rows == 60
    first.ends_with()


@pytest.mark.slow
def test_a_stopped_holder_that_comes_back_does_no_harm(tmp_path: Path, small_models: str, output: str) -> None:
    source = write_images(tmp_path / "in", 60, bad=2)
    late = Run(small_models, source, output, lease_s=2)
    late.stop_in_the_middle()
    before = committed(late.store)
    time.sleep(2)  # its lease runs out
    code, said = Run(small_models, source, output, lease_s=2).ends_with()
    assert code == 0, said
    finished = committed(late.store)
    manifest = late.store.get("_manifest-g0001.json")
    assert before.items() <= finished.items()
    late.process.send_signal(signal.SIGCONT)
    code, said = late.ends_with()
    assert code in (0, 75), said
    assert committed(late.store) == finished  # nothing was written a second time, nothing more
    assert late.store.get("_manifest-g0001.json") == manifest
    assert late.store.keys("_manifest") == ["_manifest-g0001.json"]
    alone = Run(small_models, source, f"{tmp_path}/alone", lease_s=2)
    assert alone.ends_with()[0] == 0
    assert data_of(alone.store) == data_of(late.store)
