"""Reads a snapshot that another process holds from the image itself, past that process, which serves a guest meanwhile.

That process keeps old data aside before the guest's new data reaches the image, and knows what it kept (snapshot.py).
Each read takes four steps:

    1. read the image              the bytes may be old, new, or torn
    2. ask what was kept           of these bytes, and of holes between (nbd/server/kept_context.py); or fail
    3. read that once more         from where it was kept, through the export
    4. give up                     what was not kept by the answer to 2, what was kept by the reads of 3

Invariant: **bytes that are answered "not kept" after they were read are old data.**

A write reaches the image only after the states of its clusters say "kept", or the snapshot is broken. If step 1 saw a
byte of a write, that write's system call had begun before step 1's ended. The states were set before that write. The
process that set them is asked in step 2, after the read. Both sides make system calls in between, and set and look at
the states under one interpreter's lock, so nothing can be seen in another order. A snapshot that is broken, released or
gone answers with an error, or not at all. To give anything up before the answer, or to ask before the read, would break
this.

The image is open for reading only. The export is asked which parts of it are holes; its process judges that as it
judges its own reads. A disk keeps its size while it is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from lmdbitmap.geometry import check_range
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.read_only import ReadOnlyDevice
from lmdbitmap.interfaces import Allocation


class HeldExport(Protocol):
    """A snapshot as its holder exports it. All of it can be read there, including old data that was kept."""

    @property
    def size(self) -> int: ...
    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None: ...
    def allocation(self, offset: int, length: int) -> Iterator[Allocation]: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Question(Protocol):
    """`ask` returns which of (offset, length), read just before, were kept aside; raises if that cannot be known."""

    @property
    def guests_are_quiet(self) -> bool:
        """Whether the guests wanted nothing when `ask` was last called; False before that."""

    def ask(self, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class DirectDevice(ReadOnlyDevice):
    """The snapshot as a `BlockDevice`, for many threads. It owns the image, the export and the question from now on."""

    chunk_bytes = 4 << 20
    """Bytes to read at once. Each question interrupts the holder's work for its guest for a moment."""

    def __init__(self, image: FileDevice, export: HeldExport, question: Question) -> None:
        self._image = image
        self._export = export
        self._question = question

    @property
    def spared_processors(self) -> int:
        """Processors to leave to that guest: none if it wants nothing."""
        return 0 if self._question.guests_are_quiet else 1

    @property
    def size(self) -> int:
        return self._export.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.pread_many([(buffer, offset)])

    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        """Fill every (buffer, offset). No two may overlap: the first read may give up what a second one needs."""
        self.pread_covered(parts, [(offset, len(buffer)) for buffer, offset in parts])

    def pread_covered(
        self, parts: Sequence[tuple[memoryview, int]], ranges: Sequence[tuple[int, int]]
    ) -> None:
        """Fill every (buffer, offset). The parts lie in `ranges`, (offset, length), of which nothing else will be read.

        Each range is one question, which costs more than its length. The bytes asked about are given up, so reading the
        rest of a range later fails once a guest has written there.
        """
        for buffer, offset in parts:
            check_range(offset, len(buffer), self.size)
            self._image.pread_into(buffer, offset)
        kept = self._question.ask(ranges)
        if kept and (again := list(_places(parts, kept))):
            self._export.pread_many(again)

    def will_need(self, offset: int, length: int) -> None:
        self._image.will_need(offset, length)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self._export.allocation(offset, length)

    def interrupt(self) -> None:
        """Make waiting reads and all later ones fail. Called from any thread; close the device then."""
        self._question.interrupt()
        self._export.interrupt()

    def close(self) -> None:
        self._question.close()
        self._export.close()
        self._image.close()


def _places(
    parts: Sequence[tuple[memoryview, int]], ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[memoryview, int]]:
    """Yield the piece of a buffer of `parts` where each of `ranges` belongs, and its offset."""
    for buffer, first in parts:
        end = first + len(buffer)
        for offset, length in ranges:
            begin, stop = max(offset, first), min(offset + length, end)
            if begin < stop:
                yield buffer[begin - first : stop - first], begin
