"""Finds where a disk differs from a backup of it by reading both, when no bitmap can say what changed.

What both know to be zero is not read. Past the end of the shorter one, the other differs unless it is zero. Everything
else is read from both. So `past` is read wherever a restore will later take from it, and can be proven meanwhile.

The same is done in part of a disk whose bitmap says too much, as after a crash (`sifted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from lmdbitmap.bits import Run, joined_runs
from lmdbitmap.copying.readable import Readable
from lmdbitmap.geometry import Geometry, ceil_div
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
    comparison = _Comparison(device, past, clusters, advance)
    return joined_runs(comparison.runs(0, clusters.block_count))


def sifted(
    runs: Iterable[Run],
    device: Readable,
    past: Readable,
    clusters: Geometry,
    extent_bytes: int,
    advance: Callable[[int], None] = lambda length: None,
) -> Iterator[Run]:
    """Yield `runs`, ascending runs of `clusters`, without what is the same in `past`: ascending and not adjacent.

    Only extents that are dirty as a whole are compared: a crash makes whole ones dirty, and the rest was written to.
    """
    comparison = _Comparison(device, past, clusters, advance)
    return joined_runs(_sifted(runs, comparison, max(extent_bytes >> clusters.granularity_bits, 1)))


def _sifted(runs: Iterable[Run], comparison: _Comparison, extent: int) -> Iterator[Run]:
    """`extent` is in clusters."""
    last = comparison.clusters.block_count
    for start, stop in runs:
        first = min(ceil_div(start, extent) * extent, stop)
        end = stop if stop == last else max(stop // extent * extent, first)
        yield comparison.passed(start, first)
        yield from comparison.runs(first, end)
        yield comparison.passed(end, stop)


class _Comparison:
    def __init__(
        self, device: Readable, past: Readable, clusters: Geometry, advance: Callable[[int], None]
    ) -> None:
        self.clusters = clusters
        self._device = device
        self._past = past
        self._advance = advance
        self._chunk_bytes = max(_CHUNK_BYTES, clusters.granularity)
        self._new = new_buffer(self._chunk_bytes)
        self._old = new_buffer(self._chunk_bytes)

    def passed(self, first: int, last: int) -> Run:
        """Return the run of clusters [first, last) as it is."""
        self._advance(self.clusters.bytes_of(first, last)[1])
        return first, last

    def runs(self, first: int, last: int) -> Iterator[Run]:
        """Yield differing clusters of [first, last); adjacent clusters may come as separate runs."""
        for offset, length, zero in self._stretches(first, last):
            if zero:
                self._advance(length)
                continue
            for at in range(offset, offset + length, self._chunk_bytes):
                count = min(self._chunk_bytes, offset + length - at)
                yield from self._differing(at, count)
                self._advance(count)

    def _stretches(self, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, whether both are known to be zero) in whole clusters, without a gap."""
        position, length = self.clusters.bytes_of(first, last)
        end = position + length
        for start, stop in self._zero_in_both(position, end):
            zero = self.clusters.blocks_inward(start, stop - start)
            offset, length = self.clusters.bytes_of(zero.start, zero.stop)
            if not zero:
                continue
            if position < offset:
                yield position, offset - position, False
            yield offset, length, True
            position = offset + length
        if position < end:
            yield position, end - position, False

    def _zero_in_both(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield ascending byte ranges [start, stop) of [begin, end) that are zero in both."""
        theirs = _zeroes(self._past, begin, end)
        old_start, old_stop = next(theirs, _NOWHERE)
        for start, stop in _zeroes(self._device, begin, end):
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
        size, first = self.clusters.granularity, offset >> self.clusters.granularity_bits
        for number, at in enumerate(range(0, length, size), first):
            stop = min(at + size, length)
            if not self._new.startswith(old[at:stop], at, stop):
                yield number, number + 1


_NOWHERE: Final = (1 << 64, 1 << 64)


def _zeroes(device: Readable, begin: int, end: int) -> Iterator[Run]:
    """Yield byte ranges [start, stop) of [begin, end) that read as zeroes. All past the device's end counts as zero."""
    return joined_runs(_parts_that_are_zero(device, begin, end))


def _parts_that_are_zero(device: Readable, begin: int, end: int) -> Iterator[Run]:
    position, known = begin, min(device.size, end)
    if position < known:
        for part in device.allocation(position, known - position):
            if part.zero:
                yield position, position + part.length
            position += part.length
    yield max(begin, device.size), end
