"""The filter: stands in front of an image, lets writes through, and keeps the dirty bitmap true.

A `Filter` is an attached disk: it holds the owner's lock, QEMU's locks on the image, and the open period.
Where the laws of the design are kept:

1. **Write**: `FilterLane` (lane.py) asks `_mark` before it writes what is not settled, and `Period`
   (period.py) answers when the dirtiness is durable.
2. **Freeze**: whatever ends a period happens inside `_frozen`, which is `Gate.drained` (lane.py) and more.

The order of attach and detach, and what a death in between costs, is in DESIGN.md's crash table:

    attach   lock, judge continuity, commit {session, new epoch or superset}, beat        (session.py)
    detach   drain, flush the image, beat, commit {exact bits, identity, no session}, unlock

An image that could not be flushed is not known any more, whatever the bits say (flushing.py): track is lost until
it is attached anew, which begins a new epoch. Until then there are no checkpoints and no clean detach.

When tracking fails, policy `guest-first` lets the guest's write through, but takes the owner's word for the
bitmap back before (vouching.py); a new epoch begins as soon as the store can be written again. Policy
`strict` fails the write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

from lmdbitmap import chain, forks, schema, session
from lmdbitmap.bits import Run
from lmdbitmap.changes import Changes, Standing, changes
from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, StorageError, Untrusted, os_errors_at
from lmdbitmap.extents import Trust
from lmdbitmap.flushing import Flusher
from lmdbitmap.front import Front
from lmdbitmap.geometry import Geometry
from lmdbitmap.image import open_image
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.lane import FilterLane, Gate
from lmdbitmap.owner import Owner
from lmdbitmap.period import DEFAULT_MAX_ARMED, Period
from lmdbitmap.schema import Checkpoint, Disk
from lmdbitmap.scratch import Scratch, ScratchFile
from lmdbitmap.snapshot import Holding, Snapshot
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.vouching import Voucher, changed_together, write_refused

log = logging.getLogger(__name__)

PASS_INTERVAL_S = 0.5
"""Between background passes, and between signs of life."""
_DISARM_PER_PASS = 512
_CARRIED_REGIONS = 256


class Filter(Front):
    """An attached disk: the one writer of its image until `detach`. Safe for many threads.

    A `BlockDevice` and a `ServedDisk`: its own methods find the calling thread's lane, a server takes
    one `lane()` per connection.
    """

    def __init__(
        self, store: Store, disk: Disk, device: TrackableDevice, lock: Owner, *, max_armed: int
    ) -> None:
        super().__init__(device)
        self.store = store
        self.disk = disk
        self._voucher = Voucher(disk.name, device, lock)
        self._flusher = Flusher(disk.name, device, self._voucher.lose_track)
        self._max_armed = max_armed
        self._detached = False
        self._ending = threading.RLock()
        self._last_acts: list[Callable[[], None]] = []
        with store.read() as reader:
            self._period = self._open_period(reader, disk)
        self._gate = Gate(disk.geometry, self._period.settled)
        self._holding: Holding | None = None
        """The snapshots that are held now, if any; changed while the gate is closed."""
        self._stop = threading.Event()
        self._background = [
            threading.Thread(target=self._every_interval, args=(work,), name=f"lmdbitmap {name}", daemon=True)
            for name, work in (("beat", self.beat), ("pass", self.background_pass))
        ]

    @classmethod
    def attach(
        cls,
        store: Store,
        name: str,
        *,
        max_armed: int = DEFAULT_MAX_ARMED,
        open_device: Callable[[str], TrackableDevice] = open_image,
        background: bool = True,
    ) -> Filter:
        """Own the disk called `name` and begin a session; its clean flag is durably cleared on return.

        An image that was written behind our back begins a new epoch (see continuity.py). Raises `NotFound`
        without such a disk or image, `Busy` while another process owns the disk or has the image open,
        `StorageError` where the system refuses. `background=False` leaves beats and passes to the caller.
        """
        with session.owning(store, name, open_device) as held:
            disk = session.begin(store, held)
            attached = cls(store, disk, held.device, held.lock, max_armed=max_armed)
            attached.beat()
            held.keep()
        forks.is_not_for_children(attached)
        if background:
            for thread in attached._background:
                thread.start()
        return attached

    # -- what a server and an agent use --------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self.disk.size

    def lane(self) -> FilterLane:
        """A new lane, for one thread at a time."""
        return FilterLane(self._gate, self.device, self._mark, self._flusher.flush)

    def flush(self) -> None:
        """Raises `StorageError`; then so does every flush until the disk is attached anew."""
        self._flusher.flush()

    def close(self) -> None:
        self.detach()

    # -- points in time ------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> Checkpoint:
        """One durable point in time on this disk; see `take_checkpoint`."""
        return take_checkpoint([self], name)[0]

    def forget(self, name: str) -> None:
        """Delete a checkpoint; what it recorded goes to the one before it. Durable on return.

        Writers wait only if it is the newest one, into which they record.
        """
        if self._detached:
            raise _detached_error(self.disk)
        for snapshot in self.snapshots:
            if snapshot.checkpoint.name == name:
                raise _held_error(snapshot)
        if not self.store.update(lambda writer: self._forget_unless_newest(writer, name)):
            self._between_periods(lambda writer, disk: _forget(writer, disk, name))

    def _forget_unless_newest(self, writer: Writer, name: str) -> bool:
        disk = self._as_stored(writer)
        if chain.current_checkpoint(writer, disk).name == name:
            return False
        chain.forget(writer, disk, name)
        return True

    def _take_back(self, name: str) -> None:
        """Lose a checkpoint that nobody was told of; where the store refuses that, nothing is believed any more."""
        try:
            self.forget(name)
        except LmdbitmapError as error:
            if not self._detached:
                self._voucher.lose_track(f"checkpoint {name} could not be taken back: {error.problem}")

    def mark(self, offset: int, length: int) -> None:
        """Make every block that the range touches dirty, by hand; durable on return."""
        with self._gate.entering(self._my_lane()) as geometry:
            blocks = geometry.blocks_outward(offset, length)
            self._mark([(blocks.start, blocks.stop)])

    def mark_regions(self, dirt: Iterable[tuple[int, bytes]], geometry: Geometry) -> None:
        """As `mark`, for many blocks at once: regions of a disk of `geometry`, which must be ours, with their bits.

        One commit for all of them. Raises what the store raises.
        """
        with self._gate.entering(self._my_lane()) as ours:
            if geometry != ours:
                raise InvalidArgument(
                    f"disk {self.disk.name!r} has {ours.size} bytes in blocks of {ours.granularity},"
                    f" not {geometry.size} in blocks of {geometry.granularity}",
                    next_step="try again if it was resized just now",
                )
            if self._voucher.lost is None:
                self._period.add_dirt(dirt)

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        """Those that are held now."""
        return () if self._holding is None else self._holding.snapshots

    def snapshot(self, name: str, scratch: Scratch) -> Snapshot:
        """A checkpoint, and the disk as it was then, until that is released; see `take_snapshot`."""
        return take_snapshot([self], name, scratch)[0]

    def resize(self, size: int) -> None:
        """Grow (the new area is dirty) or shrink (bits past the end are gone for good) disk and image.

        Durable on return. A death in between leaves either size, and the bitmap right for it. Raises `Busy` while a
        snapshot is held: whoever reads it counts on the bits past the end.
        """
        self._flusher.require_sound()
        with self._frozen():
            if self.snapshots:
                raise _held_error(self.snapshots[0])
            self._change_chain(lambda writer, disk: chain.begin_resize(writer, disk, size))
            try:
                with os_errors_at(self.disk.image):
                    self.device.resize(size)
                self._flusher.flush()
            finally:
                self._take_size_of_image()

    def _take_size_of_image(self) -> None:
        """However a resize went, the image says how large it is. A size that cannot be recorded loses track:
        a write past the new end would bring back zeroes that no bit names."""
        try:
            self._change_chain(lambda writer, disk: chain.end_resize(writer, disk, self.device.size))
        except LmdbitmapError as error:
            self._voucher.lose_track(f"a resize could not be recorded: {error.problem}")
            raise

    def start_epoch(self, reason: str) -> None:
        """Begin anew, everything dirty: what was known cannot be believed. Durable on return."""
        with self._frozen():
            self._start_epoch(reason)

    def persist(self) -> None:
        """Write everything that only memory knows: the store names exactly what is dirty at this moment.

        Raises what the store raises, and `Untrusted` where tracking was lost: then it names nothing.
        """
        if self._voucher.lost is not None:
            raise Untrusted(f"disk {self.disk.name!r}: {self._voucher.lost}", next_step="make a full backup")
        self._persist()

    def _persist(self) -> None:
        if self._detached:
            raise _detached_error(self.disk)
        while True:
            period = self._period
            period.persist()
            if period is self._period:
                return

    def changes(self, *, since: str | None = None, until: str | None = None) -> Changes:
        """What changed up to this moment; see changes.py. Raises what the store raises."""
        if self._voucher.lost is None:
            self._persist()
        answer = changes(self.store, self.disk.name, since=since, until=until, persisted=True)
        if self._voucher.lost is None or until is not None:
            return answer
        return dataclasses.replace(answer, standing=Standing(Trust.UNTRUSTED, self._voucher.lost))

    def _between_periods(self, change: Callable[[Writer, Disk], Disk]) -> None:
        with self._frozen():
            self._change_chain(change)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """No write is in flight and no commit of the period runs in the block (law 2)."""
        with self._gate.drained(), self._period.held():
            yield

    def _change_chain(self, change: Callable[[Writer, Disk], Disk]) -> None:
        """Persist, change the chain, and open its newest bitmap afresh. Called inside `_frozen`."""

        def persist_and_change(writer: Writer) -> tuple[Disk, Period]:
            self._period.put_exact(writer)
            disk = change(writer, self._as_stored(writer))
            writer.put_disk(disk)
            return disk, self._open_period(writer, disk)

        with changed_together([self._voucher]):
            self._go_on_with(*self.store.update(persist_and_change))

    def _go_on_with(self, disk: Disk, period: Period) -> None:
        """The chain is another now, durably: track into its newest bitmap. Called inside `_frozen`."""
        self._period.end()
        self.disk = disk
        self._period = period
        self._gate.geometry = disk.geometry
        self._hold(self.snapshots)

    def _hold(self, snapshots: Sequence[Snapshot]) -> None:
        """Have these snapshots, and no others, kept from now on. Called while the gate is closed."""
        self._holding = Holding(snapshots, self.disk.geometry) if snapshots else None
        self._gate.settled = self._period.settled if self._holding is None else self._holding.let_through

    def _let_go_of(self, snapshot: Snapshot) -> None:
        """Writers have nothing to keep for it any more."""
        if self._detached or snapshot not in self.snapshots:
            return
        try:
            with self._gate.drained():
                self._hold([other for other in self.snapshots if other is not snapshot])
        except StorageError:
            if not self._detached:  # else it ends with the filter, at this very moment
                raise

    def _as_stored(self, reader: Reader) -> Disk:
        """The disk as the store has it: after an interruption memory may lag behind."""
        return reader.disk(self.disk.uuid) or self.disk

    def _open_period(self, reader: Reader, disk: Disk) -> Period:
        """Opened inside the transaction that makes its bitmap, so that nothing can fail once that is durable."""
        bitmap = reader.bitmap(chain.current_checkpoint(reader, disk).bitmap_id)
        write_ahead = disk.durability == schema.WRITE_AHEAD
        return Period(self.store, bitmap, write_ahead=write_ahead, max_armed=self._max_armed)

    # -- marking, and what happens when it fails -----------------------------------------------------------

    def _mark(self, runs: list[Run]) -> None:
        """Have the old data of `runs` kept where a snapshot wants it, and settle them (law 1).

        Where they cannot be settled, do what the policy says.
        """
        holding = self._holding
        if holding is not None:
            holding.keep(runs)
        if self._voucher.lost is not None:
            return
        try:
            self._period.make_durable(runs)
        except LmdbitmapError as error:
            self._tracking_failed(error)
            return
        if holding is not None:
            holding.let(runs)

    def _tracking_failed(self, error: LmdbitmapError) -> None:
        if self.disk.policy == schema.STRICT:
            raise write_refused(self.disk.name, error) from error
        self._voucher.lose_track(f"tracking failed: {error.problem}")

    def standing(self) -> Standing:
        """Whether the open period's answer is exact, a superset, or worth nothing."""
        if self._voucher.lost is not None:
            return Standing(Trust.UNTRUSTED, self._voucher.lost)
        with self.store.read() as reader:  # of before or after the checkpoint that memory knows
            bitmap = reader.bitmap(chain.current_checkpoint(reader, self.disk).bitmap_id)
        reason = bitmap.superset or bitmap.all_dirty
        return Standing(Trust.SUPERSET if reason else Trust.EXACT, reason)

    @property
    def armed_count(self) -> int:
        """Extents that a crash at this moment would report dirty as a whole."""
        return self._period.armed_count

    # -- background ----------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Leave a sign of life; see vouching.py."""
        self._voucher.beat()

    def background_pass(self) -> None:
        """Disarm what was quiet; when tracking was lost, begin a new epoch if the store lets us."""
        self.store.keep_house()
        self.regain_trust()
        self._period.disarm_quiet(_DISARM_PER_PASS)

    def regain_trust(self) -> None:
        """If tracking was lost, begin a new epoch, which is all dirty. Raises what the store raises.

        Not where the image could not be flushed: that is lost until it is attached anew.
        """
        if self._voucher.lost is not None and not self._flusher.failed:
            with self._frozen():
                self._begin_again()

    def _begin_again(self) -> None:
        reason = self._voucher.lost
        if reason is None:  # another thread was first
            return
        self._voucher.require_a_voice()
        self._start_epoch(reason)
        self._voucher.vouch_again()
        log.warning("disk %s: tracking begins again", self.disk.name)

    def _start_epoch(self, reason: str) -> None:
        """Called inside `_frozen`."""

        def start(writer: Writer) -> tuple[Disk, Period]:
            disk = chain.resize(writer, self._as_stored(writer), self.device.size)
            disk = chain.start_epoch(writer, disk, reason, time.time_ns())
            return disk, self._open_period(writer, disk)

        with changed_together([self._voucher]):
            self._go_on_with(*self.store.update(start))

    def _every_interval(self, work: Callable[[], None]) -> None:
        while not self._stop.wait(PASS_INTERVAL_S):
            try:
                work()
            except (LmdbitmapError, OSError) as error:
                log.warning(
                    "disk %s: background work failed, and will be tried again: %s", self.disk.name, error
                )

    # -- the end -------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """End the session cleanly: bits exact and durable, image flushed, clean flag set. Idempotent.

        If the store refuses, the session stays open on disk, which the next attach takes for a crash.
        """
        with self._ending:  # whoever else detaches waits for the end
            if self._detached:
                return
            self._detached = True
            self._stop_background()
            with self._frozen():
                self._gate.shut(_detached_error(self.disk))
                try:
                    self._end_session()
                    if self.disk.session is None:
                        for act in self._last_acts:
                            act()
                finally:
                    self._let_go()

    def at_detach(self, act: Callable[[], None]) -> None:
        """Have `act` called when a clean detach is durable, while the disk is still ours and nobody can write.

        A session that could not be ended cleanly, or that is abandoned, leaves it out.
        """
        self._last_acts.append(act)

    def abandon(self) -> None:
        """Let go of everything at once, as a crash would, without any last write."""
        with self._ending:
            if self._detached:
                return
            self._detached = True
            self._stop_background()
            with self._frozen():
                self._gate.shut(_detached_error(self.disk))
                self._let_go()

    def forsake(self) -> None:
        """We are in a forked child: nobody tracks its writes, so it has none; and the locks stay our parent's alone."""
        self._detached = True
        self._ending = threading.RLock()
        self._gate.forsake(_inherited_error(self.disk))
        if self.device.fd is not None:  # a connection would be ended for our parent too
            self.device.close()
        self._voucher.forsake()

    def _let_go(self) -> None:
        """What we know is not ours to write any more: the disk may have another owner at once."""
        for snapshot in self.snapshots:
            snapshot.release()
        self._period.end()
        self._flusher.close(_detached_error(self.disk))
        self.device.close()
        self._voucher.close()

    def _stop_background(self) -> None:
        self._stop.set()
        for thread in self._background:
            if thread.is_alive():
                thread.join()

    def _end_session(self) -> None:
        self._flusher.flush()
        with contextlib.suppress(LmdbitmapError):  # the commit says more than a sign of life
            self.beat()
        if self._voucher.lost is None:
            disk = dataclasses.replace(
                self.disk, session=None, identity=session.identity_to_keep(self.device)
            )

            def commit(writer: Writer) -> None:
                self._period.put_exact(writer)
                writer.put_disk(disk)

            self.store.update(commit)
            self.disk = disk

    def __enter__(self) -> Filter:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def take_checkpoint(filters: Sequence[Filter], name: str) -> list[Checkpoint]:
    """One durable point in time on all disks, or on none. All filters are of one store.

    Writes in flight are drained first; those that wait complete in the new period (law 2). Extents that
    are being written stay armed in the new period, so that their writers do not all commit at once.

    Returns after the images are flushed, so that a power cut cannot take back a write that the new period
    calls clean. The writers go on meanwhile. An image that cannot be flushed loses the checkpoint again.
    """
    checkpoints = _take_points(filters, name, lambda attached, checkpoint: None)
    _flush_images(filters, name)
    return checkpoints


def take_snapshot(filters: Sequence[Filter], name: str, scratch: Scratch) -> list[Snapshot]:
    """As `take_checkpoint`, and hold all disks as they are at that moment until their snapshots are released.

    Each keeps old data in a scratch file of its own. A snapshot ends with its filter. Raises `StorageError` where a
    scratch file cannot be made; then there is no checkpoint.
    """
    _require_each_once(filters)
    snapshots: dict[Filter, Snapshot] = {}
    store = filters[0].store

    def hold(attached: Filter, checkpoint: Checkpoint) -> None:
        snapshots[attached].checkpoint = checkpoint
        attached._hold([*attached.snapshots, snapshots[attached]])

    with contextlib.ExitStack() as on_failure:
        files = {attached: on_failure.enter_context(closing(ScratchFile(scratch))) for attached in filters}

        def prepare(attached: Filter) -> None:
            snapshots[attached] = Snapshot(store, attached.disk, attached.device, files[attached])

        _take_points(filters, name, hold, prepare)
        for attached, snapshot in snapshots.items():
            snapshot.before_release = functools.partial(attached._let_go_of, snapshot)
            on_failure.callback(snapshot.release)
        _flush_images(filters, name, on_failure.close)
        on_failure.pop_all()
    return [snapshots[attached] for attached in filters]


def _take_points(
    filters: Sequence[Filter],
    name: str,
    taken: Callable[[Filter, Checkpoint], None],
    prepare: Callable[[Filter], None] = lambda attached: None,
) -> list[Checkpoint]:
    """Freeze all disks, and begin their next periods in one transaction. `prepare` may fail, `taken` must not."""
    _require_each_once(filters)
    store = filters[0].store
    assert all(other.store.uuid == store.uuid for other in filters)
    with contextlib.ExitStack() as frozen:
        for attached in sorted(filters, key=lambda other: other.disk.uuid):
            frozen.enter_context(attached._frozen())
        for attached in filters:
            attached._flusher.require_sound()
            attached._begin_again()  # a write that was drained just now may have lost track
            prepare(attached)
        time_ns = time.time_ns()
        with changed_together([attached._voucher for attached in filters]):
            points = store.update(
                lambda writer: [_next_period(writer, attached, name, time_ns) for attached in filters]
            )
            for attached, (checkpoint, disk, period) in zip(filters, points, strict=True):
                attached._go_on_with(disk, period)
                taken(attached, checkpoint)
    return [checkpoint for checkpoint, _, _ in points]


def _flush_images(filters: Sequence[Filter], name: str, let_go: Callable[[], None] = lambda: None) -> None:
    try:
        for attached in filters:
            attached.flush()
    except StorageError as error:
        let_go()
        for attached in filters:
            attached._take_back(name)
        error.next_step = f"no checkpoint was made; {error.next_step}"
        raise


def _require_each_once(filters: Sequence[Filter]) -> None:
    if not filters or len({attached.disk.uuid for attached in filters}) < len(filters):
        raise InvalidArgument("a checkpoint is of one disk or of several", next_step="name each disk once")


def _next_period(
    writer: Writer, attached: Filter, name: str, time_ns: int
) -> tuple[Checkpoint, Disk, Period]:
    attached._period.put_exact(writer)
    disk, checkpoint = chain.add_checkpoint(writer, attached._as_stored(writer), name, time_ns)
    armed = dict(list(attached._period.active_extents().items())[-_CARRIED_REGIONS:])
    for region, mask in armed.items():
        writer.put_region(checkpoint.bitmap_id, region, mask, schema.ALL_CLEAN_BITS)
    period = attached._open_period(writer, disk)
    period.adopt_armed(armed)
    return checkpoint, disk, period


def _forget(writer: Writer, disk: Disk, name: str) -> Disk:
    chain.forget(writer, disk, name)
    return disk


def _detached_error(disk: Disk) -> StorageError:
    return StorageError(
        f"disk {disk.name!r} is detached", OSError(errno.ESHUTDOWN, "detached"), next_step="attach it again"
    )


def _inherited_error(disk: Disk) -> StorageError:
    return StorageError(
        f"disk {disk.name!r} was attached before this process was forked",
        OSError(errno.ESHUTDOWN, "of another process"),
        next_step="attach it in the process that writes, and write nowhere else",
    )


def _held_error(snapshot: Snapshot) -> Busy:
    return Busy(
        f"disk {snapshot.disk.name!r} is held as at checkpoint {snapshot.checkpoint.name!r}",
        next_step="release that snapshot first, or wait for who reads it",
    )
