"""Signals that end a verb in the middle as Ctrl-C does: by an exception, so that what was begun is undone.

By default SIGTERM and SIGHUP end the process as it stands. That loses nothing, as no death does, and where there is
little to undo it is what is wanted: at once, whatever is being waited for.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn

_BESIDE_CTRL_C = (signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
    """As `KeyboardInterrupt`, by another signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def undoing() -> Iterator[None]:
    """One of these signals ends the block by `Ended`; a second one ends the process at once.

    What is ignored stays so, as under nohup, and what somebody else handles. For the main thread.
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
