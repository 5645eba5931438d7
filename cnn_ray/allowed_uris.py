# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""What a manifest may name: an entry -> an absolute location, or the word that it is not allowed."""

from __future__ import annotations

import os
import posixpath


def resolve_uri(base: str, uri: str) -> str | None:
    """The absolute location of a manifest entry, None where it is not allowed.

    A manifest may be written by somebody else: a relative entry must stay below the manifest's folder, only s3:// is a
    scheme, and a local path is taken only from a local manifest.
    """
    if uri.startswith("s3://"):
        return uri if len(uri) > len("s3://") and ".." not in uri.split("/") else None
    if "://" in uri or "\0" in uri or not uri:
        return None
    if uri.startswith("/"):
        return None if base.startswith("s3://") or ".." in uri.split("/") else posixpath.normpath(uri)
    relative = posixpath.normpath(uri)
    return None if relative.startswith("..") or relative == "." else f"{base.rstrip('/')}/{relative}"


def is_allowed(location: str, base: str, allow_uris: tuple[str, ...]) -> bool:
    """Whether a manifest in the folder `base` may name this absolute location.

    What lies in the manifest's own folder always. Else `allow_uris` are the locations (s3://bucket, s3://bucket/prefix,
    /folder) that it may name; without any a manifest in S3 may name its own bucket, because who may write there need
    not be who may read all that this run can, and a local one, the operator's own, whatever the run can read.
    Links are followed before a folder is judged.
    """
    if _is_below(location, base):
        return True  # the store keeps links from leading out of it
    if not allow_uris:
        return not base.startswith("s3://") or _is_below(location, "/".join(base.split("/")[:3]))
    if location.startswith("s3://"):
        return any(_is_below(location, root) for root in allow_uris)
    real = os.path.realpath(location)
    return any(_is_below(real, os.path.realpath(root)) for root in allow_uris if "://" not in root)


def _is_below(location: str, root: str) -> bool:
    return location.startswith(root.rstrip("/") + "/")
