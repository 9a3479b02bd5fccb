"""A snapshot that another process holds, read from the image itself, past that process: it serves a guest meanwhile.

It keeps old data aside before the guest's new data reaches the image, and knows of what (snapshot.py). So each read is

    1. read the image              what comes may be old, new, or torn
    2. ask what was kept           of these bytes, and of holes between (nbd/server/kept_context.py); or fail
    3. read that once more         from where it was kept, through the export
    4. give up                     what was not kept by the answer to 2, what was kept by the reads of 3

and what holds is: **bytes that are answered "not kept" after they were read are old data.**

A write reaches the image only when its clusters' states say "kept", or the snapshot is broken. If step 1 saw a byte
of it, its system call had begun before that of step 1 ended; the states were set before that, by the process that is
asked in step 2, after that. Both sides make system calls in between, and set and look at the states under one
interpreter's lock: nothing can be seen in another order. A snapshot that is broken, released or gone answers with an
error, or not at all. Whatever is given up before the answer, or asked before the read, would break this.

The image is open for reading only. Which of it are holes is asked of the export, whose process judges that as it judges
its own reads. A disk keeps its size while it is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from lmdbitmap.geometry import check_range
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.read_only import ReadOnlyDevice
from lmdbitmap.interfaces import Allocation


class HeldExport(Protocol):
    """A snapshot as its holder exports it: all of it can be read there, old data that was kept too."""

    @property
    def size(self) -> int: ...
    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None: ...
    def allocation(self, offset: int, length: int) -> Iterator[Allocation]: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Question(Protocol):
    """`ask` answers which of (offset, length), read just before, were kept aside; raises where nobody can say."""

    @property
    def guests_are_quiet(self) -> bool:
        """Whether they wanted nothing when it was asked last; False before that."""

    def ask(self, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class DirectDevice(ReadOnlyDevice):
    """The snapshot as a `BlockDevice`, for many threads. All three are its own from now on."""

    chunk_bytes = 4 << 20
    """To be read at once: each question takes the holder from its guest for a moment."""

    def __init__(self, image: FileDevice, export: HeldExport, question: Question) -> None:
        self._image = image
        self._export = export
        self._question = question

    @property
    def spared_processors(self) -> int:
        """For that guest, unless it wants nothing."""
        return 0 if self._question.guests_are_quiet else 1

    @property
    def size(self) -> int:
        return self._export.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.pread_many([(buffer, offset)])

    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        """Fill every (buffer, offset). None overlaps another: a second read may find given up what the first had."""
        self.pread_covered(parts, [(offset, len(buffer)) for buffer, offset in parts])

    def pread_covered(
        self, parts: Sequence[tuple[memoryview, int]], ranges: Sequence[tuple[int, int]]
    ) -> None:
        """The same, of (offset, length) in which the parts lie, and of which the rest is not going to be read.

        Each range is a question, and that costs more than its length. As what was asked about is given up, reading the
        rest nevertheless fails once a guest has written there.
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
        """From any thread: what others wait for fails, and so does all that follows. Close it then."""
        self._question.interrupt()
        self._export.interrupt()

    def close(self) -> None:
        self._question.close()
        self._export.close()
        self._image.close()


def _places(
    parts: Sequence[tuple[memoryview, int]], ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[memoryview, int]]:
    """Where in the buffers of `parts` each of `ranges` belongs, and its offset."""
    for buffer, first in parts:
        end = first + len(buffer)
        for offset, length in ranges:
            begin, stop = max(offset, first), min(offset + length, end)
            if begin < stop:
                yield buffer[begin - first : stop - first], begin
