"""What of a device is data and what reads as zeroes, run by run, in pieces small enough to hold in memory.

Holes are found by asking, and not even read unless they cover a block in part only. Other zeroes are found by
looking, block by block. Where every question travels, as to an NBD server, small runs are read together, and without
asking.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Allocation

CHUNK_BYTES = 1 << 20
"""Read at once, unless a block is larger: what stays in the processor's cache is copied fastest."""

SMALL_BYTES = CHUNK_BYTES // 4
"""Runs up to here are read together with others."""

ReadMany: TypeAlias = Callable[[Sequence[tuple[memoryview, int]]], None]
"""Fills every (buffer, offset), many at a time."""


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
        self._read_many: ReadMany | None = getattr(device, "pread_many", None)
        self.pread_many = None if self._read_many is None else self._pread_many
        """Of a device that has it."""
        self.bytes_read = 0

    @property
    def size(self) -> int:
        return self._device.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._device.pread_into(buffer, offset)
        self.bytes_read += len(buffer)

    def _pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        assert self._read_many is not None
        self._read_many(parts)
        self.bytes_read += sum(len(buffer) for buffer, _ in parts)

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
        self._read_many: ReadMany | None = getattr(device, "pread_many", None)
        self._blocks = blocks
        self._chunk_bytes = max(CHUNK_BYTES, blocks.granularity)
        self._buffer = bytearray(min(self._chunk_bytes, blocks.size))
        self._chunk = memoryview(self._buffer)
        self._zeroes = bytes(blocks.granularity)

    def of_all(self, runs: Iterable[Run]) -> Iterator[Piece]:
        """What `of` says of each of the runs, which ascend."""
        together: list[tuple[int, int]] = []
        for run in runs:
            offset, length = self._blocks.bytes_of(*run)
            if sum(size for _, size in together) + length > len(self._buffer):
                yield from self._of_small(together)
                together = []
            if self._read_many is None or length > SMALL_BYTES:
                yield from self._of_small(together)
                together = []
                yield from self.of(run)
            else:
                together.append((offset, length))
        yield from self._of_small(together)

    def _of_small(self, places: Sequence[tuple[int, int]]) -> Iterator[Piece]:
        """Of (offset, length) that fit into the buffer."""
        if not places:
            return
        ends = itertools.accumulate(length for _, length in places)
        parts = [
            (self._chunk[end - length : end], offset, end)
            for (offset, length), end in zip(places, ends, strict=True)
        ]
        assert self._read_many is not None
        self._read_many([(part, offset) for part, offset, _ in parts])
        for part, offset, end in parts:
            yield from self._pieces_at(offset, end - len(part), end)

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
        self._device.pread_into(self._chunk[:length], offset)
        return self._pieces_at(offset, 0, length)

    def _pieces_at(self, offset: int, begin: int, end: int) -> Iterator[Piece]:
        """Of the buffer's [begin, end), which is at `offset` of the device."""
        for start, stop, zero in self._stretches(begin, end):
            yield Piece(offset + start - begin, stop - start, None if zero else self._chunk[start:stop])

    def _stretches(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (start, stop, zero) of the buffer's [begin, end) in blocks, neighbours differing."""
        start, was_zero = begin, self._is_zero(begin, end)
        for position in range(begin + len(self._zeroes), end, len(self._zeroes)):
            zero = self._is_zero(position, end)
            if zero is not was_zero:
                yield start, position, was_zero
                start, was_zero = position, zero
        yield start, end, was_zero

    def _is_zero(self, start: int, end: int) -> bool:
        """`startswith` is a memcmp: data that is not zero mostly differs early, and costs next to nothing."""
        stop = start + len(self._zeroes)
        if stop <= end:
            return self._buffer.startswith(self._zeroes, start, stop)
        return self._buffer.startswith(self._zeroes[: end - start], start, end)
