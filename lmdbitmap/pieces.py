"""What of a device is data and what reads as zeroes, run by run, in pieces small enough to hold in memory.

Holes are found by asking, and not even read unless they cover a block in part only. Other zeroes are found by
looking, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from lmdbitmap.bits import Run
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Allocation

CHUNK_BYTES = 1 << 20
"""Read at once, unless a block is larger: what stays in the processor's cache is copied fastest."""


class Readable(Protocol):
    """What copying a device takes of a `BlockDevice`."""

    @property
    def size(self) -> int: ...
    def pread_into(self, buffer: memoryview, offset: int) -> None: ...
    def allocation(self, offset: int, length: int) -> Iterator[Allocation]: ...


class Metered:
    """A device, and how much of it was read."""

    def __init__(self, device: Readable) -> None:
        self._device = device
        self.bytes_read = 0

    @property
    def size(self) -> int:
        return self._device.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._device.pread_into(buffer, offset)
        self.bytes_read += len(buffer)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self._device.allocation(offset, length)


class Piece(NamedTuple):
    """Bytes of the device; `data` is None where they are zeroes, and else holds them until the next piece comes."""

    offset: int
    length: int
    data: memoryview | None


class Pieces:
    """Reads runs of `blocks`, which are as large as what is told apart: a block is data if any byte of it is."""

    def __init__(self, device: Readable, blocks: Geometry) -> None:
        self._device = device
        self._blocks = blocks
        self._chunk_bytes = max(CHUNK_BYTES, blocks.granularity)
        self._buffer = bytearray(min(self._chunk_bytes, blocks.size))
        self._zeroes = bytes(blocks.granularity)

    def of(self, run: Run) -> Iterator[Piece]:
        """The run without a gap, ascending. Raises `OSError` as the device does."""
        for start, stop, zero in self._parts(run):
            offset, length = self._blocks.bytes_of(start, stop)
            if zero:
                yield Piece(offset, length, None)
            else:
                for position in range(offset, offset + length, self._chunk_bytes):
                    yield from self._read(position, min(self._chunk_bytes, offset + length - position))

    def _parts(self, run: Run) -> Iterator[tuple[int, int, bool]]:
        """The run in parts (first block, stop, whether the device knows that all of it is zero)."""
        position, stop = run
        offset, length = self._blocks.bytes_of(position, stop)
        for part in self._device.allocation(offset, length):
            zero = self._blocks.blocks_inward(offset, part.length) if part.zero else range(0)
            if zero:
                if position < zero.start:
                    yield position, zero.start, False
                yield zero.start, zero.stop, True
                position = zero.stop
            offset += part.length
        if position < stop:
            yield position, stop, False

    def _read(self, offset: int, length: int) -> Iterator[Piece]:
        chunk = memoryview(self._buffer)[:length]
        self._device.pread_into(chunk, offset)
        for start, stop, zero in self._stretches(length):
            yield Piece(offset + start, stop - start, None if zero else chunk[start:stop])

    def _stretches(self, length: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (start, stop, zero) of the buffer's first `length` bytes in blocks, neighbours differing."""
        start, was_zero = 0, self._is_zero(0, length)
        for position in range(len(self._zeroes), length, len(self._zeroes)):
            zero = self._is_zero(position, length)
            if zero is not was_zero:
                yield start, position, was_zero
                start, was_zero = position, zero
        yield start, length, was_zero

    def _is_zero(self, start: int, length: int) -> bool:
        """`startswith` is a memcmp: data that is not zero mostly differs early, and costs next to nothing."""
        stop = start + len(self._zeroes)
        if stop <= length:
            return self._buffer.startswith(self._zeroes, start, stop)
        return self._buffer.startswith(self._zeroes[: length - start], start, length)
