"""The first table (L1) of an image, kept as runs of equal entries.

An increment maps next to nothing of a large disk, and a long range of zeroes has one second table for all of it. So a
table of a million entries is a few runs, and a chain of many such images takes next to no memory. If no two neighbours
are equal, it is 12 bytes for each entry instead of 8.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from lmdbitmap.qcow2.layout import OFFSET_MASK, decode_entries

_PAGE_BYTES = 4096
_READ_BYTES = 1 << 20


class _ReadableFile(Protocol):
    def pread(self, length: int, offset: int) -> bytes: ...


class FirstTable:
    """The table of `count` entries at `offset` in the file, which must be that long."""

    def __init__(self, source: _ReadableFile, offset: int, count: int) -> None:
        self._count = count
        self._starts, self._entries = array("I"), array("Q")
        for start in range(0, 8 * count, _READ_BYTES):
            raw = source.pread(min(_READ_BYTES, 8 * count - start), offset + start)
            self._add(raw, start // 8)

    def _add(self, raw: bytes, first: int) -> None:
        for start in range(0, len(raw), _PAGE_BYTES):
            page = raw[start : start + _PAGE_BYTES]
            is_uniform = page == page[:8] * (len(page) // 8)
            self._add_entries(decode_entries(page[:8] if is_uniform else page), first + start // 8)

    def _add_entries(self, entries: array[int], first: int) -> None:
        last = self._entries[-1] if self._entries else None
        for number, entry in enumerate(entries, first):
            if entry != last:
                self._starts.append(number)
                self._entries.append(entry)
                last = entry

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first entry, stop, their value) of entries [first, stop)."""
        place = bisect_right(self._starts, first) - 1
        while first < stop:
            end = min(self._end(place), stop)
            yield first, end, self._entries[place]
            first, place = end, place + 1

    def _end(self, place: int) -> int:
        return self._starts[place + 1] if place + 1 < len(self._starts) else self._count

    def shared(self) -> set[int]:
        """Return the offsets of tables that more than one entry points to."""
        times: Counter[int] = Counter()
        for place, entry in enumerate(self._entries):
            times[entry & OFFSET_MASK] += self._end(place) - self._starts[place]
        return {offset for offset, count in times.items() if count > 1}
