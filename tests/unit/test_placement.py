"""What a machine or a cluster has room for, and what is said when it has not."""

from __future__ import annotations

import logging
import sys
import time
import types

import pytest

from cnn_ray import placement
from cnn_ray.errors import ConfigError
from cnn_ray.placement import Share, require_resources, watched_placement

SMALL, GPU = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("share", "nodes", "fitting"),
    [
        (Share(1, 0, 2), [SMALL], 2),
        (Share(1, 0, 3), [SMALL], 2),
        (Share(3, 0, 1), [SMALL, SMALL], 0),
        (Share(1, 1, 1), [SMALL], 0),
        (Share(1, 1, 5), [SMALL, GPU], 2),
        (Share(0.5, 0.5, 9), [GPU], 4),
        (Share(0.1, 0.1, 20), [{"CPU": 4, "GPU": 1}], 10),
        (Share(0, 0, 3), [SMALL], 3),
        (Share(1, 0, 1), [], 0),
    ],
)
def test_each_actor_fits_on_one_node(share, nodes, fitting):
    assert share.fitting(nodes) == fitting


def fake_ray(monkeypatch, *nodes: dict[str, float]) -> None:
    ray = types.ModuleType("ray")
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    ray.cluster_resources = lambda: total  # pyright: ignore[reportAttributeAccessIssue]
    ray.nodes = lambda: [{"Alive": True, "Resources": node} for node in nodes]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "ray", ray)


@pytest.mark.parametrize("share", [Share(64, 0, 1), Share(1, 1, 1), Share(1, 0, 5), Share(0.5, 0.25, 1)])
def test_a_machine_without_the_resources_is_an_error_that_names_both(monkeypatch, share):
    fake_ray(monkeypatch, SMALL)

    with pytest.raises(ConfigError) as caught:
        require_resources(share, "replica")

    assert str(caught.value).startswith("Expected what this machine has: 2 CPUs and 0 GPUs. Received: ")
    assert f"num_cpus {share.num_cpus:g} and num_gpus {share.num_gpus:g}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_machine_with_the_resources_is_enough(monkeypatch):
    fake_ray(monkeypatch, GPU)
    require_resources(Share(4, 1, 2), "replica")


def test_a_cluster_that_lacks_them_is_said_and_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(placement, "SAY_AFTER_S", 0.05)
    fake_ray(monkeypatch, SMALL, SMALL)
    with caplog.at_level(logging.WARNING), watched_placement(Share(1, 1, 2), "replica"):
        deadline = time.monotonic() + 10
        while not caplog.messages:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "a cluster of 2 nodes with 4 CPUs and 0 GPUs, which has room for 0" in caplog.messages[0]
    assert "autoscaler" in caplog.messages[0]


def test_a_cluster_that_has_them_is_not_talked_about(monkeypatch, caplog):
    monkeypatch.setattr(placement, "SAY_AFTER_S", 0.02)
    fake_ray(monkeypatch, GPU)
    with caplog.at_level(logging.WARNING), watched_placement(Share(1, 1, 2), "replica"):
        time.sleep(0.2)
    assert caplog.messages == []
