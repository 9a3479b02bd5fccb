"""Copies a device into an image, load by load: each is carried all the way by one thread of a gang (gang.py).

    read a load ─▶ in turn: its place in the image, and its hashers ─▶ write it and hash it

To read, to write and to hash let go of Python's lock, and what was read is written and hashed while it is in that
processor's cache. Only to find their places do loads take turns, in the order of the disk, so that the image is the
same however many carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.copying.loads import Load, Loads, Stretch
from lmdbitmap.errors import os_errors_at
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2 import Qcow2Writer, WritableFile
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.gang import Gang, Work

Advance: TypeAlias = Callable[[int], None]
"""Called with bytes of the device that were done, in the caller's thread; what it raises ends the work."""
Part: TypeAlias = "tuple[int, memoryview, Callable[[], None]]"
"""What the image is to have, where, and what hashes it."""


class Hashing(Protocol):
    """Computes digests of the file while it is filled."""

    def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
        """The file will have these bytes, which are told in its order; what it answers is called when there is time."""

    def wrote(self, offset: int, length: int) -> None:
        """The file has these bytes."""


class ImageSink(WritableFile, Protocol):
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
    """Fills `image` with what `writer` maps, which puts all its own on the `shelf`. For one call of `carry`."""

    def __init__(
        self, loads: Loads, writer: Qcow2Writer, shelf: Shelf, image: ImageSink, hashing: Hashing
    ) -> None:
        self._loads = loads
        self._writer = writer
        self._shelf = shelf
        self._image = image
        self._hashing = hashing
        self._gang: Gang[Load] = Gang(
            self._new_carrier, spared=loads.methods.spared, interrupt=loads.methods.interrupt
        )
        self.bytes_changed = 0
        self.bytes_zero = 0

    def carry(self, runs: Iterable[Run], advance: Advance) -> None:
        """Copy the runs, which ascend. All is written when it returns, and no thread of it is left.

        After a failure the device was interrupted, if it can be, and is of no use.
        """
        told = 0

        def tell() -> None:
            nonlocal told
            told, before = self.bytes_changed, told
            advance(told - before)

        self._gang.do(self._announced(runs), tell)

    def finish(self) -> int:
        """Complete the image; answer its size in bytes."""
        size = self._writer.finish()
        self._put_away(self._shelved())
        return size

    def _announced(self, runs: Iterable[Run]) -> Iterator[Load]:
        for load in self._loads.planned(runs):
            self._loads.announce(load)
            yield load

    def _new_carrier(self) -> Work[Load]:
        return partial(self._carry, new_buffer(self._loads.buffer_bytes))

    def _carry(self, buffer: bytearray, number: int, load: Load) -> None:
        stretches = self._loads.read(load, buffer)
        with self._gang.in_turn(number):
            parts = self._placed(stretches, memoryview(buffer))
        self._put_away(parts)

    def _placed(self, stretches: Iterable[Stretch], view: memoryview) -> list[Part]:
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

    def _shelved(self) -> list[Part]:
        return [
            (offset, data, self._hashing.feed(offset, data))
            for offset, data in self._shelf.cleared()
            if len(data)
        ]

    def _put_away(self, parts: Iterable[Part]) -> None:
        for offset, data, hash_it in parts:
            self._image.pwrite(data, offset)
            with os_errors_at(self._image.place):
                hash_it()
