"""One JSON message to an allow-listed https address. The night never depends on it: a failure is what comes back."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 10.0


def post_json(url: str, body: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> str | None:
    """None where the address took the message (2xx) in time, else why not; the address itself is never in the answer.

    No redirect is followed, so nobody but the listed host gets it. The time holds for the whole exchange: a host that
    answers one byte a second does not hold the night up.
    """
    outcome: list[str | None] = []
    thread = threading.Thread(target=lambda: outcome.append(_exchange(url, body, timeout_s)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return outcome[0] if outcome else f"no answer within {timeout_s:g} s"


def _exchange(url: str, body: Mapping[str, Any], timeout_s: float) -> str | None:
    address = urlsplit(url)
    target = (address.path or "/") + (f"?{address.query}" if address.query else "")
    raw = json.dumps(body).encode()
    connection = http.client.HTTPSConnection(
        address.hostname or "", address.port, timeout=timeout_s, context=ssl.create_default_context()
    )
    try:
        connection.request("POST", target, raw, {"Content-Type": "application/json"})
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__
    finally:
        connection.close()
    return None if 200 <= status < 300 else f"HTTP status {status}"
