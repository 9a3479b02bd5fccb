"""Decides which extents a commit arms, and which it disarms to make room for them.

The records of a commit carry the exact bits of its blocks. So an extent is armed only where more writes are likely.
What is decided here is not durable yet: the period commits it first (period.py), under whose lock all of this runs.

`arming` maps regions to masks of extents, as in armed.py.
"""

from __future__ import annotations

from typing import Final

from lmdbitmap.bits import BitView
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BLOCKS, REGION_EXTENTS
from lmdbitmap.tracker import masks
from lmdbitmap.tracker.armed import ArmedExtents
from lmdbitmap.tracker.masks import Piece

MOST_REGIONS: Final = 1024
"""Regions in which something is armed: a checkpoint may have to write their records while writers wait."""
_AHEAD_EXTENTS: Final = 8
_DENSE_EXTENTS: Final = 16
"""Armed extents of a region from which on writes all over it are likely."""


def worth_arming(piece: Piece, settled: BitView) -> int:
    """Return the extents that the piece covers in part and, where blocks are written in sequence, the next ones."""
    region, start, stop = piece
    mask = masks.at_edges(start, stop)
    return mask | masks.ahead(stop, _AHEAD_EXTENTS) if _continues(region, start, stop, settled) else mask


def _continues(region: int, start: int, stop: int, settled: BitView) -> bool:
    """Whether a write that enters an extent at its start goes on where earlier ones stopped."""
    enters = start % EXTENT_BLOCKS == 0 or start // EXTENT_BLOCKS < (stop - 1) // EXTENT_BLOCKS
    block = region * REGION_BLOCKS + start
    return enters and block > 0 and bool(settled[block - 1])


def add_dense_regions(armed: ArmedExtents, arming: dict[int, int]) -> None:
    """Add the rest of regions of which much is armed, as long as less than half of the limit is in use.

    Writes at random places all over a disk would otherwise need a commit for each extent.
    """
    room = armed.most // 2 - len(armed) - sum(map(int.bit_count, arming.values()))
    for region, mask in arming.items():
        rest = masks.ALL_EXTENTS & ~(armed.mask(region) | mask)
        if REGION_EXTENTS - rest.bit_count() >= _DENSE_EXTENTS and rest.bit_count() <= room:
            arming[region] = mask | rest
            room -= rest.bit_count()


def make_room(armed: ArmedExtents, arming: dict[int, int]) -> set[int]:
    """Disarm extents until `arming` fits the limits; return their regions, whose records have to be written.

    First go those where a record is written anyway, then the quietest: if it is regions that are too many, all of their
    regions. What still does not fit is taken out of `arming`.
    """
    excess = len(armed) + sum(map(int.bit_count, arming.values())) - armed.most
    new = sum(1 for region, mask in arming.items() if mask and not armed.mask(region))
    crowd = len(armed.regions) + new - MOST_REGIONS
    disarmed = set()
    for region in list(arming):
        if excess <= 0:
            break
        old = armed.mask(region) & ~arming[region]
        armed.disarm(region, old)
        excess -= old.bit_count()
    while (excess > 0 or crowd > 0) and (victim := armed.longest_quiet()) is not None:
        region, extent = victim
        mask = armed.mask(region) if crowd > 0 else 1 << extent
        armed.disarm(region, mask)
        disarmed.add(region)
        excess -= mask.bit_count()
        crowd -= not (armed.mask(region) or arming.get(region))
    while excess > 0 or crowd > 0:
        _, mask = arming.popitem()
        excess -= mask.bit_count()
        crowd -= mask != 0
    return disarmed
