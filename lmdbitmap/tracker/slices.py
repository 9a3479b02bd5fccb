"""Bitmaps of the store, ORed and read in slices. Each slice is one short read transaction, which looks up anew which
bitmaps to read. So a slow reader never pins an old view of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lmdbitmap import bits
from lmdbitmap.bits import Run
from lmdbitmap.geometry import REGION_BLOCKS, REGION_BYTES, Geometry
from lmdbitmap.storage.tally import GROUP_REGIONS
from lmdbitmap.store import Reader, Store

SLICE_REGIONS = GROUP_REGIONS
"""A slice is one group, because groups are read as a whole."""
SLICE_BLOCKS = SLICE_REGIONS * REGION_BLOCKS
_SLICE_BYTES = SLICE_REGIONS * REGION_BYTES


class Slice(NamedTuple):
    """The dirt of `SLICE_REGIONS` regions from `region` on; `loose` if one of them is armed or damaged."""

    region: int
    dirty: bytearray
    loose: bool

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Yield the dirty blocks as ascending runs, within blocks [start, stop) if given."""
        base = self.region * REGION_BLOCKS
        last = SLICE_BLOCKS if stop is None else min(stop - base, SLICE_BLOCKS)
        for first, end in bits.runs(self.dirty, max(start - base, 0), last):
            yield base + first, base + end

    def is_dirty(self, block: int) -> bool:
        """Whether a block is in the slice, and dirty."""
        position = block - self.region * REGION_BLOCKS
        return 0 <= position < SLICE_BLOCKS and bool(bits.bitmap_view(self.dirty)[position])


def full_slices(geometry: Geometry, start: int = 0, stop: int | None = None) -> Iterator[Slice]:
    """Yield slices of regions [start, stop) in which every block is dirty, in the form of `slices_of`."""
    stop = geometry.region_count if stop is None else stop
    for region in range(start, stop, SLICE_REGIONS):
        yield _clipped(Slice(region, bytearray(b"\xff") * _SLICE_BYTES, loose=False), geometry)


def slices_of(
    store: Store,
    geometry: Geometry,
    bitmap_ids: Callable[[Reader], Sequence[int]],
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Slice]:
    """Yield the slices with dirt, ascending; bits past the disk's end are clear. Raises what `bitmap_ids` raises.

    Of regions [start, stop) only, if given. A slice is longer than they are: what it lacks of them is clean.
    """
    stop = geometry.region_count if stop is None else stop
    while (part := _next(store, bitmap_ids, start, stop)) is not None:
        yield _clipped(part, geometry)
        start = part.region + SLICE_REGIONS


def _next(store: Store, bitmap_ids: Callable[[Reader], Sequence[int]], start: int, stop: int) -> Slice | None:
    with store.read() as reader:
        numbers = bitmap_ids(reader)
        found = [reader.next_group(number, start) for number in numbers]
        present = [max(start, group) for group in found if group is not None]
        if min(present, default=stop) >= stop:
            return None
        part = Slice(min(present), bytearray(_SLICE_BYTES), loose=False)
        loose = [_collect(reader, number, part, stop) for number in numbers]
    return part._replace(loose=any(loose))


def _collect(reader: Reader, bitmap_id: int, part: Slice, stop: int) -> bool:
    """OR a bitmap's records of regions before `stop` into the slice; return whether one is armed or damaged."""
    loose = False
    for region, record in reader.regions(bitmap_id, part.region, min(part.region + SLICE_REGIONS, stop)):
        known = bits.dirty_bits(record.armed, record.bits)
        bits.or_into(part.dirty, known, (region - part.region) * REGION_BYTES)
        loose = loose or record.armed != 0 or record.damaged
    return loose


def _clipped(part: Slice, geometry: Geometry) -> Slice:
    if part.region + SLICE_REGIONS >= geometry.region_count:
        bits.truncate(part.dirty, max(geometry.block_count - part.region * REGION_BLOCKS, 0))
    return part


def runs_of(parts: Iterable[Slice]) -> Iterator[Run]:
    """Yield the dirty blocks as ascending runs, cut where slices end."""
    for part in parts:
        yield from part.runs()
