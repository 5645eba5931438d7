"""Records of other processes arrive whole, in order, without secrets; nobody waits for a reader that is gone."""

from __future__ import annotations

import io
import logging
import os
import time

import pytest

from cnn_ray import log_stream
from cnn_ray.log_stream import SOCKET_VARIABLE, SocketHandler, open_error_log, shown_log
from cnn_ray.redaction import RedactingFormatter


def record(text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("cnn_ray.x", logging.ERROR, "file", 1, text, args, None)


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()[-500:]
        time.sleep(0.01)


def test_records_of_several_processes_are_whole(tmp_path):
    stream = io.StringIO()
    with shown_log(tmp_path, stream) as path:
        assert path is not None
        children = []
        for name in "ab":
            child = os.fork()
            if child == 0:
                handler = SocketHandler(path)
                for number in range(300):
                    handler.emit(record("%s %d first\n%s second", name, number, name * 3000))
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        wait_for(stream, "a 299 first")
        wait_for(stream, "b 299 first")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1200
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        assert second == f"{first[0] * 3000} second", "a record of one process is not torn by another's"
    assert [line for line in lines[::2] if line[0] == "a"] == [f"a {n} first" for n in range(300)]


def test_what_utf8_lacks_is_escaped(tmp_path):
    stream = io.StringIO()
    with shown_log(tmp_path, stream) as path:
        assert path is not None
        handler = SocketHandler(path)
        handler.emit(record("bad \udcff and \0 nul"))
        wait_for(stream, "nul\n")
    assert stream.getvalue() == "bad \\udcff and  nul\n"


def test_without_a_reader_records_go_to_standard_error(tmp_path, capsys):
    with shown_log(tmp_path, io.StringIO()) as path:
        assert path is not None
        handler = SocketHandler(path)
        handler._socket.close()  # pyright: ignore[reportOptionalMemberAccess]
    handler.emit(record("still there"))

    assert capsys.readouterr().err == "still there\n"


def test_a_reader_that_hangs_is_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_stream, "SEND_TIMEOUT_S", 0.1)
    import socket

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "log.sock"))
        listening.listen()
        handler = SocketHandler(str(tmp_path / "log.sock"))
        start = time.monotonic()
        for _ in range(200):
            handler.emit(record("x" * 10_000))
    assert time.monotonic() - start < 5
    assert capsys.readouterr().err.endswith("x\n")


def test_a_folder_with_a_long_name_leaves_the_log_where_it_is(tmp_path, caplog):
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    with caplog.at_level(logging.WARNING), shown_log(folder, io.StringIO()) as path:
        assert path is None
    assert "not logged here" in caplog.text


@pytest.fixture
def clean_logger(monkeypatch):
    monkeypatch.setattr(log_stream.logger, "handlers", [])


def test_warnings_of_the_package_reach_the_log_once_and_without_secrets(tmp_path, monkeypatch, clean_logger):
    stream = io.StringIO()
    with shown_log(tmp_path, stream) as path:
        monkeypatch.setenv(SOCKET_VARIABLE, str(path))
        open_error_log()
        open_error_log()
        logging.getLogger("cnn_ray.x").info("not this")
        logging.getLogger("cnn_ray.x").warning("see https://user:secret@host/")
        wait_for(stream, "\n")
    assert stream.getvalue() == "WARNING see https://***@host/\n"
    assert isinstance(log_stream.logger.handlers[0].formatter, RedactingFormatter)


def test_elsewhere_nothing_changes(monkeypatch, clean_logger):
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    open_error_log()
    assert log_stream.logger.handlers == []
