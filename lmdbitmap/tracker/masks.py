"""Pieces of regions, and masks of their extents: bit e of a mask is extent e of its region."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BLOCKS, REGION_EXTENTS

Piece: TypeAlias = tuple[int, int, int]
"""(region, start, stop): blocks [start, stop) of one region, counted from the region's first."""
ALL_EXTENTS: Final = (1 << REGION_EXTENTS) - 1


def pieces(start: int, stop: int) -> Iterator[Piece]:
    """Yield blocks [start, stop) of the disk, cut at the borders of regions."""
    while start < stop:
        region, first = divmod(start, REGION_BLOCKS)
        length = min(stop - start, REGION_BLOCKS - first)
        yield region, first, first + length
        start += length


def touched(start: int, stop: int) -> int:
    """Return the mask of extents that blocks [start, stop) of a region touch."""
    first, last = start // EXTENT_BLOCKS, (stop - 1) // EXTENT_BLOCKS
    return ((2 << (last - first)) - 1) << first


def at_edges(start: int, stop: int) -> int:
    """Return the mask of extents at the edges that blocks [start, stop) of a region touch but do not cover."""
    mask = 0
    if start % EXTENT_BLOCKS:
        mask |= 1 << start // EXTENT_BLOCKS
    if stop % EXTENT_BLOCKS:
        mask |= 1 << stop // EXTENT_BLOCKS
    return mask


def ahead(stop: int, count: int) -> int:
    """Return the mask of the region's next `count` extents, from the extent of block `stop` on."""
    return (((1 << count) - 1) << stop // EXTENT_BLOCKS) & ALL_EXTENTS


def extents_of(mask: int) -> Iterator[int]:
    """Yield the numbers of the extents of a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
