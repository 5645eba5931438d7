"""One line of JSON per request: who asked what and how long it took, and nothing that a request carried in confidence.

Bodies, headers and query strings have no field here, so they cannot get into the log. What a client chooses (path,
method, request id) is bounded, and JSON escapes its control characters: one request is one line.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, TextIO

from cnn_ray.auth import KEY_PREFIX
from cnn_ray.log_stream import SocketHandler, log_handler

logger = logging.getLogger("cnn_ray.access")

MAX_PATH_CHARS = 200
MAX_NAME_CHARS = 64
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY_IN_TEXT = re.compile(re.escape(KEY_PREFIX) + r"\w+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AccessEntry:
    """What is said of one request."""

    request_id: str
    method: str
    path: str
    """As the client sent it or decoded; the query is cut off here."""
    status: int
    action: str = ""
    model: str = ""
    version: int | None = None
    key: str | None = None
    """Name of the API key, never the key."""
    client: str | None = None
    """Address of the peer: of a proxy, where one stands before the endpoint."""
    body_bytes: int = 0
    """Bytes of the body that were read."""
    instances: int = 0
    total_ms: float = 0.0
    decode_ms: float = 0.0
    """Sum over the images of the request."""
    predict_ms: float = 0.0
    """From the queue to the scores: waiting for the model included."""


_FIELDS = tuple(field.name for field in fields(AccessEntry))


def request_id(header: str | None) -> str:
    """The client's request id if it is 1 to 128 of the characters A-Z a-z 0-9 . _ : -, else a new one.

    So it is safe in a header and in a line of a log. An API key in the wrong header is not repeated.
    """
    if header is not None and _REQUEST_ID.fullmatch(header) and not _KEY_IN_TEXT.search(header):
        return header
    return uuid.uuid4().hex


def access_line(entry: AccessEntry, at: datetime) -> str:
    """The entry as one line of ASCII JSON; milliseconds have two decimals."""
    said: dict[str, Any] = {name: getattr(entry, name) for name in _FIELDS}
    path = _KEY_IN_TEXT.sub(KEY_PREFIX + "***", entry.path.partition("?")[0])
    said["path"] = path if len(path) <= MAX_PATH_CHARS else path[:MAX_PATH_CHARS] + "..."
    for name in ("method", "action", "model", "client", "request_id"):
        if isinstance(said[name], str):
            said[name] = said[name][: 2 * MAX_NAME_CHARS]
    for name in ("total_ms", "decode_ms", "predict_ms"):
        said[name] = round(said[name], 2)
    return json.dumps({"time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), **said})


def log_access(entry: AccessEntry) -> None:
    """The entry is in the log `cnn_ray.access`, at level INFO, with the time of now."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", access_line(entry, datetime.now(UTC)))


def open_access_log(stream: TextIO | None = None) -> None:
    """Send the lines of `log_access` to `stream`, by default to this process's log, as bare JSON and nowhere else."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if stream is None and any(isinstance(handler, SocketHandler) for handler in logger.handlers):
        return
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = log_handler() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
