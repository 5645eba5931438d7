"""What `ray up` would only say on AWS, or never: Ray's own checks, EC2's keys, bounds, open ports, versions."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cnn_ray.doctor_finding import Finding, error, ok, warning
from cnn_ray.doctor_machine import JOB_START_VARIABLE, PINS

CHECK = "cluster yaml"
_KINDS = {"integer": int, "boolean": bool, "string": str}


def cluster_yaml_findings(document: Mapping[str, Any]) -> list[Finding]:
    """Everything in the document that keeps a cluster from coming up safe and as it is written."""
    try:
        prepared = prepared_cluster(document)
    except ValueError as failure:
        return [error(CHECK, f"Ray refuses it: {failure}", "correct the file")]
    found = [*_node_type_findings(prepared), *_command_findings(prepared)]
    return found or [ok(CHECK, f"{len(prepared['available_node_types'])} node types, nothing open to the world")]


def prepared_cluster(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with Ray's defaults, after Ray's own validation.

    Raises:
        ValueError: Ray refuses it.
    """
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # it tells what it defaults
    try:
        prepared = prepare_config(copy.deepcopy(dict(document)))
        validate_config(prepared)
    except ValidationError as failure:
        raise ValueError(failure.message) from failure
    except (KeyError, TypeError, AttributeError) as failure:  # what Ray says to a file that is no cluster at all
        raise ValueError(f"{type(failure).__name__} {failure}") from failure
    return prepared


@functools.cache
def run_instances_shape() -> Any:
    """What EC2's RunInstances takes, as botocore knows it."""
    from botocore.session import get_session

    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def shape_problems(value: Any, shape: Any, where: str) -> Iterator[str]:
    """What EC2 would not take in a value of the given botocore shape."""
    if shape.type_name == "structure":
        if not isinstance(value, Mapping):
            yield f"{where} is {value!r}, no mapping"
            return
        for key, inner in value.items():
            if key in shape.members:
                yield from shape_problems(inner, shape.members[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is no key of EC2"
    elif shape.type_name == "list":
        if not isinstance(value, list):
            yield f"{where} is {value!r}, no list"
            return
        for inner in value:
            yield from shape_problems(inner, shape.member, where)
    elif type(value) is not _KINDS.get(shape.type_name, type(value)) or (
        getattr(shape, "enum", None) and value not in shape.enum
    ):
        yield f"{where} {value!r} is no {shape.type_name} that EC2 knows"


def _node_type_findings(prepared: Mapping[str, Any]) -> Iterator[Finding]:
    aws = prepared["provider"].get("type") == "aws"
    for name, node_type in prepared["available_node_types"].items():
        low, high = node_type.get("min_workers", 0), node_type.get("max_workers", 0)
        if low > high:
            yield error(CHECK, f"{name}: min_workers {low} > max_workers {high}", "correct one of them")
        if high > prepared["max_workers"]:
            said = f"{name}: max_workers {high} > {prepared['max_workers']} of the whole cluster"
            yield warning(CHECK, said, "raise max_workers at the top")
        if aws:
            for problem in shape_problems(node_type["node_config"], run_instances_shape(), f"{name}.node_config"):
                yield error(CHECK, problem, "see RunInstances in EC2's API reference")


def _command_findings(prepared: Mapping[str, Any]) -> Iterator[Finding]:
    head = "\n".join(prepared["head_start_ray_commands"])
    workers = "\n".join(prepared["worker_start_ray_commands"])
    host = re.search(r"--dashboard-host[= ](\S+)", head)
    if host is not None and host[1] not in ("127.0.0.1", "localhost", "::1"):
        said = f"the dashboard and the Jobs API listen on {host[1]}: whoever reaches them runs code"
        yield error(CHECK, said, "--dashboard-host=127.0.0.1, and `ray dashboard cluster.yaml`")
    for name, commands in (("head", head), ("workers", workers)):
        if "RAY_AUTH_MODE=token" not in commands:
            yield error(CHECK, f"{name}: Ray starts without token authentication", "RAY_AUTH_MODE=token ray start ...")
    if JOB_START_VARIABLE not in head:
        said = "a job whose entrypoint waits for a node is dropped after 900 s"
        yield warning(CHECK, said, f"export {JOB_START_VARIABLE}=86400 before `ray start --head`")
    yield from _version_findings(prepared)


def _version_findings(prepared: Mapping[str, Any]) -> Iterator[Finding]:
    texts = [*prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
    for node_type in prepared["available_node_types"].values():
        texts += node_type.get("worker_setup_commands", [])
    for text in texts:
        if re.search(r"ray\S*\.whl", text):
            yield error(CHECK, f"a nightly wheel is installed: {text[:80]}", 'pip install "ray==VERSION"')
        for version in re.findall(r"\bray(?:\[[^\]]*\])?==([\w.]+)", text):
            if version not in PINS["ray"]:
                said = f"ray {version} is installed on nodes, this is {PINS['ray'][0]}"
                yield error(CHECK, said, "the same version on all nodes and clients")
