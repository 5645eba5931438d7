"""cluster.yaml is what `ray up` accepts, checked without AWS: Ray's own validation plus the holes that it leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnn_ray.doctor_cluster_yaml import cluster_yaml_findings, prepared_cluster

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def load() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """The config with Ray's defaults, or an error with what the doctor finds wrong in it."""
    wrong = [finding.said for finding in cluster_yaml_findings(config) if finding.level != "ok"]
    if wrong:
        raise ValueError("; ".join(wrong))
    return prepared_cluster(config)


def test_ray_and_ec2_accept_it():
    prepared = validate(load())

    assert prepared["provider"]["type"] == "aws"
    assert prepared["cluster_name"] == "cnn-ray"


def _misspelt_ec2_key(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu_spot"]["node_config"]["InstanceTyp"] = "g6.xlarge"


def _wrong_instance_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu_spot"]["node_config"]["InstanceType"] = "g6.xlargo"


def _open_dashboard(config: dict[str, Any]) -> None:
    config["head_start_ray_commands"] = ["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]


def _no_token(config: dict[str, Any]) -> None:
    config["worker_start_ray_commands"] = ["ray start --address=$RAY_HEAD_IP:6379"]


def _nightly_wheel(config: dict[str, Any]) -> None:
    config["setup_commands"] = ["pip install https://s3/ray-3.0.0.dev0-cp311.whl"]


def _another_ray(config: dict[str, Any]) -> None:
    config["setup_commands"] = ['pip install "ray[train]==2.59.0"']


def _impatient_head(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"]
    config["head_start_ray_commands"] = [c.replace("RAY_JOB_START_TIMEOUT_SECONDS", "X") for c in commands]


def _a_disk_as_text(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["node_config"]["BlockDeviceMappings"] = "100 GB"


def _too_few_for_a_type(config: dict[str, Any]) -> None:
    config["max_workers"] = 2


def _min_above_max(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu_decode_spot"]["min_workers"] = 9


def _unknown_top_level_key(config: dict[str, Any]) -> None:
    config["idle_timeout"] = 5


def _no_such_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "heads"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_misspelt_ec2_key, "node_config.InstanceTyp is no key of EC2"),
        (_wrong_instance_type, "'g6.xlargo' is no string that EC2 knows"),
        (_a_disk_as_text, "BlockDeviceMappings is '100 GB', no list"),
        (_min_above_max, "min_workers 9 > max_workers 8"),
        (_too_few_for_a_type, "max_workers 8 > 2 of the whole cluster"),
        (_unknown_top_level_key, "idle_timeout"),
        (_no_such_head, "`head_node_type` must be one of"),
        (_open_dashboard, "listen on 0.0.0.0"),
        (_no_token, "workers: Ray starts without token authentication"),
        (_nightly_wheel, "a nightly wheel is installed"),
        (_another_ray, "ray 2.59.0 is installed on nodes"),
        (_impatient_head, "dropped after 900 s"),
    ],
)
def test_a_broken_copy_is_refused(damage, said):
    config = load()
    damage(config)

    with pytest.raises(ValueError, match=re.escape(said)):
        validate(config)


def test_what_is_no_cluster_at_all_is_refused_in_words():
    (finding,) = cluster_yaml_findings({"cluster_name": "x", "available_node_types": 3})
    assert finding.level == "error"


def test_nothing_but_loopback_serves_the_dashboard_and_tokens_are_on():
    prepared = validate(load())
    head, workers = prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]

    assert "--dashboard-host=127.0.0.1" in head[-1]
    assert all("RAY_AUTH_MODE=token" in commands[-1] for commands in (head, workers))
    assert "~/.ray/auth_token" in prepared["file_mounts"].values()


def test_every_node_installs_the_same_ray_and_python_and_no_nightly_wheel():
    prepared = validate(load())
    types = prepared["available_node_types"]
    gpu = types["gpu_spot"]["worker_setup_commands"]
    assert types["gpu_on_demand"]["worker_setup_commands"] == gpu

    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"], gpu):
        script = "\n".join(commands)
        assert '"ray[train,serve]==2.60.0"' in script
        assert "--python 3.11" in script
        assert ".whl" not in script
    assert "cnn_ray[gpu]" in "\n".join(gpu)


def test_workers_are_spot_and_start_from_none_and_the_head_takes_no_tasks():
    types = validate(load())["available_node_types"]

    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu_spot"]["resources"]["GPU"] == 1
    for name in ("gpu", "cpu_decode"):
        spot, on_demand = types[f"{name}_spot"], types[f"{name}_on_demand"]
        assert spot["min_workers"] == on_demand["min_workers"] == 0
        assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in on_demand["node_config"]
        assert spot["resources"] == on_demand["resources"]
    profiles = {str(node_type["node_config"]["IamInstanceProfile"]) for node_type in types.values()}
    assert len(profiles) == 1, "credentials come from one instance profile; no keys anywhere"


def launched(demand: dict[str, float], count: int, availability: dict[str, float]) -> dict[str, int]:
    """Node type -> nodes that Ray's own autoscaler (v2) would launch for `count` tasks of this demand, head running."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(configs=prepared_cluster(load()), skip_content_hash=True)
    types = {name: kind for name, kind in config.get_node_type_configs().items() if name != "head"}
    requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)] * count)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=requests,
        cloud_resource_availabilities=availability,
        recoverable_resource_availabilities=availability,
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_the_autoscaler_takes_spot_first_and_on_demand_where_spot_is_not_to_be_had():
    assert launched({"CPU": 1}, 0, {}) == {}
    assert launched({"CPU": 1}, 32, {}) == {"cpu_decode_spot": 4}
    assert launched({"GPU": 1}, 3, {}) == {"gpu_spot": 3}
    assert launched({"GPU": 1}, 2, {"gpu_spot": 0.0}) == {"gpu_on_demand": 2}
    assert launched({"CPU": 8}, 3, {"cpu_decode_spot": 0.0}) == {"cpu_decode_on_demand": 3}
    assert launched({"GPU": 1}, 100, {}) == {"gpu_spot": 4, "gpu_on_demand": 2}
