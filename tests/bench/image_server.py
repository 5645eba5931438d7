"""The made-up objects of planning_server.py with bytes: each of them is the same small image. LIST, HEAD and GET."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from planning_server import FACTOR, PRIME, Handler, Objects, Server


class ImageObjects(Objects):
    """Objects that all have the bytes `image`."""

    def __init__(self, count: int, image: bytes) -> None:
        super().__init__(count)
        self.image = image

    def page(self, start: int, end: int, more: bool) -> bytes:
        size = b"<Size>%d</Size>" % len(self.image)
        return re.sub(rb"<Size>\d+</Size>", size, super().page(start, end, more))

    def number(self, name: str) -> int | None:
        """Number of the object of this name, None where there is none."""
        found = self.first_after(name) - 1
        return found if found >= 0 and self.name(found) == name else None


class ImageHandler(Handler):
    """Requests of one connection, one after the other."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            method, path = line.split()[0], line.split()[1].decode()
            if "list-type" in path:
                self._answer(self.listing(path), "")
            else:
                self._object(method == b"HEAD", unquote(urlsplit(path).path).split("/", 2)[2])

    def _object(self, head: bool, name: str) -> None:
        objects = self.server.objects
        number = objects.number(name) if isinstance(objects, ImageObjects) else None
        if number is None or not isinstance(objects, ImageObjects):
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        more = f'ETag: "{number * FACTOR % PRIME:032x}"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
        self._answer(objects.image, more, head=head)

    def _answer(self, body: bytes, more: str, *, head: bool = False) -> None:
        headers = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\n{more}Content-Length: {len(body)}\r\n\r\n"
        self.wfile.write(headers.encode() + (b"" if head else body))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("image", type=Path)
    arguments = parser.parse_args()
    server = Server(arguments.count, 0)
    server.objects = ImageObjects(arguments.count, arguments.image.read_bytes())
    server.RequestHandlerClass = ImageHandler
    print(server.server_address[1], flush=True)
    server.serve_forever()
