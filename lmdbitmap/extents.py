"""The answer to a query: sorted byte ranges, each dirty or clean, each known to read as zeroes or not.

*dirty* and *zero* are independent facts: a trimmed block is both. To forget either one loses data or copies needlessly.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Trust(enum.Enum):
    """How far an answer can be believed. Nothing unknown is ever reported as clean."""

    EXACT = "exact"
    SUPERSET = "superset"
    """Safe, but may name clean blocks as dirty, as after a crash."""
    UNTRUSTED = "untrusted"
    """The bitmap is worth nothing: everything counts as dirty and a full backup is needed."""

    def worse(self, other: Trust) -> Trust:
        return max(self, other, key=_TRUST_ORDER.index)


_TRUST_ORDER = [Trust.EXACT, Trust.SUPERSET, Trust.UNTRUSTED]


class Extent(NamedTuple):
    """Bytes [offset, offset + length) of a disk."""

    offset: int
    length: int
    dirty: bool
    zero: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours that touch and agree; drop empty ones. Input is sorted and does not overlap."""
    last: Extent | None = None
    for extent in extents:
        if extent.length == 0:
            continue
        if last is not None and last.end == extent.offset and last[2:] == extent[2:]:
            last = last._replace(length=last.length + extent.length)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def with_zeroes(extents: Iterable[Extent], zeroes: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """Split `extents` at the ends of the sorted (offset, length) ranges `zeroes`, and set `zero` inside these."""
    holes = iter(zeroes)
    hole = next(holes, None)
    for extent in extents:
        position = extent.offset
        while position < extent.end:
            while hole is not None and hole[0] + hole[1] <= position:
                hole = next(holes, None)
            if hole is None or hole[0] >= extent.end:
                yield Extent(position, extent.end - position, extent.dirty, extent.zero)
                break
            inside = hole[0] <= position
            stop = min(extent.end, hole[0] + hole[1] if inside else hole[0])
            yield Extent(position, stop - position, extent.dirty, inside or extent.zero)
            position = stop
