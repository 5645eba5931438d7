"""Secrets taken out of what is shown or stored: configurations, manifests, reports, messages.

By form, because what leaks is never where it was expected: access keys, passwords and signatures in URLs, our own API
keys, bearer tokens. A value that only looks like a secret loses its text, never its meaning as a location.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_NAME = r"(?:secret|token|passwo?r?d|passwd|api_?keys?|access_?keys?|secret_?access_?key)"
_RULES = (
    # scheme://user:password@host, scheme://token@host
    (re.compile(r"(?<=://)[^/\s@?#'\"]+@"), f"{HIDDEN}@"),
    # https://host/path?query: a webhook's query is its password, and so is a signed URL's
    (re.compile(r"(\bhttps?://[^\s?#'\"<>]+)\?[^\s'\"<>]+", re.IGNORECASE), rf"\1?{HIDDEN}"),
    # the same parameters without their URL
    (re.compile(r"\b(X-Amz-(?:Signature|Credential|Security-Token))=[^&\s'\"]+", re.IGNORECASE), rf"\1={HIDDEN}"),
    # webhooks whose path is the password (Slack, Discord, Teams)
    (
        re.compile(
            r"(https://(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|[\w.-]*webhook\.office\.com))/[^\s'\"<>]+"
        ),
        rf"\1/{HIDDEN}",
    ),
    (re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"\bcnnray_[A-Za-z0-9_-]{8,}"), f"cnnray_{HIDDEN}"),
    (re.compile(r"\b(Bearer)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    # NAME=value and NAME: value of anything that calls itself a secret
    (
        re.compile(rf"\b((?:[A-Z0-9_-]*_)?{_NAME})(['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,}}]{{8,}}", re.IGNORECASE),
        rf"\1\2{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """The text with every secret that has a known form replaced by `***`."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """The value of a configuration, a manifest or any JSON, with the secrets in its strings and keys replaced."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return value


class RedactingFormatter(logging.Formatter):
    """Log lines, and the tracebacks below them, without the secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return redact(super().format(record))
