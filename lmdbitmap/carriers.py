"""Copies a device into an image with as many threads as there are processors for: each carries a load all the way.

    the caller plans ─▶ read a load ─▶ in turn: its place in the image, and its hashers ─▶ write it and hash it

To read, to write and to hash let go of Python's lock, and nothing is handed from one thread to another: what one has
read is written and hashed while it is in that processor's cache. Only to find their places do loads take turns, in
the order of the disk, so that the image is the same however many carry. The caller is one of them, plans what is
carried next, and tells of progress; the others work while there is a processor for them (crew.py).

What fails in one of them ends all, and is raised to the caller. A device that can be interrupted is then, so that
nobody hangs in it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.buffers import new_buffer
from lmdbitmap.crew import crew_size, joined, processors
from lmdbitmap.errors import LmdbitmapError, os_errors_at
from lmdbitmap.interfaces import Buffer
from lmdbitmap.loads import Load, Loads, Stretch
from lmdbitmap.qcow2 import Qcow2Writer, Sink
from lmdbitmap.readable import Ways

_MOST_CARRIERS: Final = 4
"""More are not faster than memory, and each takes a buffer."""
_PLANNED_EACH: Final = 2
"""Loads for each carrier, beside those that are carried."""

Advance: TypeAlias = Callable[[int], None]
"""Called with bytes of the device that were done, in the caller's thread; what it raises ends the work."""


class Hashing(Protocol):
    """Computes digests of the file while it is filled."""

    def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
        """The file will have these bytes, which are told in its order; what it answers is called when there is time."""

    def wrote(self, offset: int, length: int) -> None:
        """The file has these bytes."""


class Target(Sink, Protocol):
    """The image file, written to by many threads; its refusals name the `place`."""

    @property
    def place(self) -> str: ...


class Shelf:
    """A sink that keeps what the image is to have, and where, until somebody has time to write it."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Buffer]] = []

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._parts.append((offset, data))

    def cleared(self) -> list[tuple[int, memoryview]]:
        """All that is on it, in the order of the file."""
        parts, self._parts = sorted(self._parts, key=lambda part: part[0]), []
        return [(offset, memoryview(data)) for offset, data in parts]


class Carriers:
    """Fills `target` with what `writer` maps, which puts all its own on the `shelf`. For one call of `carry`."""

    def __init__(
        self, loads: Loads, ways: Ways, writer: Qcow2Writer, shelf: Shelf, target: Target, hashing: Hashing
    ) -> None:
        self._loads = loads
        self._ways = ways
        self._writer = writer
        self._shelf = shelf
        self._target = target
        self._hashing = hashing
        self._news = threading.Condition()
        """Of all that follows."""
        self._planned: deque[tuple[int, Load]] = deque()
        self._count = 0
        """Loads that were planned."""
        self._all_planned = False
        self._ends = False
        self._wanted = 0
        self._turn = 0
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self.bytes_changed = 0
        self.bytes_zero = 0

    def carry(self, runs: Iterable[Run], advance: Advance) -> None:
        """Copy the runs, which ascend. All is written when it returns, and no thread of it is left."""
        try:
            self._carry_all(enumerate(self._loads.planned(runs)), advance)
        except BaseException as failure:
            self._fail(failure)
        finally:
            self._dismiss()
        if self._failure is not None:
            raise self._failure

    def finish(self) -> int:
        """Complete the image; answer its size in bytes."""
        size = self._writer.finish()
        self._put_away(self._shelved())
        return size

    # -- the caller ----------------------------------------------------------------------------------------

    def _carry_all(self, loads: Iterator[tuple[int, Load]], advance: Advance) -> None:
        buffer, told = new_buffer(self._loads.buffer_bytes), 0
        while self._plan(loads) and self._failure is None:
            self._carry_next(buffer)
            told, before = self.bytes_changed, told
            advance(told - before)
        self._dismiss()
        if self._failure is None:
            self._require_all()
            advance(self.bytes_changed - told)

    def _require_all(self) -> None:
        """What is not copied would be taken for unchanged, for good: so this is not left to reasoning."""
        if not self._all_planned or self._turn != self._count:
            raise LmdbitmapError(
                f"{self._turn} of {self._count} loads or more were copied: this is a mistake of lmdbitmap",
                next_step="report it, and try again",
            )

    def _plan(self, loads: Iterator[tuple[int, Load]]) -> bool:
        """Have enough for everybody to do, and say how many may; whether there was anything left."""
        self._wanted = crew_size(_most() - 1, spared=self._ways.spared(), busy=1)
        while len(self._planned) <= _PLANNED_EACH * self._wanted:
            load = next(loads, None)
            if load is None:
                self._all_planned = True
                return bool(self._planned)  # or the others have it all
            self._loads.announce(load[1])
            with self._news:
                self._planned.append(load)
                self._count += 1
                self._news.notify_all()
        self._call_more()
        return True

    def _call_more(self) -> None:
        while len(self._threads) < min(self._wanted, len(self._planned) - 1):
            # A daemon, as who forgot to dismiss it can end nevertheless.
            thread = threading.Thread(target=self._help, args=[len(self._threads)], daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives us no more
                break
            self._threads.append(thread)

    def _dismiss(self) -> None:
        """Return when what was begun is over."""
        with self._news:
            self._ends = True
            self._news.notify_all()
        for thread in self._threads:
            joined(thread)

    # -- whoever carries -----------------------------------------------------------------------------------

    def _help(self, number: int) -> None:
        try:
            buffer = new_buffer(self._loads.buffer_bytes)
            while self._is_needed(number):
                self._carry_next(buffer)
        except BaseException as failure:  # raised to the caller
            self._fail(failure)

    def _is_needed(self, number: int) -> bool:
        """Wait until there is something to carry, and a processor for the helper of that number."""
        with self._news:
            while not self._ends and self._failure is None:
                if self._planned and number < self._wanted:
                    return True
                self._news.wait()
        return False

    def _carry_next(self, buffer: bytearray) -> None:
        """The load that was planned first, unless others took all."""
        with self._news:
            if not self._planned or self._failure is not None:
                return
            number, load = self._planned.popleft()
        stretches = self._loads.read(load, buffer)
        with self._turn_of(number):
            parts = self._placed(stretches, memoryview(buffer))
        self._put_away(parts)

    @contextlib.contextmanager
    def _turn_of(self, number: int) -> Iterator[None]:
        with self._news:
            while self._turn != number:
                if self._failure is not None:
                    raise self._failure
                self._news.wait()
        yield
        with self._news:
            self._turn += 1
            self._news.notify_all()

    def _fail(self, failure: BaseException) -> None:
        with self._news:
            self._failure = self._failure or failure
            self._news.notify_all()
        self._ways.interrupt()

    # -- a load, when it has its turn, and after that ------------------------------------------------------

    def _placed(
        self, stretches: Iterable[Stretch], view: memoryview
    ) -> list[tuple[int, memoryview, Callable[[], None]]]:
        """Find each stretch its place in the image: neighbours in the buffer are neighbours there, mostly."""
        at = begin = end = 0
        for offset, length, start in stretches:
            self.bytes_changed += length
            if start is None:
                self._writer.write_zeroes(offset, length)
                self.bytes_zero += length
                continue
            place = self._writer.reserve(offset, length)
            if (place, start) != (at + end - begin, end):
                self._shelf.pwrite(view[begin:end], at)
                at, begin = place, start
            end = start + length
        self._shelf.pwrite(view[begin:end], at)
        return self._shelved()

    def _shelved(self) -> list[tuple[int, memoryview, Callable[[], None]]]:
        return [
            (offset, data, self._hashing.feed(offset, data))
            for offset, data in self._shelf.cleared()
            if len(data)
        ]

    def _put_away(self, parts: Iterable[tuple[int, memoryview, Callable[[], None]]]) -> None:
        for offset, data, hash_it in parts:
            self._target.pwrite(data, offset)
            with os_errors_at(self._target.place):
                hash_it()


def _most() -> int:
    """Two where there is one processor: who waits for a disk needs none."""
    return min(max(processors(), 2), _MOST_CARRIERS)
