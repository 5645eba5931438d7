# pyright: strict
"""What the endpoint counted of each model version, read back from its metrics, which add all replicas up."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cnn_ray.triton_extensions import VersionCounts

_FIELDS = {
    ("cnn_ray_model_request_seconds_count", "success"): "successes",
    ("cnn_ray_model_request_seconds_sum", "success"): "success_s",
    ("cnn_ray_model_request_seconds_count", "fail"): "failures",
    ("cnn_ray_model_request_seconds_sum", "fail"): "failure_s",
    ("cnn_ray_model_images_total", ""): "images",
    ("cnn_ray_model_call_seconds_count", ""): "calls",
    ("cnn_ray_model_call_seconds_sum", ""): "call_s",
}
_SECONDS = ("success_s", "failure_s", "call_s")


def read_counts(metrics_text: bytes) -> dict[tuple[str, int], VersionCounts]:
    """Return the counts by (model, version), from metrics in Prometheus' text format."""
    found: dict[tuple[str, int], VersionCounts] = {}
    lines = [line for line in metrics_text.decode().splitlines() if line.startswith("cnn_ray_model_")]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            field = _FIELDS.get((sample.name, sample.labels.get("outcome", "")))
            version = sample.labels.get("version", "")
            if field is None or not version.isdigit():
                continue
            counts = found.setdefault((sample.labels["model"], int(version)), VersionCounts())
            setattr(counts, field, sample.value if field in _SECONDS else int(sample.value))
    return found
