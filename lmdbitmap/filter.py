"""The filter stands in front of an image, lets writes through, and keeps the dirty bitmap true.

A `Filter` is an attached disk. It holds the owner's lock and QEMU's locks on the image from the beginning of a session
to its end. tracker/tracking.py says what happens to a write in between, and where the laws of the design are kept;
tracker/points.py makes checkpoints and snapshots.

The order of attach and detach, and what a death in between costs, is in DESIGN.md's crash table:

    attach   lock, judge continuity, commit {session, new epoch or superset}, beat        (tracker/session.py)
    detach   drain, flush the image, beat, commit {exact bits, identity, no session}, unlock

If an image cannot be flushed, its content is unknown, whatever the bits say (flushing.py). Track is then lost until the
disk is attached anew, which begins a new epoch. Until then there are no checkpoints and no clean detach.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from lmdbitmap.errors import InvalidArgument, LmdbitmapError, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.identity import identity_to_keep
from lmdbitmap.images.image import open_image
from lmdbitmap.images.whereabouts import Whereabouts
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import points, session
from lmdbitmap.tracker.changes import Changes, Standing, changes
from lmdbitmap.tracker.front import Front
from lmdbitmap.tracker.lane import FilterLane
from lmdbitmap.tracker.period import DEFAULT_MAX_ARMED
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from lmdbitmap.tracker.tracking import Tracking, detached_error
from lmdbitmap.tracker.vouching import Voucher
from lmdbitmap.work import forks
from lmdbitmap.work.chores import Chore, Chores
from lmdbitmap.work.crew import joined, thread_refused

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
"""Seconds between signs of life, and between background passes."""
chores = Chores(INTERVAL_S)
"""The background passes of all disks that this process has attached."""
_DISARM_PER_PASS = 4096
_QUIET_PASSES = 10
"""Passes without new dirt before an extent is disarmed. A guest that writes there sooner waits for no commit."""


class Filter(Front):
    """An attached disk: the one writer of its image until `detach`. Safe for many threads.

    A `BlockDevice` and a `ServedDisk`. Its own methods find the calling thread's lane; a server takes one `lane()` per
    connection. Its store stays open until `detach`, also if it is closed before. Reads and writes raise `OSError` where
    the image does, also after `detach`.
    """

    def __init__(
        self, store: Store, disk: Disk, device: TrackableDevice, owner: Owner, *, max_armed: int
    ) -> None:
        super().__init__(device)
        self.store = store
        self._voucher = Voucher(disk.name, disk.session, device, owner)
        self._tracking = Tracking(store, disk, device, self._voucher, max_armed=max_armed)
        self._whereabouts = Whereabouts(disk.name, disk.image, device.fd)
        self._ending = threading.RLock()
        self._last_acts: list[Callable[[], None]] = []
        self._passes = Chore(f"disk {disk.name}: its background pass", self._warning_of(self._patient_pass))
        self._beats = threading.Thread(name="lmdbitmap beat")
        self._goes_on = threading.Lock()
        """Held until the beats are to end. Not an event: one whose `set` is interrupted may keep its own lock."""

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
        """Own the disk called `name` and begin a session. Its clean flag is durably cleared on return.

        If the image was written outside the filter, a new epoch begins (see continuity.py). Raises `NotFound` without
        such a disk or image, `Busy` while another process owns the disk or has the image open, `StorageError` where
        the system refuses. A crash can cost as much as `max_armed` extents, and fewer mean more commits; with 0, every
        new dirt is one. `background=False` leaves beats and passes to the caller.
        """
        if max_armed < 0:
            raise InvalidArgument(f"{max_armed} armed extents", next_step="allow 0 or more")
        attached = None
        try:
            with session.owning(store, name, open_device) as owned:
                disk = session.begin(store, owned)
                attached = cls(store, disk, owned.device, owned.owner, max_armed=max_armed)
                attached.beat()
                store.keep_open()
                owned.keep()
            forks.is_not_for_children(attached)
            if background:
                attached._begin_background()
        except BaseException:  # as by Ctrl-C: nobody else could ever let go of it
            if attached is not None and owned.kept:
                attached.abandon()
            raise
        return attached

    # -- what a server and an agent use --------------------------------------------------------------------

    @property
    def disk(self) -> Disk:
        """The disk's present description."""
        return self._tracking.disk

    @property
    def size(self) -> int:
        return self._tracking.size

    def lane(self) -> FilterLane:
        """A new lane, for one thread at a time."""
        return self._tracking.lane()

    def flush(self) -> None:
        """Flush the image. After one `StorageError` every flush raises it until the disk is attached anew."""
        self._tracking.flusher.flush()

    def close(self) -> None:
        self.detach()

    # -- points in time ------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> Checkpoint:
        """Make one durable point in time on this disk; see `take_checkpoint`."""
        return take_checkpoint([self], name)[0]

    def forget(self, name: str) -> None:
        """Delete a checkpoint; its bitmap is ORed into the one before it. Durable on return.

        Writers wait only if it is the newest checkpoint, into which they record. Raises `NotFound` without it, and
        `Busy` while a snapshot of it is held.
        """
        points.forget(self._tracking, name)

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        """The snapshots that are held now."""
        return self._tracking.snapshots

    def snapshot(self, name: str, scratch: Scratch) -> Snapshot:
        """Make a checkpoint and hold the disk as it was then, until the snapshot is released; see `take_snapshot`."""
        return take_snapshot([self], name, scratch)[0]

    # -- changes by hand -----------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """Make every block that the range touches dirty, by hand; durable on return.

        Raises `InvalidArgument` for a range outside of the disk.
        """
        with self._tracking.gate.entering(self._my_lane()) as geometry:
            blocks = geometry.blocks_outward(offset, length)
            self._tracking.mark([(blocks.start, blocks.stop)])

    def mark_regions(self, dirt: Iterable[tuple[int, bytes]], geometry: Geometry) -> None:
        """Mark many blocks in one commit: (region, bits) pairs of a disk of `geometry`, which must be this disk's.

        Raises what the store raises.
        """
        with self._tracking.gate.entering(self._my_lane()) as ours:
            if geometry != ours:
                raise InvalidArgument(
                    f"disk {self.disk.name!r} has {ours.size} bytes in blocks of {ours.granularity},"
                    f" not {geometry.size} in blocks of {geometry.granularity}",
                    next_step="try again if it was resized just now",
                )
            if self._tracking.has_track():
                self._tracking.period.add_dirt(dirt)

    def resize(self, size: int) -> None:
        """Grow (the new area is dirty) or shrink (bits past the end are gone for good) disk and image.

        Durable on return. A crash in between leaves either size, with a bitmap that is right for it. Raises `Busy`
        while a snapshot is held: its reader counts on the bits past the end.
        """
        self._tracking.resize(size)

    def start_epoch(self, reason: str) -> None:
        """Begin a new epoch in which everything is dirty. Durable on return."""
        with self._tracking.frozen():
            self._tracking.start_epoch(reason)

    # -- what is known -------------------------------------------------------------------------------------

    def persist(self) -> None:
        """Write all bits that are only in memory: the store then names exactly what is dirty at this moment.

        Raises what the store raises, and `Untrusted` where track was lost: the store then names nothing.
        """
        self._tracking.require_track()
        self._persist()

    def _persist(self) -> None:
        if not self._tracking.is_over:
            self._tracking.mark_doubts()
        self._tracking.persist()

    def changes(self, *, since: str | None = None, until: str | None = None, persist: bool = True) -> Changes:
        """Return what changed up to this moment; see changes.py. Raises what the store raises.

        Without `persist` the answer covers the changes up to the last persist, and perhaps more.
        """
        if self._voucher.lost is None and (persist or self._tracking.is_over):  # which is refused
            self._persist()
        answer = changes(self.store, self.disk.name, since=since, until=until, persisted=True)
        if self._voucher.lost is None or until is not None:
            return answer
        return dataclasses.replace(answer, standing=Standing(Trust.UNTRUSTED, self._voucher.lost))

    def standing(self) -> Standing:
        """Whether the open period's answer is exact, a superset, or worth nothing."""
        return self._tracking.standing()

    @property
    def armed_count(self) -> int:
        """Armed extents: a crash now would report each of them dirty as a whole."""
        return self._tracking.period.armed_count

    @property
    def image_lost(self) -> str | None:
        """What became of the image's name, if it no longer leads to the served image; see whereabouts.py. Else None."""
        return self._whereabouts.look()

    # -- background ----------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Leave a sign of life; see vouching.py."""
        self._voucher.beat()

    def background_pass(self) -> None:
        """Disarm extents that were quiet since the last pass. If track was lost, begin a new epoch if the store can."""
        self._pass(1)

    def _patient_pass(self) -> None:
        self._pass(_QUIET_PASSES)

    def _pass(self, quiet_passes: int) -> None:
        self.store.keep_house()
        self.regain_trust()
        self._tracking.mark_doubts()
        self._tracking.period.disarm_quiet(_DISARM_PER_PASS, passes=quiet_passes)
        self._whereabouts.look()  # last, so that a hanging file system delays nothing else

    def regain_trust(self) -> None:
        """If track was lost, begin a new epoch, which is all dirty. Raises what the store raises.

        After a failed flush of the image, do nothing: track is then lost until the disk is attached anew.
        """
        if self._voucher.lost is not None and not self._tracking.flusher.failed:
            with self._tracking.frozen():
                self._tracking.begin_again()

    def _begin_background(self) -> None:
        """Start beats and passes. If no thread can be started, abandon the disk and raise `StorageError`."""
        self._goes_on.acquire(blocking=False)
        self._beats = threading.Thread(target=self._beat_on, name="lmdbitmap beat", daemon=True)
        try:
            self._beats.start()
            chores.add(self._passes)
        except RuntimeError as refused:
            self.abandon()
            raise thread_refused(f"disk {self.disk.name!r} cannot be attached", refused) from refused

    def _beat_on(self) -> None:
        """Beat in this disk's own thread: nothing else that hangs, such as another disk's image, delays the beats."""
        beat = self._warning_of(self.beat)
        while not self._goes_on.acquire(timeout=INTERVAL_S):
            try:
                beat()
            except Exception:  # as for want of memory: without beats, a later crash would cost the bitmap
                log.exception("disk %s: a sign of life failed, and will be tried again", self.disk.name)

    def _warning_of(self, work: Callable[[], None]) -> Callable[[], None]:
        def warily() -> None:
            try:
                work()
            except (LmdbitmapError, OSError) as error:
                log.warning(
                    "disk %s: background work failed, and will be tried again: %s", self.disk.name, error
                )

        return warily

    # -- the end -------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """End the session cleanly: bits exact and durable, image flushed, clean flag set. Idempotent.

        If the store refuses, the session stays open on disk, and the next attach takes that for a crash. An interrupt
        (Ctrl-C) is raised after the disk was let go of. Only while writes are in flight is it raised at once; the disk
        then stays attached.
        """
        self._end(self._end_session, self._mark_last_doubts)

    def at_detach(self, act: Callable[[], None]) -> None:
        """Have `act` called when a clean detach is durable, while the disk is still owned and no writer can write.

        `act` is not called if the session cannot be ended cleanly or is abandoned.
        """
        self._last_acts.append(act)

    def abandon(self) -> None:
        """Release everything at once and write nothing more, as a crash would."""
        self._end(lambda: None)

    def _end(self, last_act: Callable[[], None], before: Callable[[], None] = lambda: None) -> None:
        with self._ending:  # another thread that ends the disk waits here
            if self._tracking.is_over:
                return
            self._tracking.is_over = True
            try:
                # Steps run in reverse order; each runs even if the one before was interrupted (Ctrl-C).
                with contextlib.ExitStack() as steps:
                    steps.callback(self._end_now, last_act)
                    steps.callback(before)
                    steps.callback(self._stop_background)
            except BaseException:  # interrupted while writes were in flight, or before: it can be ended again
                self._tracking.is_over = self._tracking.gate.is_shut
                has_ended = self._beats.ident is not None and not self._beats.is_alive()
                if has_ended and not self._tracking.is_over:
                    self._begin_background()
                raise

    def _end_now(self, last_act: Callable[[], None]) -> None:
        with self._tracking.shutting(detached_error(self.disk)):
            try:
                last_act()
            finally:
                self._let_go()

    def _mark_last_doubts(self) -> None:
        with contextlib.suppress(LmdbitmapError):  # a store that refuses these also refuses the next step
            self._tracking.mark_doubts()

    def _stop_background(self) -> None:
        with contextlib.ExitStack() as steps:  # as in `_end`
            for _ in range(2):  # one that is interrupted may have done nothing
                steps.callback(self._end_beats)
            steps.callback(chores.end, self._passes)

    def _end_beats(self) -> None:
        if self._goes_on.locked():
            self._goes_on.release()
        joined(self._beats)

    def _end_session(self) -> None:
        self.flush()
        with contextlib.suppress(LmdbitmapError):  # the commit below says more than a sign of life
            self.beat()
        if self._voucher.lost is None and not self._tracking.is_astray:
            self._tracking.end_session(identity_to_keep(self.device))
            for act in self._last_acts:
                act()

    def _let_go(self) -> None:
        """Close everything. The disk may have another owner at once, so nothing may be written from here on."""
        with contextlib.ExitStack() as each:  # in reverse order; each runs even if another fails
            each.callback(self.store.let_go)
            for _ in range(2):  # one that is interrupted may have closed nothing, and nobody lets go again
                each.callback(self._voucher.close)
                each.callback(self.device.close)
            each.callback(self._whereabouts.end)
            each.callback(self._tracking.let_go, detached_error(self.disk))

    def forsake(self) -> None:
        """Give up the disk in a forked child: its writes would be untracked, and the locks stay the parent's alone."""
        self._tracking.is_over = True
        self._ending = threading.RLock()
        self._tracking.gate.forsake(_inherited_error(self.disk))
        if self.device.fd is not None:  # closing a connection would end the parent's too
            self.device.close()
        self._voucher.forsake()

    def __enter__(self) -> Filter:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def take_checkpoint(filters: Sequence[Filter], name: str) -> list[Checkpoint]:
    """Make one durable point in time on all disks, or on none. All filters are of one store.

    Writes in flight are drained first. Writes that wait complete in the new period (law 2). Extents that are being
    written stay armed in the new period, so that their writers do not all commit at once.

    Returns after the images are flushed, so that a power cut cannot take back a write that the new period calls clean.
    The writers go on meanwhile. If an image cannot be flushed, the checkpoint is lost again.

    Raises `AlreadyExists` if a disk has a checkpoint of that name, `InvalidArgument` for a name that is none, for no
    filters, two of one disk or of two stores, and `StorageError` where an image cannot be flushed.
    """
    return points.checkpoint([attached._tracking for attached in filters], name)


def take_snapshot(filters: Sequence[Filter], name: str, scratch: Scratch) -> list[Snapshot]:
    """Take a checkpoint as `take_checkpoint` does, and hold all disks as they are then until their snapshots end.

    Each snapshot keeps old data in its own scratch file, and ends with its filter. Raises as `take_checkpoint` does,
    `NotFound` without the scratch folder, and `StorageError` if no scratch file can be made there; then there is no
    checkpoint.
    """
    return points.snapshot([attached._tracking for attached in filters], name, scratch)


def _inherited_error(disk: Disk) -> StorageError:
    return StorageError(
        f"disk {disk.name!r}",
        OSError(errno.ESHUTDOWN, "it was attached before this process was forked"),
        next_step="attach it in the process that writes, and write nowhere else",
    )
