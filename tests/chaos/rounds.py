"""One round: a run disturbed by injected faults and kills, started again until it is done, looked at all the time."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chaos.proxy import FAULTS
from chaos.victims import DECODER, command_of, kill_one, named
from chaos.world import Starter, Violation, World, wait_until_gone

from cnn_ray.errors import CnnRayError

MOST_ATTEMPTS = 12
CALM_FROM = 7
"""From this attempt on nothing is injected: a round must end, and a run in peace must succeed."""
ALLOWED = {0, 75, -signal.SIGKILL, 130}
KINDS = ("get", "read", "put", "list", "head", "other")
LATER_KILLS = ((0.4, 0.4, 0.15, 0.05), (0.7, 0.25, 0.05, 0))
"""Later attempts are left in peace more often, so that rounds end."""
RATES = (0.0, 0.02, 0.05, 0.1, 0.2)
PEEK_S = 0.25


class Ground(Protocol):
    """Where the runs happen: the local runner, or a Ray cluster."""

    name: str
    limit_s: float
    kill_weights: dict[str, float]
    first_kills: tuple[float, ...]
    """Weights of 0, 1, 2, 3 kills in the first attempt."""

    def kill(self, victim: str, driver: int, rng: random.Random) -> bool:
        """Whether there was such a victim to kill."""
        ...

    def mend(self) -> None:
        """Whatever a kill took away is there again."""
        ...

    def close(self) -> None:
        """Whatever was started is gone."""
        ...


class LocalGround:
    """The local runner: the driver and its decoders."""

    name = "local"
    limit_s = 60.0
    kill_weights = {"driver": 0.55, "decoder": 0.35, "sigterm": 0.1}  # noqa: RUF012
    first_kills = (0.1, 0.5, 0.25, 0.15)

    def kill(self, victim: str, driver: int, rng: random.Random) -> bool:
        """See `Ground.kill`."""
        if victim == "decoder":
            return kill_one(named([driver], DECODER), signal.SIGKILL, rng)
        return kill_one([driver], signal.SIGTERM if victim == "sigterm" else signal.SIGKILL, rng)

    def mend(self) -> None:
        """Nothing to mend."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Attempt:
    """What is done to one attempt. `kills` are (seconds after the start, victim); in the times of `expired_s` nothing
    is allowed, in those of `input_away` no image can be fetched (the fault is the third), while all else works."""

    kills: list[tuple[float, str]] = field(default_factory=list)
    trip: dict[str, Any] | None = None
    outage_after: int | None = None
    outage_ends_s: float | None = None
    expired_s: tuple[float, float] | None = None
    input_away: tuple[float, float, str] | None = None


@dataclass
class Round:
    """A round as drawn from its seed, and what happened."""

    seed: int
    faults: dict[str, float]
    attempts: list[Attempt]
    codes: list[int] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    violation: str = ""

    def record(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        attempts = [vars(attempt) for attempt in self.attempts[: len(self.codes)]]
        return {**vars(self), "attempts": attempts, "kills": dict(self.kills), "injected": dict(self.injected)}

    def line(self) -> str:
        """One line for the log."""
        rate = f"{sum(self.faults.values()):.0%} {'+'.join(sorted(self.faults))}" if self.faults else "none"
        kills = ", ".join(f"{n} {victim}" for victim, n in sorted(self.kills.items())) or "none"
        said = self.violation or "ok"
        return (
            f"seed {self.seed}: faults {rate} ({sum(self.injected.values())} injected); kills {kills}; "
            f"exits {','.join(map(str, self.codes))}; {self.seconds:.1f} s; {said}"
        )


def draw(seed: int, ground: Ground, usual_s: float, usual_requests: dict[str, int]) -> Round:
    """The round of a seed. `usual_*` are those of an undisturbed run: the moments lie within it."""
    rng = random.Random(f"round {ground.name} {seed}")
    rate = rng.choice(RATES)
    chosen = rng.sample(FAULTS, rng.randint(1, len(FAULTS))) if rate else []
    weights = [rng.random() + 0.1 for _ in chosen]
    faults = {name: round(rate * weight / sum(weights), 4) for name, weight in zip(chosen, weights, strict=True)}
    attempts = []
    for number in range(CALM_FROM - 1):
        attempt = Attempt()
        for _ in range(rng.choices((0, 1, 2, 3), (ground.first_kills, *LATER_KILLS)[min(number, len(LATER_KILLS))])[0]):
            victim = rng.choices(list(ground.kill_weights), list(ground.kill_weights.values()))[0]
            if victim == "driver" and attempt.trip is None and rng.random() < 0.6:
                attempt.trip = _trip(rng, usual_requests)
            else:
                attempt.kills.append((rng.uniform(0, usual_s), victim))
        _episode(attempt, rng, usual_s, sum(usual_requests.values()))
        attempts.append(attempt)
    return Round(seed, faults, attempts)


def _trip(rng: random.Random, usual_requests: dict[str, int]) -> dict[str, Any]:
    kind = rng.choice([name for name, count in usual_requests.items() if count])
    nth = rng.randint(1, usual_requests[kind])
    return {"kind": kind, "nth": nth, "when": rng.choice(["before", "after"]), "signal": int(signal.SIGKILL)}


def _episode(attempt: Attempt, rng: random.Random, usual_s: float, requests: int) -> None:
    chance = rng.random()
    if chance < 0.08:
        attempt.outage_after = rng.randint(1, requests)
    elif chance < 0.14:
        attempt.outage_after = rng.randint(1, requests)
        attempt.outage_ends_s = rng.uniform(0, usual_s)
    elif chance < 0.22:
        start = rng.uniform(0, usual_s)
        attempt.expired_s = (start, start + rng.choice([0.1, 0.3, 1e9]))
    elif chance < 0.32:
        start = rng.uniform(0, usual_s)
        fault = rng.choice([name for name in FAULTS if name != "stall"])
        attempt.input_away = (start, start + rng.choice([0.3, 1.5]), fault)


def play(one: Round, world: World, starter: Starter, ground: Ground, folder: Path) -> Round:
    """The round, played to its end; a broken promise is in `violation`, the evidence in `folder`."""
    output = f"s3://chaos/{ground.name}-{one.seed}"
    partition = f"{output}/model=small/version=1"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        for number in range(MOST_ATTEMPTS):
            attempt = one.attempts[number] if number < len(one.attempts) else Attempt()
            faults = one.faults if number < len(one.attempts) else {}
            _attempt(one, attempt, faults, (world, starter, ground), (output, partition, folder))
            ground.mend()
            if one.codes[-1] == 0:
                world.check_finished(partition)
                break
            if one.codes[-1] not in ALLOWED:
                raise Violation(f"exit code {one.codes[-1]}: {_last_words(folder)}")
            world.check_readers(partition)
        else:
            raise Violation(f"not finished after {MOST_ATTEMPTS} attempts: {_last_words(folder)}")
    except (Violation, CnnRayError) as broken:  # the second kind is what a reader met
        one.violation = f"VIOLATION {broken}"
        world.keep_evidence(partition, folder)
    one.seconds = time.monotonic() - start
    return one


def _attempt(
    one: Round,
    attempt: Attempt,
    faults: dict[str, float],
    actors: tuple[World, Starter, Ground],
    places: tuple[str, str, Path],
) -> None:
    world, starter, ground = actors
    output, partition, folder = places
    rng = random.Random(f"attempt {one.seed} {len(one.codes)}")
    proxy = world.proxy
    proxy.calm()
    proxy.reset_counters()
    proxy.set(seed=one.seed * 100 + len(one.codes), faults={"all": faults}, outage_after=attempt.outage_after)
    driver = starter.start(world.arguments(output, ground.name), folder / "run.log")
    if attempt.trip is not None:
        proxy.set(trip={**attempt.trip, "pid": driver})
    try:
        decoders = _watch(one, attempt, faults, driver, rng, (world, ground, partition))
    except (Violation, CnnRayError):
        os.kill(driver, signal.SIGKILL)
        raise
    finally:
        counted = proxy.counters()
        proxy.calm()
        one.codes.append(starter.code())
    if counted.get("tripped"):
        one.kills["driver"] += 1
    for name in FAULTS:
        one.injected[name] += sum(counted.get(f"{kind}.{name}", 0) for kind in KINDS)
    left = wait_until_gone(decoders, 10, lambda pid: DECODER in command_of(pid))
    if left:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        raise Violation(f"{len(left)} decoders outlived their driver by 10 s")


def _watch(
    one: Round,
    attempt: Attempt,
    faults: dict[str, float],
    driver: int,
    rng: random.Random,
    stage: tuple[World, Ground, str],
) -> set[int]:
    """Kills and looks until the driver has ended; the decoders that it had."""
    world, ground, partition = stage
    start, peeked = time.monotonic(), 0.0
    decoders: set[int] = set()
    kills = sorted(attempt.kills)
    expired = away = False
    while not _ended(driver):
        now = time.monotonic() - start
        decoders.update(named([driver], DECODER))
        # A kill whose victim is not there yet waits for it.
        if kills and now >= kills[0][0] and ground.kill(kills[0][1], driver, rng):
            one.kills[kills.pop(0)[1]] += 1
        if attempt.expired_s is not None:
            wanted = attempt.expired_s[0] <= now < attempt.expired_s[1]
            if wanted != expired:
                world.proxy.set(expired=wanted)
                expired = wanted
        if attempt.input_away is not None:
            wanted = attempt.input_away[0] <= now < attempt.input_away[1]
            if wanted != away:
                world.proxy.set(faults={"all": faults, **({"get": {attempt.input_away[2]: 1.0}} if wanted else {})})
                away = wanted
        if attempt.outage_ends_s is not None and now >= attempt.outage_ends_s and attempt.outage_after is not None:
            world.proxy.set(outage=False, outage_after=None)
            attempt.outage_after = None
        if now - peeked >= PEEK_S:
            peeked = now
            if world.has_manifest(partition):
                world.check_readers(partition)
        if now > ground.limit_s:
            raise Violation(f"the run did not end in {ground.limit_s:.0f} s")
        time.sleep(0.01)
    return decoders


def _ended(pid: int) -> bool:
    """Whether the process is gone or waits to be asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _last_words(folder: Path) -> str:
    lines = (
        (folder / "run.log").read_text(errors="replace").strip().splitlines() if (folder / "run.log").exists() else []
    )
    return " | ".join(lines[-3:])
