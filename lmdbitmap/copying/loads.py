"""Reads a device load by load. A load is data that fits in one buffer, and the ranges of zeroes between.

The device is asked for holes, which are not read unless they cover a block only in part. Other zeroes are found by
comparing, block by block. If every question travels, as to an NBD server, small runs are read without asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.copying.readable import CHUNK_BYTES, Readable, read_methods_of
from lmdbitmap.geometry import Geometry

SMALL_BYTES: Final = CHUNK_BYTES // 4
"""Runs up to this many bytes are not worth a question that travels."""

_MOST_PLACES: Final = 256
"""Ranges in a load: they take memory too."""


class ReadRange(NamedTuple):
    """Bytes of the device. If `zero`, the device says that they are zeroes, and they are not read."""

    offset: int
    length: int
    zero: bool


Load: TypeAlias = "list[ReadRange]"
"""Ascending ranges whose data fits in one buffer."""


class Stretch(NamedTuple):
    """Bytes of the device, at `start` in the buffer; None if they are zeroes."""

    offset: int
    length: int
    start: int | None


class Loads:
    """Reads runs of `blocks`. Data and zeroes are told apart by block: a block is data if any byte of it is.

    One thread plans loads. Any thread reads them, each into a buffer of at least `buffer_bytes`. Each load lies behind
    the one before, and nothing is read twice.
    """

    def __init__(self, device: Readable, blocks: Geometry) -> None:
        self._device = device
        self.methods: Final = read_methods_of(device)
        self._blocks = blocks
        self.buffer_bytes: Final = min(max(self.methods.chunk_bytes, blocks.granularity), blocks.size)
        self._zeroes = bytes(blocks.granularity)

    # -- what to read --------------------------------------------------------------------------------------

    def planned(self, runs: Iterable[Run]) -> Iterator[Load]:
        """Yield loads for all of the ascending runs, without a gap in a run. Raises `OSError` as the device does."""
        load: Load = []
        room = self.buffer_bytes
        for rest in self._places(runs):
            while not rest.zero and rest.length > room:
                if room:
                    load.append(rest._replace(length=room))
                yield load
                rest = rest._replace(offset=rest.offset + room, length=rest.length - room)
                load, room = [], self.buffer_bytes
            load.append(rest)
            room -= 0 if rest.zero else rest.length
            if len(load) >= _MOST_PLACES:
                yield load
                load, room = [], self.buffer_bytes
        if load:
            yield load

    def announce(self, load: Load) -> None:
        """Tell the device that this load will be read, if it wants to know."""
        if self.methods.will_need is not None:
            for offset, length, zero in load:
                if not zero:
                    self.methods.will_need(offset, length)

    def _places(self, runs: Iterable[Run]) -> Iterator[ReadRange]:
        travels = self.methods.pread_many is not None
        for run in runs:
            offset, length = self._blocks.bytes_of(*run)
            if travels and length <= SMALL_BYTES:
                yield ReadRange(offset, length, False)
                continue
            for start, stop, zero in self._parts(run):
                yield ReadRange(*self._blocks.bytes_of(start, stop), zero)

    def _parts(self, run: Run) -> Iterator[tuple[int, int, bool]]:
        """Yield the run in parts (first block, stop, whether the device knows that all of it is zero)."""
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

    # -- reading -------------------------------------------------------------------------------------------

    def read(self, load: Load, buffer: bytearray) -> list[Stretch]:
        """Fill the buffer with the load's data, gapless; return the stretches. Raises `OSError` as the device does."""
        view, filled = memoryview(buffer), 0
        parts: list[tuple[memoryview, int]] = []
        for offset, length, zero in load:
            if not zero:
                parts.append((view[filled : filled + length], offset))
                filled += length
        self._read_parts(parts, load)
        return list(self._stretches(load, buffer))

    def _read_parts(self, parts: list[tuple[memoryview, int]], load: Load) -> None:
        if self.methods.pread_many is not None and parts:
            self.methods.pread_many(parts, list(_ranges(load)))
        else:
            for into, offset in parts:
                self._device.pread_into(into, offset)

    def _stretches(self, load: Load, buffer: bytearray) -> Iterator[Stretch]:
        begin = 0
        for offset, length, zero in load:
            if zero:
                yield Stretch(offset, length, None)
                continue
            for start, stop, is_zero in self._looked_at(buffer, begin, begin + length):
                yield Stretch(offset + start - begin, stop - start, None if is_zero else start)
            begin += length

    def _looked_at(self, buffer: bytearray, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield stretches (start, stop, zero) of the buffer's [begin, end) in blocks; adjacent ones differ."""
        start, was_zero = begin, self._is_zero(buffer, begin, end)
        for position in range(begin + len(self._zeroes), end, len(self._zeroes)):
            zero = self._is_zero(buffer, position, end)
            if zero is not was_zero:
                yield start, position, was_zero
                start, was_zero = position, zero
        yield start, end, was_zero

    def _is_zero(self, buffer: bytearray, start: int, end: int) -> bool:
        """Return whether a block is zero. `startswith` is a memcmp: data that is not zero mostly differs early."""
        stop = start + len(self._zeroes)
        if stop <= end:
            return buffer.startswith(self._zeroes, start, stop)
        return buffer.startswith(self._zeroes[: end - start], start, end)


def _ranges(load: Load) -> Iterator[tuple[int, int]]:
    """Yield the load's ranges from its first data to its last, adjacent ones joined."""
    data = [number for number, place in enumerate(load) if not place.zero]
    begin = end = load[data[0]].offset
    for offset, length, _ in load[data[0] : data[-1] + 1]:
        if offset != end:
            yield begin, end - begin
            begin = offset
        end = offset + length
    yield begin, end - begin
