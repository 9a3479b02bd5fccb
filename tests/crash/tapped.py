"""An image with somebody who looks on at each change of its data, and threads whose failures are not lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import Buffer
from lmdbitmap.tracker.lane import FilterLane
from tests.helpers.support import PATIENCE_SECONDS

Look = Callable[[int, int], None]


WRITES: dict[str, Callable[[FilterLane], object]] = {
    "write": lambda lane: lane.pwrite(b"late", 0),
    "batch": lambda lane: lane.write_many([(0, memoryview(b"late"))]),
    "zeroes": lambda lane: lane.write_zeroes(0, 4),
    "discard": lambda lane: lane.discard(0, 4),
}
"""Every way in which a lane changes data."""


def look_away(offset: int, length: int) -> None:
    """Nobody is interested."""


class TappedDevice(FileDevice):
    """The image, with somebody who looks on before and after each change of its data."""

    before_change: Look = staticmethod(look_away)
    after_change: Look = staticmethod(look_away)

    @property
    def fd(self) -> None:
        """None, so that every write comes by here."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.before_change(offset, len(data))
        assert os.pwrite(self._fd, data, offset) == len(data)
        self.after_change(offset, len(data))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self.before_change(offset, length)
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        self.after_change(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self.before_change(offset, length)
        super().discard(offset, length)
        self.after_change(offset, length)


class Turnstile:
    """Holds every data write between its mark and its data until it is let go."""

    def __init__(self) -> None:
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def __call__(self, offset: int, length: int) -> None:
        self.arrived.set()
        assert self.go_on.wait(PATIENCE_SECONDS)


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


class Troupe:
    """Threads that do their act again and again until the end, where the first failure of any is raised."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self.acts = 0
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def play(self, act: Callable[[], object], pause_s: float = 0) -> None:
        """Begin a thread that does `act`, and pauses after it, over and over."""

        def repeat() -> None:
            try:
                while not self.ending.is_set():
                    act()
                    self.acts += 1
                    if pause_s:
                        self.ending.wait(pause_s)
            except BaseException as failure:
                self._failures.append(failure)
                self.ending.set()

        self._threads.append(start(repeat))

    def await_until(self, happened: Callable[[], bool]) -> None:
        """Return when it happened, or when somebody failed, which `end` tells."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened() and not self.ending.wait(0.0005):
            assert time.monotonic() < deadline, "the others stand still"

    def end(self) -> None:
        self.ending.set()
        join(*self._threads)
        if self._failures:
            raise AssertionError(f"a thread failed: {self._failures[0]!r}") from self._failures[0]
