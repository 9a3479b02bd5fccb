"""Copies a device into an image, load by load: each is carried all the way by one thread of a gang (gang.py).

    read a load ─▶ in turn: its place in the image, and its hashers ─▶ write it and hash it

Reading, writing and hashing release Python's lock, and a load is written and hashed while it is in that processor's
cache. Loads take turns only to find their places, in the order of the disk, so that the image is the same for any
number of carriers.
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
"""Called with the number of bytes of the device that are done, in the caller's thread; what it raises ends the work."""
Part: TypeAlias = "tuple[int, memoryview, Callable[[], None]]"
"""Offset in the image, the data for it, and the function that hashes the data."""


class Hashing(Protocol):
    """Computes digests of the file while it is filled."""

    def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
        """Announce the file's next bytes. The function returned hashes them when there is time."""

    def wrote(self, offset: int, length: int) -> None:
        """Note that the file has these bytes."""


class ImageSink(WritableFile, Protocol):
    """The image file, written to by many threads; its errors name the `place`."""

    @property
    def place(self) -> str: ...


class Shelf:
    """A sink that keeps parts of the image, and their offsets, until there is time to write them."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Buffer]] = []

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._parts.append((offset, data))

    def cleared(self) -> list[tuple[int, memoryview]]:
        """Return and forget all parts, in the order of the file, but the header last: without it there is no image."""
        parts, self._parts = sorted(self._parts, key=lambda part: (part[0] == 0, part[0])), []
        return [(offset, memoryview(data)) for offset, data in parts]


class Carriers:
    """Fills `image` with what `writer` maps; the writer puts its own parts on the `shelf`. For one call of `carry`."""

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
        """Copy the ascending runs. On return all is written, and all its threads have ended.

        After a failure the device was interrupted, if it can be, and is unusable.
        """
        told = 0

        def tell() -> None:
            nonlocal told
            told, before = self.bytes_changed, told
            advance(told - before)

        self._gang.do(self._announced(runs), tell)

    def finish(self) -> int:
        """Complete the image; return its size in bytes."""
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
        """Find each stretch its place in the image. Neighbours in the buffer are mostly neighbours there."""
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
