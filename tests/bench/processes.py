"""A command run to its end: wall time, CPU time of the whole process tree, output. Linux, where /proc tells it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.2
LEFTOVER_S = 20.0
LOAD_S = 1.0
IDLE_CORES = 0.15
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Run:
    """What one command took. `cpu_s` is the larger of two counts of the whole process tree: what the kernel added up
    for processes that were waited for, and samples of all that lived, which miss the last 0.2 s of each."""

    wall_s: float
    cpu_s: float
    output: str
    errors: str


def run(command: list[str], timeout_s: float) -> Run:
    """The finished command, after its last orphan (Ray's daemons outlive the driver) has ended too.

    Processes that this one started before are neither counted nor waited for.

    Raises:
        RuntimeError: it failed or took longer than timeout_s; the text holds the end of its errors.
    """
    _adopt_orphans()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "CNN_RAY_DEBUG")}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    others = _descendants(_process_stats(), set())
    meter = _CpuMeter(others)
    reaped = _reaped_s()
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with meter:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                out, err = process.communicate(timeout=LEFTOVER_S)
                err += f"\nended after {timeout_s:.0f} s"
            wall_s = time.monotonic() - start
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        _end_leftovers(others)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} ... gave {process.returncode}:\n{err[-1500:]}")
    return Run(wall_s, max(meter.total_s(), _reaped_s() - reaped), out, err)


@contextlib.contextmanager
def running(command: list[str], log: Path, extra: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command while the block runs; then it gets SIGTERM, and it and all below it have ended.

    `extra` are environment variables; what it writes goes to the log.
    """
    _adopt_orphans()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "CNN_RAY_DEBUG")}
    others = _descendants(_process_stats(), set())
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment | extra, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEFTOVER_S)
            if process.poll() is None:
                process.kill()
                process.wait()
            _end_leftovers(others)


def tree_cpu_s() -> float:
    """User and system time so far of all living descendants of this process."""
    stats = _process_stats()
    ticks = sum(int(stats[pid][11]) + int(stats[pid][12]) for pid in _descendants(stats, set()) if pid in stats)
    return ticks / os.sysconf("SC_CLK_TCK")


def _reaped_s() -> float:
    """CPU time of all descendants that were waited for, by us or by their parents."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _CpuMeter:
    """Samples user and system time of all descendants: Ray ends its workers in ways that rusage never sees."""

    def __init__(self, others: set[int]) -> None:
        self._others = others
        self._ticks: dict[tuple[int, str], int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _CpuMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()

    def total_s(self) -> float:
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        stats = _process_stats()
        for pid in _descendants(stats, self._others):
            fields = stats[pid]
            self._ticks[pid, fields[19]] = int(fields[11]) + int(fields[12])


def _process_stats() -> dict[int, list[str]]:
    """pid -> fields of /proc/PID/stat from the state on (proc(5), field 3)."""
    found: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
    return found


def wait_for_quiet(patience_s: float) -> float:
    """Cores that other processes use now, after at most patience_s of waiting for less than IDLE_CORES."""
    deadline = time.monotonic() + patience_s
    while True:
        before = _busy_s()
        time.sleep(LOAD_S)
        load = (_busy_s() - before) / LOAD_S
        if load < IDLE_CORES or time.monotonic() > deadline:
            return load


def _busy_s() -> float:
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def below(pid: int) -> set[int]:
    """All living descendants of a process that is ours."""
    return _descendants(_process_stats(), set(), pid)


def _descendants(stats: dict[int, list[str]], others: set[int], root: int | None = None) -> set[int]:
    """Processes below this one (or root), without the others and what is below them."""
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    queue = [root or os.getpid()]
    while queue:
        below = [pid for pid in children.get(queue.pop(), []) if pid not in others]
        found.update(below)
        queue.extend(below)
    return found


def _adopt_orphans() -> None:
    """Orphans of our children become ours instead of init's, so that they are counted and waited for."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_leftovers(others: set[int]) -> None:
    """Returns when no descendant but the others is left: none may compute while the next contestant is measured."""
    deadline = time.monotonic() + LEFTOVER_S
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = _descendants(_process_stats(), others)
        if not left:
            return
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
