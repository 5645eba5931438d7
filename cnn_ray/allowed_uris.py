# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""What a manifest may name: an entry -> an absolute location, or nothing where it is not allowed.

`resolve_uri` and `is_allowed` are the rules, for one entry. `allowed_locations` gives a million entries the same
answers: Arrow decides about those of a plain form, and every other entry goes through the rules themselves.
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.errors import ConfigError
from cnn_ray.storage import open_store

_S3 = re.compile(r"s3[an]?://", re.IGNORECASE)
_FILE = re.compile(r"file:(?://(?:localhost)?)?(?=/(?!/))", re.IGNORECASE)

_BUCKET_AND_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}/[^\0]+")

_PLAIN_S3 = r"^s3://[A-Za-z0-9][A-Za-z0-9._-]{1,254}/[^\x00]+$"
_PLAIN_PATH = r"^(?:/[^/.\x00][^/\x00]*)+$"
_PLAIN_NAME = r"^[^/.:\x00][^/:\x00]*(?:/[^/.\x00][^/\x00]*)*$"
"""Without "." at the beginning of a segment these are normal already; a name with ":" might be a scheme."""


def resolve_uri(base: str, uri: str) -> str | None:
    """The absolute location of a manifest entry, None where it is not allowed.

    A manifest may be written by somebody else: a relative entry must stay below the manifest's folder, only s3:// (also
    written s3a:// or s3n://, as Hadoop does) and file:// are schemes, and a local path is taken only from a local
    manifest.
    """
    scheme = _S3.match(uri)
    if scheme is not None:
        rest = uri[scheme.end() :]
        return f"s3://{rest}" if _BUCKET_AND_KEY.fullmatch(rest) and ".." not in rest.split("/") else None
    scheme = _FILE.match(uri)
    if scheme is not None:
        uri = unquote(uri[scheme.end() :], errors="surrogateescape")
    if "://" in uri or "\0" in uri or not uri or not _is_utf8(uri):
        return None
    if uri.startswith("/"):
        path = posixpath.normpath(uri)
        return None if base.startswith("s3://") or ".." in uri.split("/") or not path.strip("/") else _one_slash(path)
    relative = posixpath.normpath(uri)
    return None if relative.startswith("..") or relative == "." else f"{base.rstrip('/')}/{relative}"


def _one_slash(path: str) -> str:
    return "/" + path.lstrip("/")  # normpath keeps two


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
        return not base.startswith("s3://") or _is_below(location, _bucket_of(base))
    if location.startswith("s3://"):
        return any(_is_below(location, root) for root in allow_uris)
    real = os.path.realpath(location)
    return any(_is_below(real, os.path.realpath(root)) for root in allow_uris if "://" not in root)


def allowed_locations(names: pa.Array, base: str, allow_uris: tuple[str, ...]) -> pa.Array:
    """Return the absolute location of each entry, null where it is not allowed."""
    in_s3 = base.startswith("s3://")
    allow = tuple(_location(root) for root in allow_uris)
    s3 = pc.and_not(pc.match_substring_regex(names, _PLAIN_S3), pc.match_substring(names, ".."))
    s3_yes = pc.and_(s3, _below_any(names, _roots_of_s3(base, allow)))
    relative = pc.match_substring_regex(names, _PLAIN_NAME)
    path = pc.match_substring_regex(names, _PLAIN_PATH)
    if in_s3:
        path_yes, path_known = _none_of(names), path
    else:
        path_yes = pc.and_(path, _below_any(names, [base] if allow else ["/"]))
        path_known = path_yes  # with allow_uris, links must be followed
    joined = pc.binary_join_element_wise(pa.scalar(base.rstrip("/")), names, "/")
    kept = pc.if_else(pc.or_(s3_yes, path_yes), names, pa.scalar(None, pa.string()))
    plain = pc.if_else(relative, joined, kept)
    known = pc.or_(pc.or_(s3, relative), path_known)
    return _with_others(plain, names, known, base, allow)


def _with_others(plain: Any, names: Any, known: Any, base: str, allow: tuple[str, ...]) -> Any:
    """`plain`, and what the rules say about each entry that is not known."""
    others = pc.invert(known)
    if not pc.any(others).as_py():
        return plain
    answers: list[str | None] = []
    for name in names.filter(others).to_pylist():
        location = resolve_uri(base, name)
        answers.append(location if location is not None and is_allowed(location, base, allow) else None)
    return pc.replace_with_mask(plain, others, pa.array(answers, pa.string()))


def _location(root: str) -> str:
    """An allowed root as absolute locations begin: s3://..., or a path."""
    try:
        return open_store(root).uri
    except ConfigError:
        return root


def _roots_of_s3(base: str, allow: tuple[str, ...]) -> list[str]:
    if base.startswith("s3://"):
        return [base, *allow] if allow else [_bucket_of(base)]
    return list(allow) if allow else ["s3:/"]


def _bucket_of(base: str) -> str:
    return "/".join(base.split("/")[:3])


def _none_of(names: Any) -> Any:
    return pc.and_not(pc.is_valid(names), pc.is_valid(names))


def _below_any(names: Any, roots: list[str]) -> Any:
    found = _none_of(names)
    for root in roots:
        found = pc.or_(found, pc.starts_with(names, root.rstrip("/") + "/"))
    return found


def _is_below(location: str, root: str) -> bool:
    return location.startswith(root.rstrip("/") + "/")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
