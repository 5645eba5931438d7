"""The log of a local endpoint on one standard error: replicas and proxies are processes of Ray, whose own standard
error is a file of Ray's. They send each record through a Unix socket to the process that a person or a container
runtime watches; where there is no such socket (a cluster, another ASGI server) records stay on the process's own
standard error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cnn_ray.redaction import RedactingFormatter

SOCKET_VARIABLE = "CNN_RAY_LOG_SOCKET"
"""Names the socket of the process that shows the log."""
SEND_TIMEOUT_S = 2.0
"""A process that does not read its log for so long gets no more of it: answers matter more."""
_END = b"\0"
_CHUNK_BYTES = 64 * 1024

logger = logging.getLogger("cnn_ray")


class SocketHandler(logging.Handler):
    """Sends records to the log's socket, whole; from the first failure on to this process's standard error."""

    def __init__(self, path: str) -> None:
        """Connect to the socket at `path`.

        Raises:
            OSError: nobody listens there.
        """
        super().__init__()
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as every handler of logging: a log line never ends what it tells of
            return self.handleError(record)
        if self._socket is not None:
            data = text.encode("utf-8", "backslashreplace").replace(_END, b"") + _END
            try:
                return self._socket.sendall(data)
            except OSError:
                self._socket.close()
                self._socket = None
        sys.stderr.write(text + "\n")
        return None


def log_handler() -> logging.Handler:
    """Return a handler for this process's log: the socket of SOCKET_VARIABLE, or its own standard error."""
    path = os.environ.get(SOCKET_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            return SocketHandler(path)
    return logging.StreamHandler()


def open_error_log() -> None:
    """Send warnings and errors of this package to the log, once per process, without secrets."""
    if not os.environ.get(SOCKET_VARIABLE) or any(isinstance(handler, SocketHandler) for handler in logger.handlers):
        return
    handler = log_handler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, stream: TextIO) -> None:
        self.stream = stream
        self.writing = threading.Lock()
        super().__init__(path, _Sender)


class _Sender(socketserver.BaseRequestHandler):
    """One connected process."""

    server: _Server

    def handle(self) -> None:
        """Write its records to the stream until it ends."""
        rest = b""
        while data := self.request.recv(_CHUNK_BYTES):
            *records, rest = (rest + data).split(_END)
            if records:
                self._write(records)

    def _write(self, records: list[bytes]) -> None:
        text = "".join(record.decode("utf-8", "backslashreplace") + "\n" for record in records)
        with self.server.writing, contextlib.suppress(OSError, ValueError):  # nobody reads: the sender must not block
            self.server.stream.write(text)
            self.server.stream.flush()


@contextlib.contextmanager
def shown_log(folder: Path, stream: TextIO | None = None) -> Iterator[str | None]:
    """Inside, records that are sent to the socket (the value) are on `stream` (default: standard error).

    The value is None where the folder's name is too long for a socket; Ray's files have the records then.
    """
    path = str(folder / "log.sock")
    try:
        server = _Server(path, stream or sys.stderr)
    except OSError as error:
        logger.warning("requests are not logged here but in the files of Ray: %s (%s)", error, path)
        yield None
        return
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.5}, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
