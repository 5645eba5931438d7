"""Keys that Ray accepts in silence are found in Serve's YAML; see tests/contract/test_cluster_yaml.py for clusters."""

import copy
from pathlib import Path

import pytest
import yaml

from cnn_ray.doctor_serve_yaml import serve_yaml_findings

SERVE = yaml.safe_load((Path(__file__).parents[2] / "jobs" / "serve.yaml").read_text())


def found(**changes):
    """(level, what was seen) for jobs/serve.yaml with other values at dotted places."""
    document = copy.deepcopy(SERVE)
    for place, value in changes.items():
        level = document
        *outer, last = place.split("__")
        for step in outer:
            level = level[int(step)] if step.isdigit() else level.setdefault(step, {})
        level[last] = value
    return [(finding.level, f"{finding.said} | {finding.mend}") for finding in serve_yaml_findings(document)]


def test_the_example_is_well():
    assert [level for level, _ in found()] == ["ok"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"proxy_locatoin": "HeadOnly"}, "did you mean proxy_location?"),
        ({"http_options__prot": 8000}, "http_options.prot is no key of Serve, which ignores it | did you mean port?"),
        ({"applications__0__route_prefx": "/"}, "did you mean route_prefix?"),
        (
            {"applications__0__deployments": [{"name": "E", "max_ongoing_request": 5}]},
            "did you mean max_ongoing_requests?",
        ),
        (
            {"applications__0__deployments": [{"name": "E", "autoscaling_config": {"min_replica": 5}}]},
            "did you mean min_replicas?",
        ),
        (
            {
                "applications__0__deployments": [
                    {"name": "E", "autoscaling_config": {"min_replicas": 5, "max_replicas": 1}}
                ]
            },
            "min_replicas 5 > max_replicas 1",
        ),
        (
            {
                "applications__0__deployments": [
                    {"name": "E", "num_replicas": 2, "autoscaling_config": {"max_replicas": 4}}
                ]
            },
            "num_replicas 2 beside autoscaling_config",
        ),
        ({"applications__0__args__max_replica": 3}, "did you mean max_replicas?"),
        ({"applications__0__args__min_replicas": 9}, "min_replicas <= max_replicas"),
        ({"applications__0__args__port": 9000}, "http_options.port 8000"),
        ({"http_options__host": "0.0.0.0"}, "there is no api_keys_uri"),
        ({"applications__0__import_path": 3}, "Ray refuses it"),
    ],
)
def test_what_is_wrong_is_said(changes, said):
    findings = found(**changes)
    assert any(level == "error" and said in text for level, text in findings), findings


def test_arguments_of_other_applications_are_not_ours_to_judge():
    assert [level for level, _ in found(applications__0__import_path="other:app", applications__0__args={"x": 1})] == [
        "ok"
    ]
