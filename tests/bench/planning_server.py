"""A server that lists N made-up objects as S3 does (ListObjectsV2), as cheaply as Python can: nothing is stored.

The objects are screens/date=2026-01-DD/host-HH/shot-000000000.png, 8 dates of 8 hosts each, all in byte order of their
number. Prints its port, serves until it is killed. GET /busy answers with the CPU seconds that it has used.
"""

from __future__ import annotations

import argparse
import socketserver
import time
from urllib.parse import parse_qsl, unquote_plus, urlsplit

FOLDERS = 64
PAGE_KEYS = 1000
PRIME = (1 << 127) - 1
FACTOR = 0x5DEECE66D1CE4E5B9F3A7C15BF58476D
"""Etags are number * FACTOR modulo PRIME: as hard to compress as digests, and cheaper."""

HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>bench</Name><Prefix>screens/</Prefix><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType>"
)
ENTRY_END = "</Size><StorageClass>STANDARD</StorageClass></Contents>"


def folder_name(folder: int) -> str:
    return f"screens/date=2026-01-{folder // 8 + 1:02d}/host-{folder % 8:02d}/"


class Objects:
    """The names by number: `count` of them, in byte order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.per_folder = -(-count // FOLDERS)

    def name(self, number: int) -> str:
        return f"{folder_name(number // self.per_folder)}shot-{number % self.per_folder:09d}.png"

    def first_after(self, name: str) -> int:
        """Number of the first object whose name is greater."""
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.name(middle) <= name else (low, middle)
        return low

    def first_beyond(self, prefix: str) -> int:
        """Number behind the last object whose name begins with the prefix."""
        return self.first_after(prefix + "\U0010ffff")

    def page(self, start: int, end: int, more: bool) -> bytes:
        parts = [HEAD, f"<KeyCount>{end - start}</KeyCount><IsTruncated>{'true' if more else 'false'}</IsTruncated>"]
        if more:
            parts.append(f"<NextContinuationToken>{end}</NextContinuationToken>")
        number = start
        while number < end:
            folder = number // self.per_folder
            stop = min(end, (folder + 1) * self.per_folder)
            key = f"<Contents><Key>{folder_name(folder).replace('=', '%3D')}shot-"
            tail = ".png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;"
            base = folder * self.per_folder
            parts += [
                f"{key}{n - base:09d}{tail}{n * FACTOR % PRIME:032x}&quot;</ETag><Size>{50_000 + n % 99_991}{ENTRY_END}"
                for n in range(number, stop)
            ]
            number = stop
        parts.append("</ListBucketResult>")
        return "".join(parts).encode()


class Handler(socketserver.StreamRequestHandler):
    """Requests of one connection, one after the other."""

    server: Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while line := self.rfile.readline():
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            path = line.split()[1].decode()
            body = b"%f" % time.process_time() if path == "/busy" else self.listing(path)
            self.wfile.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )

    def listing(self, path: str) -> bytes:
        time.sleep(self.server.latency_s)
        asked = dict(parse_qsl(urlsplit(path).query, keep_blank_values=True))
        objects, prefix = self.server.objects, asked["prefix"]
        if "continuation-token" in asked:
            start = int(asked["continuation-token"])
        else:
            after = unquote_plus(asked.get("start-after", ""))
            start = objects.first_after(max(after, prefix))
        last = objects.first_beyond(prefix)
        end = min(start + min(int(asked.get("max-keys", PAGE_KEYS)), PAGE_KEYS), last)
        return objects.page(start, max(start, end), end < last)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, count: int, latency_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.latency_s = Objects(count), latency_s


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--latency-ms", type=float, default=0)
    arguments = parser.parse_args()
    server = Server(arguments.count, arguments.latency_ms / 1000)
    print(server.server_address[1], flush=True)
    server.serve_forever()
