"""Signals that end a verb as Ctrl-C does: by an exception, so that unfinished work is undone.

By default SIGTERM and SIGHUP kill the process at once. That loses nothing, as no death of the process does. For verbs
with little to undo it is the right thing: it works at once, whatever the verb is waiting for.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn

_BESIDE_CTRL_C = (signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
    """Like `KeyboardInterrupt`, for another signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def undoing() -> Iterator[None]:
    """Let SIGTERM or SIGHUP end the block by `Ended`; a second one ends the process at once. For the main thread.

    Signals that are ignored (nohup) or already handled are left alone.
    """
    heeded = [number for number in _BESIDE_CTRL_C if signal.getsignal(number) is signal.SIG_DFL]
    for number in heeded:
        signal.signal(number, _end)
    try:
        yield
    finally:
        _let_go(heeded)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    _let_go(other for other in _BESIDE_CTRL_C if signal.getsignal(other) is _end)
    raise Ended(number)


def _let_go(heeded: Iterable[signal.Signals]) -> None:
    for number in heeded:
        signal.signal(number, signal.SIG_DFL)
