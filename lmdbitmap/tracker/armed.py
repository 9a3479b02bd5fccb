"""The armed extents of an open period: which they are, how long each has had no new dirt, and which were armed before.

When one may be armed, and what has to be durable then, is the period's to see to (period.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Set

from lmdbitmap.bits import BitView
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_EXTENTS


class ArmedExtents:
    """At most `most` of them. An extent is (region, number in it); masks have a bit for each of a region's.

    `dirt` has a bit for each block of the disk. Whoever calls holds a lock: this has none.
    """

    def __init__(self, most: int, dirt: BitView) -> None:
        self.most = most
        self._dirt = dirt
        self._masks: dict[int, int] = {}
        """By region; one with nothing armed is absent."""
        self._last_dirt: OrderedDict[int, int] = OrderedDict()
        """Every armed extent with the pass that saw its last new dirt, longest quiet first."""
        self._before: OrderedDict[int, None] = OrderedDict()
        """Extents with dirt that are not armed any more, the last one last, and no more of them than may be likely."""
        self._pass_number = 0

    def __len__(self) -> int:
        return len(self._last_dirt)

    @property
    def regions(self) -> Set[int]:
        """Those in which an extent is armed."""
        return self._masks.keys()

    def mask(self, region: int) -> int:
        return self._masks.get(region, 0)

    def arm(self, region: int, mask: int) -> None:
        """Extents that get new dirt just now."""
        if mask:
            self._masks[region] = self.mask(region) | mask
            self.touch(region, _ones(mask))
            for extent in _ones(mask):
                self._before.pop(region * REGION_EXTENTS + extent, None)

    def touch(self, region: int, extents: Iterable[int]) -> None:
        """Armed ones get new dirt."""
        for extent in extents:
            number = region * REGION_EXTENTS + extent
            self._last_dirt[number] = self._pass_number
            self._last_dirt.move_to_end(number)

    def disarm(self, region: int, mask: int) -> None:
        """Armed ones, or none."""
        left = self.mask(region) & ~mask
        for extent in _ones(self.mask(region) & mask):
            del self._last_dirt[region * REGION_EXTENTS + extent]
            self._remember(region, extent)
        if left:
            self._masks[region] = left
        else:
            self._masks.pop(region, None)

    def disarm_all(self) -> None:
        """The longest quiet first, as each by itself."""
        while self._last_dirt:
            region, extent = self._first()
            self.disarm(region, 1 << extent)

    def forget_all(self) -> None:
        """Forget what is armed, and what was: the period has ended."""
        self._masks.clear()
        self._last_dirt.clear()
        self._before.clear()

    def longest_quiet(self, passes: int = 0) -> tuple[int, int] | None:
        """The extent that has had no new dirt for longest, if that is for `passes` passes or more.

        Where more than half of what may be armed is, one pass will do.
        """
        if not self._last_dirt:
            return None
        enough = passes if len(self) <= self.most // 2 else min(passes, 1)
        quiet = self._pass_number - next(iter(self._last_dirt.values()))
        return self._first() if quiet >= enough else None

    def end_pass(self) -> None:
        self._pass_number += 1

    def likely(self) -> dict[int, int]:
        """Masks by region of where dirt is likely next, likeliest last: what is armed, and what was before.

        Of the latter so much that half of what may be armed is not exceeded: passes are patient with that.
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
        """Not if it was armed because dirt was likely, and had none."""
        number = region * REGION_EXTENTS + extent
        first = number * EXTENT_BLOCKS
        if self._dirt.find(1, first, first + EXTENT_BLOCKS) >= 0:
            self._before[number] = None
            if len(self._before) > self.most // 2:
                self._before.popitem(last=False)


def _ones(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
