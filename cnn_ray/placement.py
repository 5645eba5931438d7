"""CPUs and GPUs that a job asks of Ray and that are not there: Ray itself would wait for them for ever, in silence.

On this machine nothing can be added, so that is an error at once. A cluster may have an autoscaler, so there it is said
and waited for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cnn_ray.errors import ConfigError

logger = logging.getLogger(__name__)

SAY_AFTER_S = 15.0
SAY_AGAIN_S = 300.0
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Share:
    """What `count` equal actors ask for, each on one node."""

    num_cpus: float
    num_gpus: float
    count: int

    def fitting(self, nodes: list[Mapping[str, float]]) -> int:
        """Return how many of the actors fit on the nodes, of which each has some CPU and GPU."""
        found = 0
        for node in nodes:
            room = [
                (node.get(name, 0.0) + _ROUNDING) / asked
                for name, asked in (("CPU", self.num_cpus), ("GPU", self.num_gpus))
                if asked > 0
            ]
            found += int(min(room, default=self.count))
        return min(found, self.count)

    def describe(self, what: str) -> str:
        """Return the actors in words; one of them is a `what`."""
        actors = f"{self.count} {what}s, each" if self.count > 1 else f"1 {what}"
        return f"{actors} with num_cpus {self.num_cpus:g} and num_gpus {self.num_gpus:g}"


def require_resources(share: Share, what: str) -> None:
    """Return if the connected local Ray has room for the actors, which messages call `what`.

    Raises:
        ConfigError: it does not, and never will.
    """
    import ray

    total = ray.cluster_resources()
    if share.fitting([total]) < share.count:
        raise ConfigError(
            f"Expected what this machine has: {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs. "
            f"Received: {share.describe(what)}. "
            "Next: ask for less, or set RAY_ADDRESS to a cluster that has it."
        )


@contextmanager
def watched_placement(share: Share, what: str) -> Iterator[threading.Event]:
    """Inside, it is logged when the connected cluster has no room for the actors; the event ends the watch early."""
    done = threading.Event()

    def watch() -> None:
        pause_s = SAY_AFTER_S
        while not done.wait(pause_s):
            sentence = _missing(share, what)
            if sentence is not None and not done.is_set():
                logger.warning(sentence)
                pause_s = SAY_AGAIN_S

    threading.Thread(target=watch, name="placement", daemon=True).start()
    try:
        yield done
    finally:
        done.set()


def _missing(share: Share, what: str) -> str | None:
    """Return what the cluster lacks, None if it has room."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = share.fitting(nodes)
    if fitting == share.count:
        return None
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    return (
        f"Expected room for {share.describe(what)}. Received: a cluster of "
        f"{len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs, which has room for {fitting}. "
        "Next: wait, if its autoscaler adds nodes; else end this with Ctrl-C and ask for less."
    )
