"""The end of a run that could not read too many files: what to do about it, in words that work when followed."""

from __future__ import annotations

from collections import Counter
from posixpath import splitext

from cnn_ray.errors import CnnRayError, QuarantineLimitError
from cnn_ray.manifests import Manifest
from cnn_ray.outputs import Partition

PARTS_LOOKED_AT = 8
"""Spread over the run: reading all names of a million would take longer than the message is worth."""
MOST_SUFFIXES = 6


def refuse_over_limit(partition: Partition, manifest: Manifest) -> None:
    """Return where the manifest is within its quarantine limit.

    Raises:
        QuarantineLimitError: it is not.
    """
    if manifest.status != "quarantine_limit":
        return
    codes = ", ".join(f"{count} {code}" for code, count in manifest.codes.items())
    limit = manifest.config["max_quarantine_rate"]
    beyond = f" beyond the {manifest.accepted} accepted ones" if manifest.accepted else ""
    raise QuarantineLimitError(
        f"Expected at most {limit:.1%} unreadable images{beyond}. Received: {manifest.quarantined} of "
        f"{manifest.planned} ({codes}). Next: {_other_files(partition, manifest)}look at the quarantine files in "
        f"{partition.uri}, which readers refuse until then; correct the images and run again, add --retry-quarantined, "
        "or take them as they are with --accept."
    )


def _other_files(partition: Partition, manifest: Manifest) -> str:
    """The advice to name the images by patterns, where the unreadable files have other suffixes than the images.

    Patterns belong to the plan of a partition, so a run with other ones needs a place of its own.
    """
    try:
        scored, unreadable = _suffixes(partition, manifest)
    except CnnRayError:  # the message matters more than its advice
        return ""
    others = [suffix for suffix in unreadable if suffix not in scored]
    images = [suffix for suffix, _ in scored.most_common() if suffix]
    if not others or not images or "" in scored or len(images) > MOST_SUFFIXES:
        return ""
    shown = ", ".join(suffix or "names without a suffix" for suffix in others[:MOST_SUFFIXES])
    flags = " ".join(f"--include '*{suffix}'" for suffix in images)
    return (
        f"if {shown} are no images, delete {partition.uri} or choose another OUTPUT, and run with {flags}; otherwise "
    )


def _suffixes(partition: Partition, manifest: Manifest) -> tuple[Counter[str], Counter[str]]:
    """The suffixes of names that were scored and of those that were not, in some parts."""
    scored, unreadable = Counter[str](), Counter[str]()
    parts = manifest.parts
    for ref in parts[:: max(len(parts) // PARTS_LOOKED_AT, 1)]:
        for counts, table in zip((scored, unreadable), partition.read_part(ref.name), strict=True):
            counts.update(splitext(uri)[1] for uri in table["uri"].to_pylist())
    return scored, unreadable
