"""cluster.yaml is what `ray up` accepts, checked without AWS: Ray's own validation plus the holes that it leaves."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def load() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """The config with Ray's defaults, or an error: Ray's checks, EC2's keys, and the bounds of each node type."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    for name, node_type in prepared["available_node_types"].items():
        check_shape(node_type["node_config"], run_instances_shape(), f"{name}.node_config")
        if node_type["min_workers"] > node_type["max_workers"]:
            raise ValueError(f"{name}: min_workers {node_type['min_workers']} > max_workers {node_type['max_workers']}")
    return prepared


@functools.cache
def run_instances_shape() -> Any:
    from botocore.session import get_session

    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises ValueError at the first key or type that EC2's RunInstances does not know."""
    if shape.type_name == "structure":
        if not isinstance(value, dict) or set(value) - set(shape.members):
            raise ValueError(f"{where}: {value!r} has keys that EC2 does not know")
        for key, inner in value.items():
            check_shape(inner, shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        if not isinstance(value, list):
            raise ValueError(f"{where}: {value!r} is not a list")
        for inner in value:
            check_shape(inner, shape.member, where)
    else:
        expected = {"integer": int, "boolean": bool, "string": str}[shape.type_name]
        if type(value) is not expected or (getattr(shape, "enum", None) and value not in shape.enum):
            raise ValueError(f"{where}: {value!r} is not a {shape.type_name} of EC2")


def test_ray_and_ec2_accept_it():
    prepared = validate(load())

    assert prepared["provider"]["type"] == "aws"
    assert prepared["cluster_name"] == "cnn-ray"


def _misspelt_ec2_key(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["node_config"]["InstanceTyp"] = "g6.xlarge"


def _wrong_instance_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["node_config"]["InstanceType"] = "g6.xlargo"


def _min_above_max(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu_decode"]["min_workers"] = 9


def _unknown_top_level_key(config: dict[str, Any]) -> None:
    config["idle_timeout"] = 5


def _no_such_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "heads"


@pytest.mark.parametrize(
    "damage", [_misspelt_ec2_key, _wrong_instance_type, _min_above_max, _unknown_top_level_key, _no_such_head]
)
def test_a_broken_copy_is_refused(damage):
    from jsonschema import ValidationError

    config = load()
    damage(config)

    with pytest.raises((ValueError, ValidationError)):
        validate(config)


def test_nothing_but_loopback_serves_the_dashboard_and_tokens_are_on():
    prepared = validate(load())
    head, workers = prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]

    assert "--dashboard-host=127.0.0.1" in head[-1]
    assert all("RAY_AUTH_MODE=token" in commands[-1] for commands in (head, workers))
    assert "~/.ray/auth_token" in prepared["file_mounts"].values()


def test_every_node_installs_the_same_ray_and_python_and_no_nightly_wheel():
    prepared = validate(load())
    gpu = prepared["available_node_types"]["gpu"]["worker_setup_commands"]

    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"], gpu):
        script = "\n".join(commands)
        assert '"ray[train,serve]==2.60.0"' in script
        assert "--python 3.11" in script
        assert ".whl" not in script
    assert "cnn_ray[gpu]" in "\n".join(gpu)


def test_gpus_are_spot_and_start_from_none_and_the_head_takes_no_tasks():
    types = validate(load())["available_node_types"]

    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    for name in ("gpu", "cpu_decode"):
        assert types[name]["min_workers"] == 0
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    profiles = {str(node_type["node_config"]["IamInstanceProfile"]) for node_type in types.values()}
    assert len(profiles) == 1, "credentials come from one instance profile; no keys anywhere"
