"""The Ray cluster of a chaos run: a head without CPUs of its own for the drivers, and worker nodes that are killed.

One cluster lives through all rounds; a node whose raylet was killed is replaced after the attempt, a little later than
in life, where the run goes on with the other node until then.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chaos.victims import DECODER, kill_one, named

WORKERS = 2
CPUS_OF_A_WORKER = 3
STORE_BYTES = 150 * 1024**2
USUAL_S = 12.0
"""Kills by the clock fall into this time after the start of a run."""
QUICK_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
"""A dead node is noticed in some three seconds, where Ray's own settings take fifteen."""


@contextmanager
def environment_of_children(environment: dict[str, str]) -> Iterator[None]:
    """Inside, processes start with this environment. This one keeps its own: it must not meet the faults.

    Ray's node puts a handler of SIGTERM in place that waits half a minute: the one from before comes back.
    """
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGTERM, handler)


class RayGround:
    """Drivers, tasks, actors and raylets of a cluster that this process owns."""

    name = "ray"
    limit_s = 180.0
    kill_weights = {"driver": 0.3, "fetch": 0.2, "actor": 0.2, "raylet": 0.25, "decoder": 0.05}  # noqa: RUF012
    first_kills = (0.05, 0.3, 0.35, 0.3)

    def __init__(self, environment: dict[str, str]) -> None:
        """Starts the cluster; its processes get the environment, which is that of the runs."""
        from ray.cluster_utils import Cluster

        self._environment = environment | QUICK_DEATH
        head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        with environment_of_children(self._environment):
            self._cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self._workers: list[Any] = []
        self._dead: list[Any] = []
        self.mend()
        self.address: str = self._cluster.address

    def _raylet(self, node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    def kill(self, victim: str, driver: int, rng: random.Random) -> bool:
        """See `rounds.Ground.kill`."""
        if victim == "driver":
            return kill_one([driver], signal.SIGKILL, rng)
        if victim == "raylet":
            return self._kill_raylet(rng)
        words = {"fetch": ("ray::Map(", "ray::map("), "actor": ("ray::MapWorker",), "decoder": (DECODER,)}[victim]
        raylets = [self._raylet(node) for node in self._workers]
        return kill_one(named(raylets, *words), signal.SIGKILL, rng)

    def _kill_raylet(self, rng: random.Random) -> bool:
        if len(self._workers) < WORKERS:
            return False  # one is left to go on with
        node = self._workers.pop(rng.randrange(len(self._workers)))
        self._dead.append(node)
        return kill_one([self._raylet(node)], signal.SIGKILL, rng)

    def mend(self) -> None:
        """See `rounds.Ground.mend`."""
        while self._dead:
            self._cluster.remove_node(self._dead.pop(), allow_graceful=False)
        while len(self._workers) < WORKERS:
            with environment_of_children(self._environment):
                node = self._cluster.add_node(num_cpus=CPUS_OF_A_WORKER, object_store_memory=STORE_BYTES)
            self._workers.append(node)

    def close(self) -> None:
        """The cluster is gone."""
        self._cluster.shutdown()
