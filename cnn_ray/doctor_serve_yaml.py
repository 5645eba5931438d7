"""What Ray Serve accepts in silence in its YAML: misspelt keys, bounds that contradict each other, wrong `args`."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from cnn_ray.config import ServeConfig, build_config
from cnn_ray.doctor_finding import Finding, error, ok, warning
from cnn_ray.errors import ConfigError

CHECK = "serve yaml"
OWN_IMPORT_PATH = "jobs.serve:build_app"
_OPEN_MAPPINGS = ("runtime_env", "args", "user_config", "ray_actor_options.resources")


def serve_yaml_findings(document: Mapping[str, Any]) -> list[Finding]:
    """Everything in the document that Ray would take and not do."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    found = list(_unknown_keys(document, ServeDeploySchema, ""))
    try:
        ServeDeploySchema.model_validate(document)
    except (ValidationError, ValueError) as failure:
        first = " ".join(str(failure).split())[:300]
        found.append(error(CHECK, f"Ray refuses it: {first}", "correct the file"))
    for number, application in enumerate(_mappings(document.get("applications"))):
        where = f"applications.{number}"
        found += _argument_findings(application, document, where)
        for place, deployment in enumerate(_mappings(application.get("deployments"))):
            found += _replica_findings(deployment, f"{where}.deployments.{place}")
    return found or [ok(CHECK, "every key is known, and the bounds agree")]


def _argument_findings(application: Mapping[str, Any], document: Mapping[str, Any], where: str) -> Iterator[Finding]:
    if application.get("import_path") != OWN_IMPORT_PATH:
        return
    arguments = application.get("args") or {}
    try:
        config = build_config(ServeConfig, arguments, source=f"{where}.args")
    except ConfigError as failure:
        for line in str(failure).splitlines():
            said, _, mend = line.partition(" Next: ")
            yield error(CHECK, said, mend)
        return
    options = document.get("http_options") or {}
    for name in ("host", "port"):
        if name in arguments and arguments[name] != options.get(name, arguments[name]):
            yield error(
                CHECK,
                f"{where}.args.{name} {arguments[name]!r}, http_options.{name} {options[name]!r}",
                "keep one of them",
            )
    host = str(options.get("host", "0.0.0.0"))  # noqa: S104 - Ray's own default in this file
    if host not in ("127.0.0.1", "::1", "localhost") and config.api_keys_uri is None and not config.allow_anonymous:
        yield error(
            CHECK, f"http_options.host is {host}, and there is no api_keys_uri", "cnn-ray keys add NAME --keys FILE"
        )


def _replica_findings(deployment: Mapping[str, Any], where: str) -> Iterator[Finding]:
    scaling = deployment.get("autoscaling_config")
    replicas = deployment.get("num_replicas")
    if isinstance(scaling, Mapping):
        low, first, high = (scaling.get(f"{name}_replicas") for name in ("min", "initial", "max"))
        low = 1 if low is None else low
        if isinstance(low, int) and isinstance(high, int) and low > high:
            yield error(CHECK, f"{where}: min_replicas {low} > max_replicas {high}", "correct one of them")
        if isinstance(first, int) and isinstance(high, int) and not low <= first <= high:
            yield error(CHECK, f"{where}: initial_replicas {first} is not within {low}-{high}", "correct it")
        if isinstance(replicas, int):
            yield error(CHECK, f"{where}: num_replicas {replicas} beside autoscaling_config", "take one of them")
    if deployment.get("max_queued_requests") == 0:
        yield warning(CHECK, f"{where}: max_queued_requests 0 refuses every request that waits", "-1, or more than 0")


def _unknown_keys(value: Any, kind: Any, where: str) -> Iterator[Finding]:
    """A finding for each key that the schema does not have, at any depth that has a schema."""
    from pydantic import BaseModel

    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unknown_keys(item, kind, f"{where}.{number}")
        return
    if not isinstance(value, Mapping) or not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return
    fields = kind.model_fields
    for key, inner in value.items():
        path = f"{where}.{key}".strip(".")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            mend = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(fields)}"
            yield error(CHECK, f"{path} is no key of Serve, which ignores it", mend)
        elif key not in _OPEN_MAPPINGS:
            for model in _models_in(fields[key].annotation):
                yield from _unknown_keys(inner, model, path)


def _models_in(annotation: Any) -> list[type]:
    """The schema classes that a field may hold."""
    from pydantic import BaseModel

    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return found + [model for inner in typing.get_args(annotation) for model in _models_in(inner)]


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
