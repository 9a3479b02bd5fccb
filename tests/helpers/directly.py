"""A snapshot of this process, read as another one reads it: from the image, with somebody who acts in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import Allocation
from lmdbitmap.tracker.snapshot import Snapshot

STEPS = ("read", "ask", "read again", "end")
"""What comes next when somebody acts."""

Between = Callable[[str], None]


def directly(snapshot: Snapshot, image: Path, between: Between = lambda step: None) -> DirectDevice:
    """`between` is called before each of the steps, and after the last one: with what comes next, one of `STEPS`."""
    opened = _Image.open(image, read_only=True, share_writes=True)
    assert isinstance(opened, _Image)
    opened.between = between
    return DirectDevice(opened, _Export(snapshot, between), _Question(snapshot, between))


class _Image(FileDevice):
    between: Between

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.between("read")
        super().pread_into(buffer, offset)


class _Question:
    guests_are_quiet = False

    def __init__(self, snapshot: Snapshot, between: Between) -> None:
        self._snapshot = snapshot
        self._between = between

    def ask(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        self._between("ask")
        kept = [part for offset, length in ranges for part in self._kept(offset, length)]
        self._between("read again" if kept else "end")
        return kept

    def _kept(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for size, is_kept in self._snapshot.kept(offset, length):
            if is_kept:
                yield offset, size
            offset += size

    def interrupt(self) -> None:
        """Nothing here waits."""

    def close(self) -> None:
        """The snapshot is its holder's."""


class _Export:
    def __init__(self, snapshot: Snapshot, between: Between) -> None:
        self._snapshot = snapshot
        self._between = between

    @property
    def size(self) -> int:
        return self._snapshot.size

    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        for buffer, offset in parts:
            self._snapshot.pread_into(buffer, offset)
        self._between("end")

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self._snapshot.allocation(offset, length)

    def interrupt(self) -> None:
        """Nothing here waits."""

    def close(self) -> None:
        """The snapshot is its holder's."""
