"""Corrects a target by reading it and writing only the pages that differ.

So a target that is nearly right is hardly written, a tracked one gets no more dirt than needed, and a killed run goes
on where it was. Zeroes that the target knows of are not even read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lmdbitmap.images.device import PAGE_BYTES
from lmdbitmap.interfaces import Allocation
from lmdbitmap.targets.target import Target
from lmdbitmap.work.buffers import new_buffer

CHUNK_BYTES = 1 << 20
"""Bytes in our memory at once."""
_COARSE_BYTES = 1 << 16
_ZEROES = bytes(CHUNK_BYTES)


class Mender:
    """Corrects a target, for one thread.

    `bytes_compared` were read of the target; `bytes_written` were data and `bytes_zeroed` zeroes that it did not have.
    `advance` is called with the number of bytes that are right now.
    """

    def __init__(self, target: Target, advance: Callable[[int], None] = lambda length: None) -> None:
        self._target = target
        self._advance = advance
        self._present = new_buffer(CHUNK_BYTES)
        self.bytes_compared = self.bytes_written = self.bytes_zeroed = 0

    def mend_data(self, offset: int, wanted: bytes | bytearray, length: int) -> None:
        """Make the target hold the first `length` bytes of `wanted`, a chunk at most, at `offset`."""
        self._read(offset, length)
        whole = memoryview(wanted)
        writes = [
            (offset + start, whole[start:stop]) for start, stop in differences(wanted, self._present, length)
        ]
        if writes:
            self._target.write_many(writes)
        self.bytes_written += sum(len(data) for _, data in writes)
        self._advance(length)

    def mend_zeroes(self, offset: int, length: int) -> None:
        for start, part in allocated(self._target, offset, length):
            if part.zero:
                self._advance(part.length)
            else:
                for piece in chunks(start, start + part.length):
                    self._mend_zeroes(*piece)

    def _mend_zeroes(self, offset: int, length: int) -> None:
        self._read(offset, length)
        for start, stop in differences(_ZEROES, self._present, length):
            self._target.write_zeroes(offset + start, stop - start)
            self.bytes_zeroed += stop - start
        self._advance(length)

    def _read(self, offset: int, length: int) -> None:
        self._target.pread_into(memoryview(self._present)[:length], offset)
        self.bytes_compared += length


def allocated(target: Target, offset: int, length: int) -> Iterator[tuple[int, Allocation]]:
    """Yield (offset, part) of all of a range. Bytes already yielded may be changed meanwhile."""
    for part in target.allocation(offset, length):
        yield offset, part
        offset += part.length


def chunks(offset: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield [offset, end) as (offset, length) of pieces that end on multiples of a chunk."""
    while offset < end:
        stop = min(end, offset - offset % CHUNK_BYTES + CHUNK_BYTES)
        yield offset, stop - offset
        offset = stop


def differences(one: bytes | bytearray, other: bytes | bytearray, length: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges (start, stop) of the first `length` bytes that differ. None touch another.

    They are whole pages; only the last may be short.
    """
    if one == other or not length:
        return
    begun = None
    for coarse in range(0, length, _COARSE_BYTES):
        end = min(coarse + _COARSE_BYTES, length)
        alike = one[coarse:end] == other[coarse:end]
        for page in range(coarse, end, end - coarse if alike else PAGE_BYTES):
            stop = min(page + PAGE_BYTES, end)
            if alike or one[page:stop] == other[page:stop]:
                if begun is not None:
                    yield begun, page
                    begun = None
            elif begun is None:
                begun = page
    if begun is not None:
        yield begun, length
