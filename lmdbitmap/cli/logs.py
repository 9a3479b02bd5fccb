"""Log lines on stderr: one sentence per line for people, or one JSON object per line for programs.

    {"time": "2026-11-23T19:00:00.123+00:00", "level": "warning", "logger": "lmdbitmap.tracker.tracking",
     "message": "disk sda: tracking begins again", "disk": "sda"}

A line about a disk or a client has the key `disk` or `client`. A log call names them in its `extra`, or its message
begins with "disk %s", as all messages about a disk do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from datetime import datetime, timezone
from typing import Final

from lmdbitmap.cli.output import complain, printable
from lmdbitmap.errors import LmdbitmapError

HUMAN: Final = "human"
JSON: Final = "json"
STYLES: Final = (HUMAN, JSON)
VARIABLE: Final = "LMDBITMAP_LOG"

_LOGGER: Final = logging.getLogger("lmdbitmap")
_MOST_LINES: Final = 1000
_LAST_S: Final = 1.0
"""Until lines that nobody reads are left behind at the end."""


class OneLine(logging.Formatter):
    """Makes a log line printable: it quotes names, paths and clients, which must not reach the terminal unescaped."""

    def __init__(self) -> None:
        super().__init__("lmdbitmap: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class JsonLine(logging.Formatter):
    """Formats a record as JSON in plain ASCII, so that quoted text can neither end the line nor harm its reader."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in (("disk", _disk_of(record)), ("client", record.__dict__.get("client"))):
            if value is not None:
                line[name] = str(value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _disk_of(record: logging.LogRecord) -> object:
    named: object = record.__dict__.get("disk")
    if named is None and str(record.msg).startswith("disk %s") and isinstance(record.args, tuple):
        return record.args[0]
    return named


class AlreadyTold(Exception):
    """Ends a verb that has already reported its failure: only the exit code is left."""

    def __init__(self, error: LmdbitmapError) -> None:
        super().__init__(error)
        self.error = error


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic for type checkers only
    """The one handler of this program; a class of its own, so that `choose` finds it to set its style."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | threading.Event] | None = None
        self._left_out = 0

    @property
    def waits(self) -> bool:
        return self._lines is None

    def never_wait(self) -> None:
        """Raises `RuntimeError` if no thread can be started; it goes on as it was then."""
        lines: queue.Queue[str | threading.Event] = queue.Queue(_MOST_LINES)
        threading.Thread(target=self._write, args=[lines], name="lmdbitmap log", daemon=True).start()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines is None:
            super().emit(record)
            return
        try:
            if self._left_out:
                self._lines.put_nowait(self.format(_lines_left_out(self._left_out)))
                self._left_out = 0
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._left_out += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        if self._lines is None:
            super().flush()
            return
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put(written, timeout=_LAST_S)
            written.wait(_LAST_S)

    def _write(self, lines: queue.Queue[str | threading.Event]) -> None:
        """Write line after line, not through the stream: others would wait for its lock."""
        while True:
            line = lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            with contextlib.suppress(OSError):
                os.write(self.stream.fileno(), f"{line}\n".encode(self.stream.encoding, "backslashreplace"))


def _lines_left_out(count: int) -> logging.LogRecord:
    message = "%d lines of the log were left out: nobody read them"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (count,), None)


def begin() -> None:
    """Log warnings and errors as sentences, until the command line is read."""
    handler = StderrHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def choose(style: str, *, verbose: bool) -> None:
    """Set the style. With `verbose` or in JSON, also log ordinary events, such as a client that connects."""
    for handler in _handlers():
        handler.setFormatter(JsonLine() if style == JSON else OneLine())
    if verbose or style == JSON:
        _LOGGER.setLevel(logging.INFO)


def never_wait() -> None:
    """From now on leave lines out, and log how many, rather than wait until somebody reads them.

    For a process that serves guests: a log whose reader hangs must not keep one from its disk.
    """
    for handler in _handlers():
        handler.never_wait()


def last_words(message: str) -> None:
    """Report why the program fails, in the style of its log."""
    if any(isinstance(handler.formatter, JsonLine) or not handler.waits for handler in _handlers()):
        _LOGGER.error("%s", message)
    else:
        complain(message)


def _handlers() -> list[StderrHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, StderrHandler)]
