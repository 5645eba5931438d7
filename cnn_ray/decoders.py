"""Encoded bytes -> pixels in child processes, because images come from attackers and decoders have bugs.

Each child decodes one file at a time, so a crash names its file: it alone is tried again in a fresh child and, if that
one dies too, is a row failure; no shard is lost and nothing has to be bisected. A child has no credentials in its
environment, no file to write to, and a limit on its memory. Bytes and pixels pass through shared memory, which costs
less than the threads of one process lose to each other. This module's main is the child.
"""

from __future__ import annotations

import mmap
import os
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cnn_ray.errors import UnavailableError
from cnn_ray.images import DecodedImage, ImageCaps, decode, warm_up
from cnn_ray.memory import keep_freed_memory
from cnn_ray.records import QuarantineCode, RowFailure

ANSWER_S = 120.0
"""A file that takes longer than this kills its decoder: 64 million pixels take some three seconds."""
DEATHS_OF_ONE_FILE = 2
"""A file whose decoder died this often (by itself: SIGSEGV, SIGABRT, ...) is the reason."""
KILLS_OF_ONE_FILE = 5
"""SIGKILL comes from outside, as when memory is short on the machine: the file is given more chances."""
START_ATTEMPTS = 3
PATIENCE_S = 5.0
PAUSE_S = 0.2

_REQUEST = struct.Struct("<QII")  # bytes of the file, height, width
_ANSWER = struct.Struct("<iiiI")  # 0 and width, height, or 1; length of the failure's text behind it
_READY = b"r"
_MOST_TEXT_BYTES = 1024
_MEMORY_BYTES = 1 << 30  # interpreter and libraries, as address space
_BYTES_PER_PIXEL = 20  # RGBA, its copy on white, and what a 16-bit file needs besides
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT", "OPENBLAS_CORETYPE")


class Decoders:
    """A pool of decoder processes; safe to call from many threads."""

    def __init__(self, size_px: tuple[int, int], caps: ImageCaps, count: int) -> None:
        """`count` children are started now and get ready while the caller goes on; no image is larger than size_px
        (height, width)."""
        self._size_px = size_px
        self._caps = caps
        self._closed = False
        self._alone = threading.Lock()
        self._children: set[_Child] = set()
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(self._start())

    def decode(self, data: bytes, out: NDArray[np.uint8]) -> tuple[int, int] | RowFailure:
        """Width and height in pixels of the original, whose pixels are in `out` (uint8 [H, W, 3]) now, at the size of
        `out`; or why not.

        The failures are those of `cnn_ray.images.decode`, and `decoder_crash` where the bytes kill the decoder.

        Raises:
            UnavailableError: no decoder can be started on this machine, or the pool was closed.
            ValueError: `out` is larger than the pool's images.
        """
        if out.nbytes > self._size_px[0] * self._size_px[1] * 3:
            raise ValueError(f"{out.shape} is larger than {self._size_px}")
        if len(data) > self._caps.max_bytes:
            return RowFailure(QuarantineCode.TOO_LARGE, f"{len(data)} bytes, allowed are {self._caps.max_bytes}")
        child = self._idle.get()
        try:
            answer = child.ask(data, out)
            if answer is None:
                with self._alone:  # not all cores at once: memory may be what was short
                    answer, child = self._ask_again(data, out, child)
            return answer
        finally:
            self._idle.put(child)

    def close(self) -> None:
        """All children have ended; whoever still waits for one gets an error."""
        self._closed = True
        for child in list(self._children):
            child.kill()  # its descriptors are closed by the thread that uses it, or with the pool

    def _start(self) -> _Child:
        if self._closed:
            raise UnavailableError("Expected a decoder. Received: a closed pool. Next: run the same command again.")
        child = _Child(self._size_px, self._caps)
        self._children.add(child)
        return child

    def _replace(self, child: _Child) -> _Child:
        child.end()
        self._children.discard(child)
        for attempt in range(START_ATTEMPTS):
            fresh = self._start()
            if fresh.wait_ready():
                return fresh
            fresh.end()
            self._children.discard(fresh)
            time.sleep(PAUSE_S * 2**attempt)
        raise UnavailableError(
            "Expected a decoder process to start. Received: it ended at once, three times. "
            "Next: check the memory of the machine and run the same command again."
        )

    def _ask_again(
        self, data: bytes, out: NDArray[np.uint8], dead: _Child
    ) -> tuple[tuple[int, int] | RowFailure, _Child]:
        deaths = kills = 0
        child = dead
        while True:
            cause = child.cause_of_death()
            child = self._replace(child)
            if cause == "SIGKILL":
                kills += 1
                time.sleep(PAUSE_S * kills)
            elif cause != "start":
                deaths += 1
            if cause == "timeout" or deaths >= DEATHS_OF_ONE_FILE or kills >= KILLS_OF_ONE_FILE:
                said = f"gave no answer in {ANSWER_S:.0f} s" if cause == "timeout" else f"ended with {cause}"
                return RowFailure(QuarantineCode.DECODER_CRASH, f"the decoder {said}"), child
            answer = child.ask(data, out)
            if answer is not None:
                return answer, child


class _Child:
    """One decoder process and the memory shared with it: pixels first, the file behind them."""

    def __init__(self, size_px: tuple[int, int], caps: ImageCaps) -> None:
        self._pixel_bytes = size_px[0] * size_px[1] * 3
        self._ready = False
        self._timed_out = False
        shared_bytes = self._pixel_bytes + caps.max_bytes
        descriptor = _shared_memory(shared_bytes)
        try:
            self._memory = mmap.mmap(descriptor, shared_bytes)
            arguments = [*size_px, caps.max_pixels, caps.max_bytes, descriptor]
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter and numbers of ours
                [sys.executable, "-P", "-m", "cnn_ray.decoders", *(str(a) for a in arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=(descriptor,),
                start_new_session=True,  # Ctrl-C on a terminal is for the parent; the end of stdin is for the child
            )
        finally:
            os.close(descriptor)
        self._answers = select.poll()  # select() ends at descriptor 1024
        if self._process.stdout is not None:
            self._answers.register(self._process.stdout, select.POLLIN)

    def ask(self, data: bytes, out: NDArray[np.uint8]) -> tuple[int, int] | RowFailure | None:
        """The child's answer, None where it died or had to be killed."""
        if not self.wait_ready():
            return None
        try:
            self._memory[self._pixel_bytes : self._pixel_bytes + len(data)] = data
            self._write(_REQUEST.pack(len(data), *out.shape[:2]))
            answer = self._read(_ANSWER.size)
            failed, width, height, text_bytes = _ANSWER.unpack(answer)
            if failed:
                code, _, detail = self._read(min(text_bytes, _MOST_TEXT_BYTES)).decode().partition(" ")
                return RowFailure(QuarantineCode(code), detail)
        except (OSError, ValueError, EOFError):
            return None
        out[...] = np.frombuffer(self._memory, np.uint8, out.nbytes).reshape(out.shape)
        return width, height

    def wait_ready(self) -> bool:
        """Whether the child has imported what it needs and waits for files."""
        if not self._ready:
            try:
                self._ready = self._read(1) == _READY
            except (OSError, ValueError, EOFError):
                return False
        return self._ready

    def cause_of_death(self) -> str:
        """A signal's name, "timeout", "start" for one that never got ready, or "exit N"."""
        if self._timed_out:
            return "timeout"
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:  # it lives and answers nonsense: somebody else's code runs in it
            self._process.kill()
            self._process.wait()
            return "a wrong answer"
        if code < 0:
            return signal.Signals(-code).name
        return f"exit {code}" if self._ready else "start"

    def kill(self) -> None:
        """The process has ended and is waited for; whoever waits for its answer is told so by the end of the pipe."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """The process has ended and its pipes are closed. For the thread that uses the child alone: a descriptor that
        is closed under another thread is soon somebody else's, and then that thread waits for a stranger."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except OSError:  # a broken pipe
                    continue

    def _write(self, data: bytes) -> None:
        if self._process.stdin is None:
            raise EOFError
        os.write(self._process.stdin.fileno(), data)

    def _read(self, count: int) -> bytes:
        stream = self._process.stdout
        if stream is None:
            raise EOFError
        data, deadline = b"", time.monotonic() + ANSWER_S
        while len(data) < count:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._answers.poll(left_s * 1000):
                self._timed_out = True
                self._process.kill()
                raise EOFError
            piece = os.read(stream.fileno(), count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def _shared_memory(size_bytes: int) -> int:
    """A descriptor of `size_bytes` of anonymous memory; pages that nobody touches cost nothing."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("cnn_ray-decoder")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size_bytes)
    return descriptor


def _environment() -> dict[str, str]:
    """What a decoder needs to import this very package, and nothing that is worth stealing."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *(entry for entry in sys.path if entry)])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return passed | threads | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def _limit_resources(caps: ImageCaps, shared_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    used = _address_space_bytes()
    limits = {
        resource.RLIMIT_AS: used + shared_bytes + _MEMORY_BYTES + _BYTES_PER_PIXEL * caps.max_pixels,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        if hard == resource.RLIM_INFINITY or most < hard:
            try:
                resource.setrlimit(limit, (most, hard))
            except (ValueError, OSError):  # macOS has no limit on address space
                continue


def _address_space_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _child_main(arguments: list[str]) -> NoReturn:
    """Decodes files from the shared memory until standard input ends."""
    height, width, max_pixels, max_bytes, descriptor = (int(a) for a in arguments)
    caps = ImageCaps(max_pixels=max_pixels, max_bytes=max_bytes)
    pixel_bytes = height * width * 3
    memory = mmap.mmap(descriptor, pixel_bytes + max_bytes)
    os.close(descriptor)
    shared = np.frombuffer(memory, np.uint8, pixel_bytes)
    # Whatever a library prints goes nowhere: the answers have a descriptor of their own.
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    keep_freed_memory()
    warm_up()
    _limit_resources(caps, pixel_bytes + max_bytes)
    os.write(answers, _READY)
    while request := os.read(0, _REQUEST.size):
        length, *size_px = _REQUEST.unpack(request)
        result = decode(memory[pixel_bytes : pixel_bytes + length], (size_px[0], size_px[1]), caps)
        if isinstance(result, DecodedImage):
            shared[: result.pixels.size] = result.pixels.reshape(-1)
            os.write(answers, _ANSWER.pack(0, result.width_px, result.height_px, 0))
        else:
            text = f"{result.code} {result.detail}".encode()
            os.write(answers, _ANSWER.pack(1, 0, 0, len(text)) + text)
    os._exit(0)


if __name__ == "__main__":
    _child_main(sys.argv[1:])
