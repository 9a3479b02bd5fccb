"""The tracking of a disk's writes, and the change from one period to the next. Where the laws are kept:

1. **Write**: `FilterLane` (lane.py) calls `mark` before it writes to unsettled blocks, and `Period` (period.py) returns
   when the dirtiness is durable. Before that, snapshots keep the old data that they want (snapshot.py).
2. **Freeze**: a period ends only inside `frozen`, which is `Gate.drained` (lane.py) and more.

A period ends in one transaction of the store, which writes its exact bits and opens the bitmap of the next one. Memory
follows (`go_on_with`) while nobody writes. All memory that it takes then is allocated inside the transaction, which is
given up if there is none. If an interruption may have come between the two, or the store cannot say whether it took the
change, the disk is *astray*: the store may record into another bitmap than the period in memory. Track is lost then
(vouching.py), and no write passes before that is said.

When tracking fails, policy `guest-first` lets the guest's write through, but first makes durable that the bitmap cannot
be trusted; a new epoch begins as soon as the store can be written again. Policy `strict` fails the write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lmdbitmap.bits import Run
from lmdbitmap.errors import Busy, LmdbitmapError, StorageError, Untrusted, error_from_os, os_errors_at
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import FlushesByItself, ImageIdentity, LeavesDoubt, TrackableDevice
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import CommitInDoubt, Reader, Store, Writer
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import Standing
from lmdbitmap.tracker.flushing import Flusher
from lmdbitmap.tracker.holding import Holding
from lmdbitmap.tracker.lane import FilterLane, Gate
from lmdbitmap.tracker.period import Period
from lmdbitmap.tracker.snapshot import Snapshot
from lmdbitmap.tracker.vouching import Voucher, write_refused

log = logging.getLogger(__name__)


class Following(NamedTuple):
    """What a disk goes on with once a change of its chain is durable; see `Tracking.following`."""

    disk: Disk
    period: Period
    holding: Holding | None


class Tracking:
    """The period that records a disk's writes now, and the gate that they pass. Safe for many threads.

    The owner of the disk passes its `voucher`, and sets `is_over` when it begins to let go of the disk.
    """

    def __init__(
        self, store: Store, disk: Disk, device: TrackableDevice, voucher: Voucher, *, max_armed: int
    ) -> None:
        self.store = store
        self.disk = disk
        self.size = disk.size
        self.device = device
        self.voucher = voucher
        self.flusher = Flusher(disk.name, device, voucher.lose_track)
        if isinstance(device, FlushesByItself):
            device.tell_of_loss(self.flusher.lose)
        self._doubtful = device if isinstance(device, LeavesDoubt) else None
        self.is_over = False
        self._astray: str | None = None
        """Why the store may record into another bitmap than `period`; None while it does not. Set while frozen."""
        self._max_armed = max_armed
        with store.read() as reader:
            self.period = self._open_period(reader, disk)
        self.gate = Gate(disk.geometry, self.period.settled)
        self._holding: Holding | None = None
        """The snapshots that are held now, if any; changed while the gate is closed."""

    def lane(self) -> FilterLane:
        """A new lane, for one thread at a time."""
        return FilterLane(self.gate, self.device, self.mark, self.flusher.flush)

    # -- before a write ------------------------------------------------------------------------------------

    def mark(self, runs: list[Run]) -> None:
        """Keep the old data of `runs` that a snapshot wants, then settle the runs (law 1).

        If they cannot be settled, do what the policy says.
        """
        holding = self._holding
        if holding is not None:
            holding.keep(runs)
        if self.settle(runs) and holding is not None:
            holding.let(runs)

    def settle(self, runs: list[Run]) -> bool:
        """Settle `runs` (law 1) and return whether they are settled. If not, do what the policy says."""
        if not self.has_track():
            return False
        try:
            self.period.make_durable(runs)
        except LmdbitmapError as error:
            self._tracking_failed(error)
            return False
        except MemoryError:  # the guest's write needs none
            lack = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            self._tracking_failed(error_from_os("the bitmap in memory", lack))
            return False
        return True

    def has_track(self) -> bool:
        """Whether dirt can be recorded. If the disk is astray, say first that track is lost.

        Raises `StorageError` if neither distrust nor silence can say so.
        """
        if self._astray is not None and self.voucher.lost is None:
            self.voucher.lose_track(self._astray)
        return self.voucher.lost is None

    def _tracking_failed(self, error: LmdbitmapError) -> None:
        if self.disk.policy == schema.STRICT:
            raise write_refused(self.disk.name, error) from error
        self.voucher.lose_track(f"tracking failed: {error.problem}")

    def in_doubt(self, geometry: Geometry) -> list[Run]:
        """Return blocks that ended writes may still change: they are dirty in each period until then (law 2)."""
        if self._doubtful is None:
            return []
        ranges = [(start, min(stop, geometry.size)) for start, stop in self._doubtful.in_doubt()]
        blocks = [geometry.blocks_outward(start, stop - start) for start, stop in ranges if start < stop]
        return [(some.start, some.stop) for some in blocks]

    def mark_doubts(self) -> None:
        """Mark the writes in doubt that came up since the period began; a new period starts with the earlier ones.

        Keep nothing for snapshots: nothing here decides whether and when these blocks change.
        """
        if self.in_doubt(self.disk.geometry):
            with self.gate.entering(self.lane()) as geometry:
                self.settle(self.in_doubt(geometry))

    # -- snapshots -----------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        """The snapshots that are held now."""
        return () if self._holding is None else self._holding.snapshots

    def _hold(self, holding: Holding | None) -> None:
        """Hold these snapshots, and no others, from now on. Called while the gate is closed. Cannot fail."""
        self._holding = holding
        self.gate.settled = self.period.settled if holding is None else holding.let_through

    def let_go_of(self, snapshot: Snapshot) -> None:
        """Stop holding a snapshot: writers keep nothing for it any more."""
        if self.is_over or snapshot not in self.snapshots:
            return
        try:
            with self.gate.drained():
                if self._holding is not None:
                    self._hold(self._holding.without(snapshot))
        except StorageError:
            if not self.is_over:  # else it ends with the tracking, at this very moment
                raise

    # -- one period after another --------------------------------------------------------------------------

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No write is in flight and no commit of the period runs in the block (law 2)."""
        with self.gate.drained():
            period = self.period
            # A local name: if the period ends in the block, its memory is freed when no thread waits any more.
            with period.without_commits():
                yield

    def change_chain(
        self, change: Callable[[Writer, Disk], Disk], armed: Mapping[int, int] | None = None
    ) -> None:
        """Persist, change the chain, and open its newest bitmap afresh, with extents armed. Called inside `frozen`."""

        def persist_and_change(writer: Writer) -> Following:
            self.put_exact(writer)
            disk = change(writer, self.as_stored(writer))
            writer.put_disk(disk)
            following = self.following(writer, disk, self.snapshots)
            following.period.begin(writer, armed or {})
            return following

        with changed_together([self]):
            self.go_on_with(self.store.update(persist_and_change))

    def put_exact(self, writer: Writer) -> None:
        """Write the period's exact bits, and the blocks of writes in doubt. Called inside `frozen`."""
        self.period.put_exact(writer, self.in_doubt(self.disk.geometry))

    def following(
        self, reader: Reader, disk: Disk, snapshots: Sequence[Snapshot], newest: Checkpoint | None = None
    ) -> Following:
        """Open a period, and hold `snapshots` in it, inside the transaction that makes its bitmap.

        So nothing can fail any more once that is durable.
        """
        return Following(disk, self._open_period(reader, disk, newest), _holding_of(snapshots, disk))

    def go_on_with(self, following: Following) -> None:
        """Track into the newest bitmap of a chain that has changed durably. Called inside `frozen`. Cannot fail."""
        self.period.end()
        self.disk, self.size = following.disk, following.disk.size
        self.period = following.period
        self.gate.geometry = following.disk.geometry
        self._hold(following.holding)
        self.stay()

    @property
    def is_astray(self) -> bool:
        return self._astray is not None

    def stray(self) -> None:
        """Be astray until `go_on_with`, or `stay`: whatever comes in between. Called inside `frozen`."""
        self._astray, self.gate.is_slow = "a change of its checkpoints was interrupted", True

    def stay(self) -> None:
        """Be astray no more: the store records into the bitmap of `period`. Called inside `frozen`."""
        self._astray, self.gate.is_slow = None, False

    def as_stored(self, reader: Reader) -> Disk:
        """Return the disk as the store has it: after an interruption memory may lag behind."""
        return reader.disk(self.disk.uuid) or self.disk

    def _open_period(self, reader: Reader, disk: Disk, newest: Checkpoint | None = None) -> Period:
        bitmap = reader.bitmap((newest or chain.current_checkpoint(reader, disk)).bitmap_id)
        write_ahead = disk.durability == schema.WRITE_AHEAD
        return Period(self.store, bitmap, write_ahead=write_ahead, max_armed=self._max_armed)

    def start_epoch(self, reason: str) -> None:
        """Begin a new epoch in which everything is dirty. Called inside `frozen`."""

        def start(writer: Writer) -> Following:
            # ours, as another owner may have ended its own meanwhile (owner_name.py)
            stored = dataclasses.replace(self.as_stored(writer), session=self.disk.session)
            disk = chain.start_epoch(writer, stored, reason, time.time_ns())
            disk = chain.resize(writer, disk, self.device.size)
            return self.following(writer, disk, self.snapshots)

        with changed_together([self]):
            self.go_on_with(self.store.update(start))

    def begin_again(self) -> None:
        """If track was lost, start an epoch and vouch for it. Called inside `frozen`."""
        reason = self.voucher.lost
        if reason is None:  # another thread was first
            return
        self.voucher.require_a_voice()
        self.start_epoch(reason)
        self.voucher.vouch_again()
        self.flusher.tell_again()  # a flush that failed meanwhile found track lost already
        log.warning("disk %s: tracking begins again", self.disk.name)

    def resize(self, size: int) -> None:
        """See `Filter.resize`."""
        self.flusher.require_sound()
        with self.frozen():
            if self.snapshots:
                raise held_error(self.snapshots[0])
            self.change_chain(lambda writer, disk: chain.begin_resize(writer, disk, size))
            try:
                with os_errors_at(self.disk.image):
                    self.device.resize(size)
                self.flusher.flush()
            finally:
                self._take_size_of_image()

    def _take_size_of_image(self) -> None:
        """Record the image's size, however a resize went. If that fails, track is lost: a write past the new end would
        bring back zeroes that no bit names."""
        try:
            self.change_chain(lambda writer, disk: chain.end_resize(writer, disk, self.device.size))
        except LmdbitmapError as error:
            self.voucher.lose_track(f"a resize could not be recorded: {error.problem}")
            raise

    # -- the end -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def shutting(self, refusal: StorageError) -> Iterator[None]:
        """Freeze as `frozen` does, and refuse every later write."""
        with self.frozen():
            self.gate.shut(refusal)
            yield

    def end_session(self, identity: ImageIdentity) -> None:
        """Make the exact bits and the image's identity durable, and close the session."""
        disk = dataclasses.replace(self.disk, session=None, identity=identity)

        def commit(writer: Writer) -> None:
            self.put_exact(writer)
            writer.put_disk(disk)

        self.store.update(commit)
        self.disk = disk

    def let_go(self, refusal: StorageError) -> None:
        """Write nothing more: the disk may have another owner at once."""
        with contextlib.ExitStack() as each:  # in reverse order; each runs even if another fails
            each.callback(self.flusher.close, refusal)
            each.callback(self.period.end)
            for snapshot in self.snapshots:
                each.callback(snapshot.release)

    # -- what is known -------------------------------------------------------------------------------------

    def require_track(self) -> None:
        """Raise `Untrusted` if track was lost."""
        if self.voucher.lost is not None:
            raise Untrusted(f"disk {self.disk.name!r}: {self.voucher.lost}", next_step="make a full backup")

    def persist(self) -> None:
        """Write all bits that are only in memory."""
        if self.is_over:
            raise detached_error(self.disk)
        while True:
            period = self.period
            period.persist()
            if period is self.period:
                return

    def standing(self) -> Standing:
        """Whether the open period's answer is exact, a superset, or worth nothing."""
        if self.voucher.lost is not None:
            return Standing(Trust.UNTRUSTED, self.voucher.lost)
        with self.store.read() as reader:  # may be before or after the checkpoint that memory knows
            bitmap = reader.bitmap(chain.current_checkpoint(reader, self.disk).bitmap_id)
        reason = bitmap.superset or bitmap.all_dirty
        return Standing(Trust.SUPERSET if reason else Trust.EXACT, reason)


@contextlib.contextmanager
def changed_together(disks: Sequence[Tracking]) -> Iterator[None]:
    """In the block, change the chains in the store and the periods in memory together. Used inside `frozen`.

    If an interruption (Ctrl-C) may have come between the two, or the store cannot say whether it took the change, it is
    unknown which bitmap records. All disks then lose track. They are astray from the start, so that a further
    interruption, or an owner's file that cannot say so, lets no write pass.
    """
    sound = [tracking for tracking in disks if not tracking.is_astray]
    try:
        for tracking in disks:
            tracking.stray()
        yield
    except CommitInDoubt as error:
        _lose_all(disks, f"a change of its checkpoints may have taken place or not ({error.problem})")
        raise
    except LmdbitmapError:  # the store is as it was before
        for tracking in sound:
            tracking.stay()
        raise
    except BaseException:
        _lose_all(disks, "a change of its checkpoints was interrupted")
        raise


def _lose_all(disks: Sequence[Tracking], reason: str) -> None:
    with contextlib.ExitStack() as each:  # each loses track even if another cannot say so
        for tracking in disks:
            tracking.stray()
            each.callback(tracking.voucher.lose_track, reason)


def _holding_of(snapshots: Sequence[Snapshot], disk: Disk) -> Holding | None:
    return Holding(snapshots, disk.geometry) if snapshots else None


def detached_error(disk: Disk) -> StorageError:
    return StorageError(
        f"disk {disk.name!r}", OSError(errno.ESHUTDOWN, "it is detached"), next_step="attach it again"
    )


def held_error(snapshot: Snapshot) -> Busy:
    return Busy(
        f"disk {snapshot.disk.name!r} is held as at checkpoint {snapshot.checkpoint.name!r}",
        next_step="release that snapshot first, or wait until it is released",
    )
