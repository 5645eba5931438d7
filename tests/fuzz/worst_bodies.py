"""What the worst bodies that the endpoint lets through cost to parse: seconds, and memory above the body itself.

    python tests/fuzz/worst_bodies.py [MIB]

Each body is as long as max_body_bytes allows (64 MiB) or as full of values as MAX_MARKS allows, whatever comes first.
Each runs in a process of its own: its peak of resident memory less that of a parse of nothing.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cnn_ray import image_bodies, open_inference, protocol
from cnn_ray.json_bodies import MAX_ARRAYS, MAX_MARKS, MAX_OBJECTS

MIB = int(sys.argv[1]) if len(sys.argv) > 1 else 64
FORM = "multipart/form-data; boundary=xx"
MARKS = MAX_MARKS - 10


def filled(unit: bytes, marks: int) -> bytes:
    """A predict body with as many units in a list as size and marks allow."""
    count = min((MIB << 20) // len(unit), MARKS // marks)
    count = min(count, MAX_ARRAYS if b"[" in unit else count, MAX_OBJECTS if b"{" in unit else count) - 4
    return b'{"instances":[' + unit * count + b"0]}"


def padded(body: bytes, unit: bytes) -> bytes:
    """A predict body of full length with a non-ASCII character, so that it takes 4 bytes a character as text."""
    return body + unit * (((MIB << 20) - len(body)) // len(unit)) + '"],"\N{GRINNING FACE}":0}'.encode()


def form(body: bytes) -> bytes:
    return b'--xx\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + body + b"\r\n--xx--\r\n"


def numbers(side: int) -> bytes:
    """Pixel lists of images of the given side, as many as the marks allow: all the way through to uint8."""
    row = b"[" + b",".join([b"[1,2,3]"] * side) + b"]"
    image = b"[" + b",".join([row] * side) + b"]"
    count = MARKS // (image.count(b",") + image.count(b"[") + 2)
    count = min(count, MAX_ARRAYS // (image.count(b"[") + 1))
    return b'{"instances":[' + b",".join([image] * count) + b"]}"


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nothing": ("predict", lambda: b"{}"),
    "one image in base64": ("predict", lambda: b'{"instances":[{"b64":"' + b"A" * ((MIB << 20) - 40) + b'"}]}'),
    "the same with white space in it": (
        "predict", lambda: b'{"instances":[{"b64":"' + b"AAAA " * ((MIB << 20) // 5 - 40) + b'"}]}'),
    "empty lists": ("predict", lambda: filled(b"[],", 2)),
    "empty objects": ("predict", lambda: filled(b"{},", 2)),
    "objects of one key": ("predict", lambda: filled(b'{"a":0},', 5)),
    "objects of keys of their own": (
        "predict", lambda: b'{"instances":[' + b",".join(b'{"%d":0}' % i for i in range(MAX_OBJECTS - 1)) + b"]}"),
    "integers": ("predict", lambda: filled(b"9999999,", 1)),
    "long integers": ("predict", lambda: filled(b"9" * 4000 + b",", 1)),
    "floats": ("predict", lambda: filled(b"0.1234567,", 1)),
    "a float of all digits": ("predict", lambda: b'{"instances":[0.' + b"1" * (MIB << 20) + b"]}"),
    "too long an integer": ("predict", lambda: b'{"instances":[' + b"1" * (MIB << 20) + b"]}"),
    "strings": ("predict", lambda: filled(b'"ab",', 3)),
    "escapes": ("predict", lambda: b'{"instances":["' + rb"\u00e9" * ((MIB << 20) // 6) + b'"]}'),
    "objects of many keys": (
        "predict", lambda: b'{"instances":[' + b'{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0},' * 90_000 + b"0]}"),
    "deep lists in strings": ("predict", lambda: b'{"instances":[' + b'"[",' * (MARKS // 4) + b"0]}"),
    "deep escapes": ("predict", lambda: b"[" * 65 + b'"' + rb"\\" * (MIB << 19)),
    "deep escaped quotes": ("predict", lambda: b"[" * 65 + b'"' + rb"\"" * (MARKS - 70)),
    "quotes": ("predict", lambda: b"[" * 65 + b'"' * (MIB << 20)),
    "an emoji in it": ("predict", lambda: padded(b'{"instances":["', b"A")),
    "white space": ("predict", lambda: b" " * (MIB << 20)),
    "deep lists": ("predict", lambda: b"[" * MARKS),
    "pixels of 224": ("pixels224", lambda: numbers(224)),
    "pixels of 32": ("pixels32", lambda: numbers(32)),
    "infer, flat pixels": (
        "infer", lambda: b'{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[1,224,224,3],"data":['
        + b"1," * MARKS + b"1]}]}"),
    "a form with one file": ("form", lambda: form(b"\0" * (MIB << 20))),
    "a form of line ends": ("form", lambda: form(b"\r\n" * (MIB << 19))),
    "a form of boundaries": ("form", lambda: form(b"\r\n--xxy" * ((MIB << 20) // 7))),
    "a form of header bytes": ("form", lambda: b"--xx\r\n" + b"a" * (MIB << 20)),
}  # fmt: skip


def parse(kind: str, body: bytes) -> str:
    """Parses the body as its kind says; what came out."""
    try:
        if kind == "form":
            image_bodies.image_of(FORM, body)
        elif kind == "infer":
            open_inference.parse_infer(body, None, size_px=(224, 224), max_instances=128)
        else:
            side = int(kind[6:] or 224) if kind.startswith("pixels") else 224
            protocol.parse_predict(body, size_px=(side, side), max_instances=4000)
    except protocol.RequestError as error:
        return str(error)[:60]
    return "parsed"


def measure(name: str, pipe) -> None:
    """Sends (seconds, peak MiB before, peak MiB after, what came out) of the named body."""
    kind, build = BODIES[name]
    body = build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    answer = parse(kind, body)
    pipe.send((time.perf_counter() - start, len(body) / 2**20, before, answer))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    print(f"{'body':32} {'MiB':>6} {'s':>6} {'peak MiB more':>13}  answer")
    for name in BODIES:
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, there))
        process.start()
        seconds, size, before, answer = here.recv()
        print(f"{name:32} {size:6.1f} {seconds:6.2f} {here.recv() - before:13.0f}  {answer}", flush=True)
        process.join()
