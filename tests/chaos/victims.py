"""The process table, for who is killed: decoders below a driver, Ray's workers and actors."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

DECODER = "cnn_ray.decoders"


def command_of(pid: int) -> str:
    """Command line, or the title that Ray gave the process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def parents() -> dict[int, int]:
    """pid -> pid of its parent, for every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return found


def below(roots: Iterable[int]) -> list[int]:
    """All descendants of the given processes, sorted."""
    parent_of, found = parents(), set()
    todo = list(roots)
    while todo:
        one = todo.pop()
        for pid, parent in parent_of.items():
            if parent == one and pid not in found:
                found.add(pid)
                todo.append(pid)
    return sorted(found)


def named(roots: Iterable[int], *words: str) -> list[int]:
    """Descendants whose command holds one of the words."""
    return [pid for pid in below(roots) if any(word in command_of(pid) for word in words)]


def kill_one(pids: list[int], signal_number: int, rng: random.Random) -> bool:
    """Whether one of them got the signal."""
    if not pids:
        return False
    try:
        os.kill(rng.choice(pids), signal_number)
    except ProcessLookupError:
        return False
    return True
