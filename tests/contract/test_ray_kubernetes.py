"""The RayJob and the RayService are what KubeRay takes (fields of its API, version ray.io/v1) and what we would run."""

from pathlib import Path

import pytest
import yaml

from cnn_ray.cli import commands
from cnn_ray.config import ScoreConfig, build_config
from cnn_ray.doctor_machine import PINS
from cnn_ray.doctor_serve_yaml import serve_yaml_findings

JOBS = Path(__file__).parents[2] / "jobs"
JOB_KEYS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "entrypoint",
    "entrypointNumCpus",
    "rayClusterSpec",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "ttlSecondsAfterFinished",
}
CLUSTER_KEYS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
WORKER_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
POD_KEYS = {
    "automountServiceAccountToken",
    "containers",
    "securityContext",
    "terminationGracePeriodSeconds",
    "volumes",
}


def documents(name):
    return list(yaml.safe_load_all((JOBS / name).read_text(encoding="utf-8")))


def cluster_of(name):
    document = documents(name)[-1]
    return document["spec"]["rayClusterSpec" if document["kind"] == "RayJob" else "rayClusterConfig"]


def test_the_job_has_known_fields_and_a_configuration_of_ours():
    settings, job = documents("kubernetes_rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= JOB_KEYS
    config = build_config(ScoreConfig, yaml.safe_load(settings["data"]["score.yaml"]))
    assert config.runner == "ray"
    assert config.date is not None
    assert job["metadata"]["name"].endswith(config.date.isoformat())
    program, verb, *flags = job["spec"]["entrypoint"].split()
    assert (program, verb in commands.commands) == ("cnn-ray", True)
    known = {flag for parameter in commands.commands[verb].params for flag in parameter.opts}
    assert {flag for flag in flags if flag.startswith("--")} <= known
    mounts = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert f"{mounts[0]['mountPath']}/score.yaml" in flags


def test_the_service_has_a_serve_configuration_that_the_doctor_finds_well():
    (service,) = documents("kubernetes_rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert [finding.level for finding in serve_yaml_findings(document)] == ["ok"]
    assert document["applications"][0]["args"]["api_keys_uri"]
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    replica_cpus = document["applications"][0]["args"]["num_cpus"]
    assert int(worker["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]) >= replica_cpus


@pytest.mark.parametrize("name", ["kubernetes_rayjob.yaml", "kubernetes_rayservice.yaml"])
def test_the_cluster_is_bounded_and_closed(name):
    cluster = cluster_of(name)
    assert set(cluster) <= CLUSTER_KEYS
    assert cluster["rayVersion"] in PINS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert set(pod) <= POD_KEYS
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert not [e for e in container["env"] if "KEY" in e["name"] or "SECRET" in e["name"]]
