"""The armed extents of an open period, how long each has had no new dirt, and which extents were armed before.

The period decides when an extent may be armed, and what must be durable then (period.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set

from lmdbitmap.bits import BitView
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_EXTENTS
from lmdbitmap.tracker.masks import extents_of


class ArmedExtents:
    """At most `most` armed extents. An extent is (region, number in it); a mask has a bit per extent of a region.

    `dirt` has a bit per block of the disk. Not thread-safe: the caller holds a lock.
    """

    def __init__(self, most: int, dirt: BitView) -> None:
        self.most = most
        self._dirt = dirt
        self._masks: dict[int, int] = {}
        """Masks by region; a region with nothing armed is absent."""
        self._last_dirt: OrderedDict[int, int] = OrderedDict()
        """Every armed extent with the pass that saw its last new dirt, longest quiet first."""
        self._before: OrderedDict[int, None] = OrderedDict()
        """Extents with dirt that are no longer armed, latest last; no more than `likely` can use."""
        self._pass_number = 0

    def __len__(self) -> int:
        return len(self._last_dirt)

    @property
    def regions(self) -> Set[int]:
        """The regions in which an extent is armed."""
        return self._masks.keys()

    def mask(self, region: int) -> int:
        return self._masks.get(region, 0)

    def arm(self, region: int, mask: int) -> None:
        """Arm extents, which get new dirt now."""
        if mask:
            self._masks[region] = self.mask(region) | mask
            self.touch(region, extents_of(mask))
            for extent in extents_of(mask):
                self._before.pop(region * REGION_EXTENTS + extent, None)

    def touch(self, region: int, extents: Iterable[int]) -> None:
        """Note that armed extents get new dirt."""
        for extent in extents:
            number = region * REGION_EXTENTS + extent
            self._last_dirt[number] = self._pass_number
            self._last_dirt.move_to_end(number)

    def disarm(self, region: int, mask: int) -> None:
        """Disarm extents; those that are not armed are left out."""
        left = self.mask(region) & ~mask
        for extent in extents_of(self.mask(region) & mask):
            del self._last_dirt[region * REGION_EXTENTS + extent]
            self._remember(region, extent)
        if left:
            self._masks[region] = left
        else:
            self._masks.pop(region, None)

    def disarm_all(self) -> None:
        """Disarm all extents, the longest quiet first."""
        while self._last_dirt:
            region, extent = self._first()
            self.disarm(region, 1 << extent)

    def forget_all(self) -> None:
        """Forget which extents are and were armed: the period has ended."""
        self._masks.clear()
        self._last_dirt.clear()
        self._before.clear()

    def longest_quiet(self, passes: int = 0) -> tuple[int, int] | None:
        """Return the extent without new dirt for longest, if that is for `passes` passes or more.

        If more than half of the limit is armed, one pass is enough.
        """
        if not self._last_dirt:
            return None
        enough = passes if len(self) <= self.most // 2 else min(passes, 1)
        quiet = self._pass_number - next(iter(self._last_dirt.values()))
        return self._first() if quiet >= enough else None

    def end_pass(self) -> None:
        self._pass_number += 1

    def likely(self) -> dict[int, int]:
        """Return masks by region of where dirt is likely next, likeliest last: extents that are armed, or were before.

        Earlier ones are added up to half of the limit in total: up to that, passes are patient.
        """
        before = list(self._before)
        room = max(self.most // 2 - len(self), 0)
        likely: dict[int, int] = {}
        for number in (*before[max(len(before) - room, 0) :], *self._last_dirt):
            region, extent = divmod(number, REGION_EXTENTS)
            likely[region] = likely.pop(region, 0) | 1 << extent
        return likely

    def _first(self) -> tuple[int, int]:
        return divmod(next(iter(self._last_dirt)), REGION_EXTENTS)

    def _remember(self, region: int, extent: int) -> None:
        """Remember an extent that was armed, unless it was armed because dirt was likely and got none."""
        number = region * REGION_EXTENTS + extent
        first = number * EXTENT_BLOCKS
        if self._dirt.find(1, first, first + EXTENT_BLOCKS) >= 0:
            self._before[number] = None
            if len(self._before) > self.most // 2:
                self._before.popitem(last=False)
