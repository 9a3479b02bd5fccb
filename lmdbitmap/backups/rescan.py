"""Finds where a disk differs from a backup of it by reading both, when no bitmap can say what changed.

What both know to be zero is not read. Past the end of the shorter one, the other differs unless it is zero. Everything
else is read from both. So `past` is read wherever a restore will later take from it, and can be proven meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from lmdbitmap.bits import Run, joined_runs
from lmdbitmap.copying.readable import Readable
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Allocation
from lmdbitmap.work.buffers import new_buffer

_CHUNK_BYTES: Final = 1 << 20


def differing(
    device: Readable,
    past: Readable,
    clusters: Geometry,
    advance: Callable[[int], None] = lambda length: None,
) -> Iterator[Run]:
    """Yield ascending, non-adjacent runs of `clusters` in which the device differs from `past`.

    `clusters` has the device's size. Calls `advance` with the number of bytes done. Raises what the devices raise.
    """
    comparison = _Comparison(device, past, clusters)
    return joined_runs(comparison.runs(advance))


class _Comparison:
    def __init__(self, device: Readable, past: Readable, clusters: Geometry) -> None:
        self._device = device
        self._past = past
        self._clusters = clusters
        self._chunk_bytes = max(_CHUNK_BYTES, clusters.granularity)
        self._new = new_buffer(self._chunk_bytes)
        self._old = new_buffer(self._chunk_bytes)

    def runs(self, advance: Callable[[int], None]) -> Iterator[Run]:
        """Yield differing clusters; adjacent clusters may come as separate runs."""
        for offset, length, zero in self._stretches():
            if zero:
                advance(length)
                continue
            for at in range(offset, offset + length, self._chunk_bytes):
                count = min(self._chunk_bytes, offset + length - at)
                yield from self._differing(at, count)
                advance(count)

    def _stretches(self) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, whether both are known to be zero) in whole clusters, without a gap."""
        size, position = self._clusters.size, 0
        for start, stop in self._zero_in_both():
            zero = self._clusters.blocks_inward(start, stop - start)
            offset, length = self._clusters.bytes_of(zero.start, zero.stop)
            if not zero:
                continue
            if position < offset:
                yield position, offset - position, False
            yield offset, length, True
            position = offset + length
        if position < size:
            yield position, size - position, False

    def _zero_in_both(self) -> Iterator[tuple[int, int]]:
        """Yield ascending byte ranges [start, stop) that are zero in both."""
        theirs = _zeroes(self._past, self._clusters.size)
        old_start, old_stop = next(theirs, _NOWHERE)
        for start, stop in _zeroes(self._device, self._clusters.size):
            while old_stop <= start:
                old_start, old_stop = next(theirs, _NOWHERE)
            while old_start < stop:
                yield max(start, old_start), min(stop, old_stop)
                if old_stop > stop:
                    break
                old_start, old_stop = next(theirs, _NOWHERE)

    def _differing(self, offset: int, length: int) -> Iterator[Run]:
        """Read both and yield differing clusters. All are compared at once first, as most are alike."""
        new, old = memoryview(self._new)[:length], memoryview(self._old)[:length]
        self._device.pread_into(new, offset)
        kept = max(min(self._past.size - offset, length), 0)
        if kept:
            self._past.pread_into(old[:kept], offset)
        old[kept:] = bytes(length - kept)
        if self._new.startswith(old):
            return
        size, first = self._clusters.granularity, offset >> self._clusters.granularity_bits
        for number, at in enumerate(range(0, length, size), first):
            stop = min(at + size, length)
            if not self._new.startswith(old[at:stop], at, stop):
                yield number, number + 1


_NOWHERE: Final = (1 << 64, 1 << 64)


def _zeroes(device: Readable, size: int) -> Iterator[tuple[int, int]]:
    """Yield byte ranges [start, stop) below `size` that read as zeroes. All past the device's end counts as zero."""
    start = stop = 0
    for position, part in _placed(device, min(device.size, size)):
        if not part.zero:
            continue
        if position != stop:
            if start < stop:
                yield start, stop
            start = position
        stop = position + part.length
    if device.size < size:
        if stop != device.size:
            if start < stop:
                yield start, stop
            start = device.size
        stop = size
    if start < stop:
        yield start, stop


def _placed(device: Readable, size: int) -> Iterator[tuple[int, Allocation]]:
    position = 0
    for part in device.allocation(0, size):
        yield position, part
        position += part.length
