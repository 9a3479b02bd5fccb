"""The snapshots that a disk holds in one period, and the blocks whose writes concern none of them any more.

While there are snapshots, lanes use the map `let_through` instead of the period's `settled` map. A bit of it means that
the block is durably dirty *and* that every snapshot has kept what it wants of it. A bit is set after both, and stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from lmdbitmap import bits
from lmdbitmap.bits import Run
from lmdbitmap.geometry import REGION_BYTES, Geometry
from lmdbitmap.tracker.snapshot import Snapshot


class Holding:
    """The snapshots that a disk of `geometry` holds in one period. `keep` and `let` may be called from any thread."""

    def __init__(self, snapshots: Sequence[Snapshot], geometry: Geometry) -> None:
        self.snapshots = tuple(snapshots)
        self._geometry = geometry
        self.let_through = bits.bitmap_view(bits.anonymous_memory(geometry.region_count * REGION_BYTES))

    def without(self, snapshot: Snapshot) -> Holding | None:
        """The others, if any, in the same period, with the same map: what all have kept, the others have. Cannot fail.

        So a snapshot can be let go of where there is no memory for another map.
        """
        rest = copy.copy(self)
        rest.snapshots = tuple(other for other in self.snapshots if other is not snapshot)
        return rest if rest.snapshots else None

    def keep(self, runs: Iterable[Run]) -> None:
        """Return when snapshots allow the runs of blocks to change. Never raises."""
        for start, stop in runs:
            offset, length = self._geometry.bytes_of(start, stop)
            for snapshot in self.snapshots:
                snapshot.keep(offset, length)

    def let(self, runs: Iterable[Run]) -> None:
        """Let writes to these runs through from now on: they are durably dirty (law 1), and their old data is kept."""
        for start, stop in runs:
            bits.set_range(self.let_through, start, stop)
