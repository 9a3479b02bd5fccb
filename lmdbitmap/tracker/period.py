"""The open period of one disk in memory: what is dirty, what is durably so, and what is armed.

`settled` has one bit per block: 1 means "dirty, and durably so". A write to settled blocks needs nothing
else. Everything below handles the first write to a block, and keeps these invariants:

1. A bit of `settled` is set only after the store would report its block dirty even if this process died at once:
   its exact bit, or the armed bit of its extent, is in a transaction that is durable (law 1).
2. `settled` holds every exact bit of each *loaded* region. A region is loaded from the store when a write
   first needs it, so attaching a disk of any size costs nothing.
3. An extent is in `_armed` only while its armed bit is durable. It is taken out (because it is quiet, or a victim of
   the limit) together with reading the exact bits for the next record, under `_state`. So that record has every bit
   that was set in memory because the extent was armed. A later write to the extent waits for its own commit.
4. Commits happen one at a time, under `_commit`, in the order in which they read the exact bits.

`_state` is never held while waiting for the disk or for `_commit`. Requests that wait for a commit queue up. The thread
that gets `_commit` next makes all of them durable in one transaction (group commit). A request leaves the queue only
when its outcome is known: an interrupted thread takes no other thread's request with it.

In deferred mode nothing is armed and nothing is committed before `persist`: bits are set in memory, and
after a crash the disk's clean flag says that they are lost.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from lmdbitmap import bits
from lmdbitmap.bits import Run
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BLOCKS, REGION_BYTES
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Bitmap
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.tracker import chain, masks
from lmdbitmap.tracker.armed import ArmedExtents
from lmdbitmap.tracker.arming import add_dense_regions, make_room, worth_arming
from lmdbitmap.tracker.masks import Piece

DEFAULT_MAX_ARMED = 1024
_TAKEN_AT_ONCE = 512
"""Extents that are disarmed while writers wait: a millisecond's work."""


class _Ticket:
    """Pieces that wait for a commit, and the outcome of the commit."""

    __slots__ = ("done", "error", "pieces")

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.done = False
        self.error: LmdbitmapError | None = None


class _Commit(NamedTuple):
    """One commit: the records to write, and what is settled and armed once they are durable."""

    records: dict[int, tuple[int, bytes]]
    pieces: list[Piece]
    arming: Mapping[int, int]


class Period:
    """Tracks the period that records into `bitmap`. All methods may be called from any thread."""

    def __init__(
        self, store: Store, bitmap: Bitmap, *, write_ahead: bool = True, max_armed: int = DEFAULT_MAX_ARMED
    ) -> None:
        self.bitmap_id = bitmap.id
        self.block_count = bitmap.geometry.block_count
        self._region_count = bitmap.geometry.region_count
        self._store = store
        self._all_dirty = bitmap.all_dirty is not None
        self._write_ahead = write_ahead
        self._memory = bits.anonymous_memory(self._region_count * REGION_BYTES)
        self.settled = bits.bitmap_view(self._memory)
        self._loaded = bits.anonymous_memory(self._region_count)
        self._state = threading.Lock()
        self._commit = threading.Lock()
        self._queue: list[_Ticket] = []
        self._armed = ArmedExtents(max_armed, self.settled)
        self._behind: set[int] = set()
        """Regions whose record lacks bits (deferred mode) or arms too much (a commit failed or was interrupted)."""
        self._damaged: set[int] = set()
        """Regions whose record was damaged when it was read: their dirt is a superset, also once it is written anew."""

    # -- marking ---------------------------------------------------------------------------------------

    def make_durable(self, runs: Iterable[Run]) -> None:
        """Return when every block of `runs` is settled: dirty, and durably so (law 1).

        Raises what the store raises; then the blocks are not settled and their data must not be written.
        """
        with self._state:
            waiting = [
                piece for run in runs for piece in masks.pieces(*run) if not self._settle_in_memory(piece)
            ]
            if not waiting:
                return
            ticket = _Ticket(waiting)
            self._queue.append(ticket)
        self._wait_for_commit(ticket)

    def add_dirt(self, dirt: Iterable[tuple[int, bytes]]) -> None:
        """Make many blocks durably dirty in one commit: regions, each with its dirty bits. Arms nothing."""
        if self._all_dirty:
            return
        with self._commit:
            with self._state:
                records = {region: self._record_with(region, dirty) for region, dirty in dirt}
            error = self._write(records)
            if error is not None:
                raise error
            with self._state:
                for region, (_, exact) in records.items():
                    bits.or_into(self._memory, exact, region * REGION_BYTES)

    def _record_with(self, region: int, dirty: bytes) -> tuple[int, bytes]:
        exact = self._known(region)
        bits.or_into(exact, dirty)
        return self._armed.mask(region), bytes(exact)

    def _settle_in_memory(self, piece: Piece) -> bool:
        """Settle a piece that needs no commit (dirty, armed, deferred); whether it did. Caller holds `_state`."""
        region, start, stop = piece
        if not self._loaded[region]:
            self._load(region)
        base = region * REGION_BLOCKS
        if self.settled.find(0, base + start, base + stop) < 0:
            return True
        if not self._write_ahead:
            self._behind.add(region)
        elif masks.touched(start, stop) & ~self._armed.mask(region):
            return False
        else:
            self._armed.touch(region, range(start // EXTENT_BLOCKS, (stop - 1) // EXTENT_BLOCKS + 1))
        bits.set_range(self.settled, base + start, base + stop)
        return True

    def _load(self, region: int, reader: Reader | None = None) -> None:
        """Load a region's dirt from the store, as it is now or as `reader` sees it."""
        if self._all_dirty:
            known = schema.ALL_DIRTY_BITS
        elif reader is not None:
            known = self._stored(reader, region)
        else:
            with self._store.read() as reader:
                known = self._stored(reader, region)
        bits.or_into(self._memory, known, region * REGION_BYTES)
        if region == self._region_count - 1:
            bits.truncate(self._memory, self.block_count)
        self._loaded[region] = 1

    # -- committing ------------------------------------------------------------------------------------

    def _wait_for_commit(self, ticket: _Ticket) -> None:
        with self._commit:
            while not ticket.done:
                self._commit_queue()
        if ticket.error is not None:
            raise ticket.error

    def _commit_queue(self) -> None:
        """Make all waiting requests durable in one transaction. Caller holds `_commit`."""
        with self._state:
            tickets = self._queue[:]
            plan = self._plan_for([piece for ticket in tickets for piece in ticket.pieces])
        error = self._write(plan.records)
        with self._state:
            if error is None:
                self._settle(plan)
            for ticket in tickets:
                ticket.error = error
                ticket.done = True
            del self._queue[: len(tickets)]

    def _write(self, records: Mapping[int, tuple[int, bytes]]) -> LmdbitmapError | None:
        """Make the records durable. Their regions are behind until then, however this call ends."""

        def put(writer: Writer) -> None:
            for region in sorted(records):
                self._put(writer, region, *records[region])

        if not records:
            return None
        with self._state:
            self._behind.update(records)
        try:
            self._store.update(put)
        except LmdbitmapError as error:
            return error
        with self._state:
            self._behind -= {region for region in records if not self._lacks_bits(region, records[region][1])}
        return None

    def _lacks_bits(self, region: int, exact: bytes) -> bool:
        """Whether a record just written lacks bits that no armed extent covers. Caller holds `_state`."""
        return not self._write_ahead and exact != self._known(region)

    def _plan_for(self, pieces: list[Piece]) -> _Commit:
        """Plan the records that make `pieces` durable. Caller holds `_commit` and `_state`.

        A record carries the pieces' exact bits too; arming.py decides what is armed with it.
        """
        exact: dict[int, bytearray] = {}
        arming: dict[int, int] = {}
        for region, start, stop in pieces:
            record = exact.get(region)
            if record is None:
                record = exact[region] = self._known(region)
            if stop - start == 1:
                record[start >> 3] |= 1 << (start & 7)
            else:
                bits.set_range(bits.bitmap_view(record), start, stop)
            arming[region] = arming.get(region, 0) | worth_arming((region, start, stop), self.settled)
        add_dense_regions(self._armed, arming)
        for region in make_room(self._armed, arming) - exact.keys():
            exact[region] = self._known(region)
        records = {
            region: (self._armed.mask(region) | arming.get(region, 0), bytes(record))
            for region, record in exact.items()
        }
        return _Commit(records, pieces, arming)

    def _known(self, region: int) -> bytearray:
        """Return a copy of the region's exact bits, loaded if need be. Caller holds `_state`."""
        if not self._loaded[region]:
            self._load(region)
        base = region * REGION_BYTES
        return bytearray(self._memory[base : base + REGION_BYTES])

    def _settle(self, plan: _Commit) -> None:
        """Take a durable plan into memory. Caller holds `_commit` and `_state`."""
        settled = self.settled
        for region, start, stop in plan.pieces:
            base = region * REGION_BLOCKS
            settled[base + start : base + stop] = 1
        for region, mask in plan.arming.items():
            self._armed.arm(region, mask)

    # -- the background pass, checkpoint, detach ---------------------------------------------------------

    @property
    def armed_count(self) -> int:
        return len(self._armed)

    def disarm_quiet(self, limit: int, *, passes: int = 1) -> int:
        """Persist the exact bits of extents without new dirt in the last `passes` passes, and disarm them.

        Return how many extents: at most `limit`. If more than half of the limit on armed extents is in use, one pass is
        enough. Raises what the store raises; the extents then stay armed on disk, which is the safe direction.
        """
        with self._commit:
            disarmed, records = self._take_quiet(limit, passes)
            with self._state:
                self._armed.end_pass()
            error = self._write(records)
        if error is not None:
            raise error
        return disarmed

    def _take_quiet(self, limit: int, passes: int) -> tuple[int, dict[int, tuple[int, bytes]]]:
        """Disarm at most `limit` extents; return how many, and their records. Caller holds `_commit`.

        Some at a time: writers that wait for `_state` come in between.
        """
        disarmed, records = 0, dict[int, tuple[int, bytes]]()
        while disarmed < limit:
            with self._state:
                regions = self._disarm_some(min(limit - disarmed, _TAKEN_AT_ONCE), passes)
                records |= {
                    region: (self._armed.mask(region), bytes(self._known(region))) for region in regions
                }
            if not regions:
                break
            disarmed += sum(regions.values())
        return disarmed, records

    def _disarm_some(self, limit: int, passes: int) -> Counter[int]:
        """Disarm the longest quiet; return how many extents of which regions. Caller holds `_state`."""
        regions = Counter[int]()
        while limit > 0 and (quiet := self._armed.longest_quiet(passes)) is not None:
            region, extent = quiet
            self._armed.disarm(region, 1 << extent)
            regions[region] += 1
            limit -= 1
        return regions

    def persist(self) -> None:
        """Write all bits that are only in memory and disarm everything: the store is exact on return.

        Writers may go on meanwhile; their new dirt arms anew.
        """
        with self._commit:
            _, records = self._take_quiet(self.armed_count, passes=0)
            with self._state:
                records |= self._take_all()
            error = self._write(records)
            if error is not None:
                raise error

    @contextlib.contextmanager
    def without_commits(self) -> Iterator[None]:
        """Keep all commits of this period, background passes included, from running in the block."""
        with self._commit:
            yield

    def put_exact(self, writer: Writer, dirty: Iterable[Run] = ()) -> None:
        """Persist inside the caller's transaction. The caller has drained all writers and is in `without_commits`.

        The blocks of `dirty` are stored as dirty too. Memory does not change: the caller ends the period once the
        transaction is durable.
        """
        added: dict[int, list[Run]] = {}
        for region, start, stop in (
            piece for run in dirty for piece in masks.pieces(*run) if not self._all_dirty
        ):
            added.setdefault(region, []).append((start, stop))
        for region in sorted(self._behind | self._armed.regions | added.keys()):
            exact = self._known(region) if self._loaded[region] else bytearray(self._stored(writer, region))
            for run in added.get(region, ()):
                bits.set_range(bits.bitmap_view(exact), *run)
            self._put(writer, region, 0, bytes(exact))

    def _put(self, writer: Writer, region: int, armed: int, exact: bytes) -> None:
        """Store a region, without a record if all clean: an extent may be armed for nothing, and periods are many."""
        if region in self._damaged:
            chain.note_damage(writer, self.bitmap_id)
        if armed or exact != schema.ALL_CLEAN_BITS:
            writer.put_region(self.bitmap_id, region, armed, exact)
        else:
            writer.delete_region(self.bitmap_id, region)

    def _stored(self, reader: Reader, region: int) -> bytes:
        """Return the region's dirt from the store. Extents that a dead owner left armed are all dirty."""
        record = reader.region(self.bitmap_id, region)
        if record is not None and record.damaged:
            self._damaged.add(region)
        return schema.ALL_CLEAN_BITS if record is None else bits.dirty_bits(record.armed, record.bits)

    def end(self) -> None:
        """End this period: another one goes on, and nothing is left to write. Called inside `without_commits`."""
        with self._state:
            self._armed.forget_all()
            self._behind.clear()

    def likely_extents(self) -> dict[int, int]:
        """Return masks by region of the extents where dirt is likely next, likeliest last."""
        with self._state:
            return self._armed.likely()

    def begin(self, writer: Writer, armed: Mapping[int, int], dirty: Iterable[Run] = ()) -> None:
        """Arm extents, by region, and make the blocks of `dirty` dirty from the start, in addition to the stored dirt.

        Called inside the transaction that makes or changes the bitmap: if that fails, there is no period either. If all
        is dirty, there is nothing to arm.
        """
        if self._all_dirty:
            return
        regions = set(armed)
        for region, start, stop in (piece for run in dirty for piece in masks.pieces(*run)):
            base = region * REGION_BLOCKS
            bits.set_range(self.settled, base + start, base + stop)
            regions.add(region)
        with self._state:
            for region in sorted(regions):
                self._load(region, writer)  # first: later, a dead owner's armed extents look like ours
                self._put(writer, region, armed.get(region, 0), bytes(self._known(region)))
            self._settle(_Commit({}, [], armed))

    def _take_all(self) -> dict[int, tuple[int, bytes]]:
        """Disarm everything. Regions that are behind stay so until `_write` has written them. Caller holds `_state`."""
        regions = self._behind | self._armed.regions
        self._armed.disarm_all()
        return {region: (0, bytes(self._known(region))) for region in regions}
