"""What copying needs of a device: to read it, to ask where it is zero, and how it is best read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from lmdbitmap.interfaces import Allocation
from lmdbitmap.work.crew import Spared
from lmdbitmap.work.pace import Pace

CHUNK_BYTES = 1 << 20
"""Bytes to read at once, unless the device says more in its `chunk_bytes`."""

Parts: TypeAlias = "Sequence[tuple[memoryview, int]]"
"""A sequence of (buffer, offset)."""
Ranges: TypeAlias = "Sequence[tuple[int, int]]"
"""A sequence of (offset, length)."""
ReadMany: TypeAlias = Callable[[Parts, Ranges], None]
"""Fills all parts at once. They lie in the ranges. The rest of the ranges is zeroes and will not be read."""
WillNeed: TypeAlias = Callable[[int, int], None]
"""Called with (offset, length) that will be read."""


class Readable(Protocol):
    """What copying needs of a `BlockDevice`."""

    @property
    def size(self) -> int: ...
    def pread_into(self, buffer: memoryview, offset: int) -> None: ...
    def allocation(self, offset: int, length: int) -> Iterator[Allocation]: ...


class ReadMethods(NamedTuple):
    """How a device is best read, from its attributes of these names, or defaults for any device."""

    pread_many: ReadMany | None
    """Reads several parts at once, if every question travels; `pread_covered`, if the device wants the ranges."""
    will_need: WillNeed | None
    """Has the device begin a read before it is waited for, if it can."""
    interrupt: Callable[[], None]
    """Makes a hanging read fail, from any thread."""
    chunk_bytes: int
    spared: Spared
    """The device's current `spared_processors`, to be left to others while it is read."""


def read_methods_of(device: Readable) -> ReadMethods:
    if isinstance(device, Metered):
        return device.methods
    return ReadMethods(
        _read_many_of(device),
        getattr(device, "will_need", None),
        getattr(device, "interrupt", _nothing),
        getattr(device, "chunk_bytes", CHUNK_BYTES),
        partial(getattr, device, "spared_processors", 0),
    )


def _read_many_of(device: Readable) -> ReadMany | None:
    covered: ReadMany | None = getattr(device, "pread_covered", None)
    many: Callable[[Parts], None] | None = getattr(device, "pread_many", None)
    return covered if covered is not None or many is None else lambda parts, _: many(parts)


def _nothing() -> None:
    """Do nothing: the device cannot be interrupted."""


class Metered:
    """A device read no faster than `pace` allows, and how many bytes of it were read."""

    def __init__(self, device: Readable, pace: Pace | None = None) -> None:
        self._device = device
        self._pace = pace
        self._methods = read_methods_of(device)
        self._is_interrupted = threading.Event()
        self.methods = self._methods._replace(interrupt=self._interrupt)
        """The device's methods, metered. Announced reads are metered when they are read."""
        if self._methods.pread_many is not None:
            self.methods = self.methods._replace(pread_many=self._pread_many)
        self.bytes_read = 0
        self._counting = threading.Lock()

    @property
    def size(self) -> int:
        return self._device.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._admit(len(buffer))
        self._device.pread_into(buffer, offset)

    def _pread_many(self, parts: Parts, ranges: Ranges) -> None:
        assert self._methods.pread_many is not None
        self._admit(sum(len(buffer) for buffer, _ in parts))
        self._methods.pread_many(parts, ranges)

    def _interrupt(self) -> None:
        """Interrupt the device, and every thread that waits for its turn to read."""
        self._is_interrupted.set()
        self._methods.interrupt()

    def _admit(self, length: int) -> None:
        if self._pace is not None:
            self._pace.admit(length, self._is_interrupted.wait)
        with self._counting:
            self.bytes_read += length

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self._device.allocation(offset, length)
