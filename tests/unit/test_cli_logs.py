"""Log lines: a sentence for people, an object for programs, one line whatever they quote."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from typing import Any

import pytest

from lmdbitmap.cli import logs
from lmdbitmap.cli.logs import JsonLine, OneLine, StderrHandler
from tests.helpers.support import PATIENCE_SECONDS

NASTY = "a\nb\x1b[2J\u2028ü\udc80"


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("lmdbitmap.filter", logging.WARNING, __file__, 1, message, args, None)
    made.__dict__.update(extra)
    made.created = 1_795_460_400.25
    return made


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonLine().format(made)
    assert line.isascii()
    assert line.isprintable()
    told: dict[str, Any] = json.loads(line)
    return told


def test_line_for_programs_has_its_fields() -> None:
    assert as_json(record("the store %s", "is full")) == {
        "time": "2026-11-23T19:00:00.250+00:00",
        "level": "warning",
        "logger": "lmdbitmap.filter",
        "message": "the store is full",
    }


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (record("disk %s: lost", "sda"), {"disk": "sda"}),
        (record("disk %s is served", "sda"), {"disk": "sda"}),
        (record("lost: %s", "sda"), {}),
        (
            record("a client was dropped", disk="sda", client="process 5"),
            {"disk": "sda", "client": "process 5"},
        ),
        (record("a client was dropped", disk=None, client="process 5"), {"client": "process 5"}),
        (record("disk %%s without one"), {}),
    ],
)
def test_line_names_the_disk_and_the_client_it_is_about(
    made: logging.LogRecord, names: dict[str, str]
) -> None:
    told = as_json(made)
    assert {name: told[name] for name in ("disk", "client") if name in told} == names


def test_whatever_is_quoted_stays_on_one_line() -> None:
    assert as_json(record("disk %s: %s", NASTY, NASTY))["disk"] == NASTY
    shown = OneLine().format(record("disk %s", NASTY))
    assert shown.startswith("lmdbitmap: disk a\\nb\\x1b[2J\\u2028ü")
    assert shown.isprintable()


def test_failure_of_ours_brings_its_stack() -> None:
    made = record("a mistake")
    try:
        raise KeyError("here")
    except KeyError:
        made.exc_info = sys.exc_info()
    assert "KeyError: 'here'" in as_json(made)["exception"]


def test_lines_that_nobody_reads_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(reader) as lines, open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        handler = StderrHandler()
        handler.setFormatter(OneLine())
        handler.never_wait()
        said = "x" * 500

        def write() -> None:
            for _ in range(3000):
                handler.emit(record(said))

        writing = threading.Thread(target=write)
        writing.start()
        writing.join(PATIENCE_SECONDS)
        assert not writing.is_alive()
        monkeypatch.setattr(logs, "_LAST_S", 0.1)
        handler.flush()  # in vain, and not for ever
        monkeypatch.setattr(logs, "_LAST_S", float(PATIENCE_SECONDS))
        read: list[str] = []
        while len(read) < 1000:
            read.append(lines.readline())
        handler.emit(record("heard again"))
        while read[-1] != "lmdbitmap: heard again\n":
            read.append(lines.readline())
        handler.flush()
    left_out = 3000 - read.count(f"lmdbitmap: {said}\n")
    assert left_out > 0
    assert read[-2] == f"lmdbitmap: {left_out} lines of the log were left out: nobody read them\n"


def test_without_a_thread_for_its_lines_the_log_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has to say at least why the program ends."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    handler = StderrHandler()
    handler.setFormatter(OneLine())
    with pytest.raises(RuntimeError):
        handler.never_wait()
    handler.emit(record("the last words"))
    assert (handler.waits, capsys.readouterr().err) == (True, "lmdbitmap: the last words\n")
