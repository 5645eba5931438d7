"""Chaos: scores drawn screenshots from S3 again and again while it breaks storage and kills processes, and checks.

    python tests/chaos/run.py --runner local --rounds 200 --seed 1
    python tests/chaos/run.py --runner ray --rounds 20 --seed 1
    python tests/chaos/run.py --short            the form for CI: 10 local and 2 Ray rounds

Each round has its own seed (`--seed` and the following numbers), from which faults, kills and moments are drawn;
`--rounds 1 --seed N` repeats one. Exit code 1 and a kept folder of evidence if any promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the cnn_ray beside these tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos.proxy import FAULTS
from chaos.rounds import LocalGround, Round, draw, play
from chaos.world import Starter, World

PARTITION = "s3://chaos/reference/model=small/version=1"
KINDS = ("get", "read", "put", "list")


def main() -> int:
    """Plays the rounds that the command line asks for; 0 if every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rounds and the summary there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and cluster are ended in any case
    jobs = [("local", 10), ("ray", 2)] if options.short else [(options.runner, options.rounds)]
    folder = Path(tempfile.mkdtemp(prefix="cnn_ray-chaos-"))
    world = World(folder, options.images)
    try:
        usual_s, usual_requests = undisturbed(world)
        say(f"undisturbed: {usual_s:.1f} s, requests {usual_requests}, {world.input_bytes} bytes of input")
        played = {runner: play_all(runner, count, options.seed, world, usual_requests) for runner, count in jobs}
    finally:
        world.close()
    broken = [one for rounds in played.values() for one in rounds if one.violation]
    summaries = [summary(runner, rounds, world) for runner, rounds in played.items()]
    say("\n".join(summaries))
    if options.json:
        found = {runner: [one.record() for one in rounds] for runner, rounds in played.items()}
        options.json.write_text(json.dumps({"date": today(), "rounds": found, "table": summaries}, indent=1))
    if broken:
        say(f"{len(broken)} rounds broke a promise; evidence: {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def undisturbed(world: World) -> tuple[float, dict[str, int]]:
    """Seconds and requests of a run that nobody disturbs, which is kept as the reference."""
    starter = Starter(world, "local", world.environment())
    try:
        world.proxy.reset_counters()
        start = time.monotonic()
        starter.start(world.arguments("s3://chaos/reference", "local"), world.folder / "reference.log")
        code = starter.code()
    finally:
        starter.close()
    if code != 0:
        raise RuntimeError(f"The undisturbed run ended with {code}: {(world.folder / 'reference.log').read_text()}")
    seconds, counted = time.monotonic() - start, world.proxy.counters()
    world.keep_reference(PARTITION)
    return seconds, {kind: counted.get(f"{kind}.requests", 0) for kind in KINDS}


def play_all(runner: str, count: int, seed: int, world: World, usual_requests: dict[str, int]) -> list[Round]:
    """The rounds of one runner, one line each as they end."""
    environment, played = world.environment(), []
    if runner == "ray":
        from chaos.ray_cluster import USUAL_S, RayGround

        ground = RayGround(environment)
        environment |= {"RAY_ADDRESS": ground.address}
        usual_s = USUAL_S
    else:
        ground, usual_s = LocalGround(), LOCAL_S
    starter = Starter(world, runner, environment)
    try:
        for number in range(seed, seed + count):
            one = draw(number, ground, usual_s, usual_requests)
            played.append(play(one, world, starter, ground, world.folder / f"{runner}-{number}"))
            say(f"{runner} {one.line()}")
    finally:
        try:
            starter.close()
        finally:
            ground.close()
    return played


LOCAL_S = 3.0
"""Kills by the clock fall into this time after the start of a local run."""


def summary(runner: str, rounds: list[Round], world: World) -> str:
    """The table for README."""
    codes = Counter(code for one in rounds for code in one.codes)
    kills: Counter[str] = sum((one.kills for one in rounds), Counter())
    injected: Counter[str] = sum((one.injected for one in rounds), Counter())
    attempts = [len(one.codes) for one in rounds]
    rows = [
        ("date, seeds", f"{today()}, {rounds[0].seed}-{rounds[-1].seed}"),
        ("rounds, each of", f"{len(rounds)}, {world.listing.total()} files of which {len(world.hostile)} hostile"),
        ("rounds that broke a promise", str(sum(bool(one.violation) for one in rounds))),
        ("attempts", f"{sum(attempts)} (at most {max(attempts)} in a round)"),
        ("exit codes", ", ".join(f"{n} x {code}" for code, n in sorted(codes.items()))),
        ("kills", ", ".join(f"{n} {victim}" for victim, n in sorted(kills.items())) or "none"),
        ("faults injected", ", ".join(f"{injected[name]} {name}" for name in FAULTS)),
        ("time", f"{sum(one.seconds for one in rounds):.0f} s on {os.cpu_count()} cores"),
    ]
    return "\n".join([f"| {runner} runner | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
