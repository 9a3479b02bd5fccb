"""A second copy of a disk, kept up to date in place: a raw file, a block device, or what an NBD server exports.

Law 3: the copy is durable before anything forgets that it was needed. The order follows from it:

    lock the note, get at the disk       no other sync writes this target; if continuity is not proven, a new epoch
    forget what a killed run left        its checkpoint is merged into the one before
    decide                               plan.py: incremental, compare or full
    note the checkpoint's name, synced   identifies a run that is killed from here on
    take the point                       what the copy will hold; the guest writes on
    mark the target                      a file that bears another mark was written by another sync
    note that a sync is under way        synced, before the first write: from now on we change the target
    copy, flush the target               the copy is durable
    prove the point                      all that was read is the disk of that moment
    note where the copy is               synced: the checkpoint, and what the target is now
    forget the checkpoint before         nothing counts from it any more

A death or a failure at any step costs this run's work. The note still names the checkpoint before, so the next sync
copies what changed since that one, and with it all that the dead run may have touched. If there was no checkpoint to
count from, the next sync compares, and writes only what is not right yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmdbitmap import bits
from lmdbitmap.access.access import Access, AccessTerms, access, open_to_read, reading
from lmdbitmap.access.routes import FREEZE_LIMIT_S, OWNER_LIMIT_S, PointInTime, Quiesced
from lmdbitmap.backups import consumers
from lmdbitmap.bits import Run
from lmdbitmap.copying.pieces import Pieces
from lmdbitmap.copying.readable import Metered
from lmdbitmap.errors import Busy, LmdbitmapError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.image import lasting_name
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.notes.references import Reason
from lmdbitmap.notes.sync_note import At, NoteFile, Sizes
from lmdbitmap.qcow2.layout import cluster_bits_for
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.syncs.mirror import BlindMirror, Mending, Mirror
from lmdbitmap.syncs.plan import SyncKind, SyncPlan, plan_for
from lmdbitmap.syncs.target import SyncTarget, refuse_target
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import changes_since
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.session import OpenDevice
from lmdbitmap.work.pace import Pace, pace_of
from lmdbitmap.work.patience import Patience
from lmdbitmap.work.progress import Progress, Report

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SyncResult:
    """A copy that is up to date. `reason` says why the sync was not incremental, if that was not asked for."""

    disk: str
    target: str
    kind: SyncKind
    reason: Reason | None
    checkpoint: str
    """The point in time that the target holds."""
    size: int
    trust: Trust
    """`SUPERSET` if blocks that had not changed may have been copied too, as after a crash."""
    bytes_changed: int
    """Bytes of the disk that a bitmap names, or that were found to differ; all for a full sync."""
    bytes_read: int
    """Bytes read of the disk."""
    bytes_compared: int
    """Bytes read of the target."""
    bytes_written: int
    bytes_zeroed: int
    seconds: float
    bytes_behind: int = 0
    """Bytes of the target behind the disk's end: they are zeroes."""


def sync(
    store: Store,
    name: str,
    target: str | os.PathLike[str],
    *,
    compare: bool = False,
    only_incremental: bool = False,
    larger: bool = False,
    attached: Mapping[str, Filter] | None = None,
    scratch: Scratch | None = None,
    quiesced: Quiesced = contextlib.nullcontext,
    freeze_limit_s: float = FREEZE_LIMIT_S,
    progress: Progress | None = None,
    open_device: OpenDevice = open_to_read,
    bytes_per_s: int | None = None,
    owner_limit_s: float = OWNER_LIMIT_S,
    lock_wait_s: float = 0.0,
) -> SyncResult:
    """Make `target`, a path or an NBD URI, what the disk called `name` is now; durable on return.

    Only what changed since the last sync to that target is copied, if that is known. `compare` reads both in any case;
    `only_incremental` raises `Untrusted` if it is not known, and does nothing. `larger` allows a target larger than the
    disk; everything behind the disk is zeroed. `attached`, `scratch`, `quiesced`, `bytes_per_s` and `owner_limit_s` are
    as for a backup. The sync waits up to `lock_wait_s` in all for another sync to the same target, and for a program
    that has the disk or its image for itself. Nobody else may write the target.

    Raises `InvalidArgument` and `AlreadyExists` for a target that does not fit, `Busy` if another program holds the
    disk or the target, `NotFound` without such a disk or image, `StorageError` if a snapshot broke. The target is
    neither the old copy nor the new one then: sync again.
    """
    pace = pace_of(bytes_per_s)
    terms = AccessTerms(open_device, attached, scratch, owner_limit_s, freeze_limit_s, Patience(lock_wait_s))
    terms.require_sense()
    place = lasting_name(os.fspath(target))
    disk = chain.disk_called(store, name)
    refuse_target(store, disk, place)
    notes = NoteFile.of(store.path, disk.uuid, place)
    with contextlib.ExitStack() as held:
        held.enter_context(notes.locked(terms.patience))
        route = held.enter_context(access(store, [name], terms))
        started = time.monotonic()
        refuse_target(store, route.disks[0], place)  # again: this may have waited for others
        copy = held.enter_context(contextlib.closing(SyncTarget(place, larger=larger)))
        if copy.is_far:
            copy.flush()  # before any of what it holds is believed: see targets/target.py
        _require_same(disk, route)
        job = _prepare(store, route, notes, copy, pace, compare=compare)
        if only_incremental:
            _require_incremental(job)
        done = _carry_out(store, job, quiesced, progress)
    return dataclasses.replace(done, seconds=time.monotonic() - started)


def _require_same(disk: Disk, route: Access) -> None:
    """Raise `Busy` if the disk is not the one that was looked up before the wait for the lock."""
    if route.disks[0].uuid != disk.uuid:
        raise Busy(f"disk {disk.name!r} was removed and added anew just now", next_step="sync again")


@dataclass(frozen=True, slots=True)
class _DiskSync:
    access: Access
    disk: Disk
    notes: NoteFile
    target: SyncTarget
    plan: SyncPlan
    is_copy: bool
    """Whether earlier syncs have written to the target."""
    pace: Pace | None

    def bytes_behind(self, size: int) -> int:
        """Return the bytes of the target behind the disk that are not known to be zero.

        A sync that died may have written there when the disk was larger.
        """
        note = self.notes.note
        is_known = self.plan.kind is SyncKind.INCREMENTAL and note.at is not None and not note.under_way
        return self.target.bytes_behind(size, note.at.sizes if note.at is not None and is_known else None)

    def require_fit(self, size: int) -> None:
        self.target.require_fit(size, is_copy=self.is_copy)


def _prepare(
    store: Store, route: Access, notes: NoteFile, copy: SyncTarget, pace: Pace | None, *, compare: bool
) -> _DiskSync:
    [disk] = route.disks
    copy.refuse_itself(disk)
    plan = plan_for(store, disk, notes.note, copy, compare=compare)
    is_same = plan.reason is None or plan.reason.code != "target-changed"
    job = _DiskSync(route, disk, notes, copy, plan, notes.note.is_of_a_copy and is_same, pace)
    job.require_fit(disk.size)
    return job


def _require_incremental(job: _DiskSync) -> None:
    if job.plan.kind is not SyncKind.INCREMENTAL:
        reason = "a comparison was asked for" if job.plan.reason is None else job.plan.reason.words
        raise Untrusted(
            f"{job.target.place} cannot be brought up to date incrementally: {reason}",
            next_step="leave out --require-incremental",
        )


def _carry_out(
    store: Store,
    job: _DiskSync,
    quiesced: Quiesced,
    progress: Progress | None,
) -> SyncResult:
    _forget_unneeded(job)  # left by killed runs
    name = Maker.SYNC.new_name(time.time_ns())
    try:
        point = _point_in_time(job, name, quiesced)
        made = _copied(store, job, point, progress)
        job.target.flush()
        job.access.prove(point)
        _note_where_it_is(job, point)
    except BaseException:
        job.access.end_reading()
        _note_how_it_was_left(job)
        _forget_unneeded(job)  # this run's checkpoint; the note says what it wrote to the target
        raise
    _forget_unneeded(job)  # law 3: not before the note says where the copy is
    consumers.merge_unheld(store, job.access, job.disk)
    return made


# --- the point in time ---


def _point_in_time(job: _DiskSync, name: str, quiesced: Quiesced) -> PointInTime:
    note = job.notes.note
    job.notes.replace(dataclasses.replace(note, unneeded=(*note.unneeded, name)))
    [point] = job.access.take_point(name, [job.plan.since], quiesced, once=True)
    if point.checkpoint.epoch != job.disk.epoch:
        raise Busy(
            f"tracking of disk {job.disk.name!r} began again just now: {point.disk.epoch_reason}",
            next_step="sync again",
        )
    job.require_fit(point.disk.size)  # again: it may have been resized
    return point


# --- the copy ---


def _copied(store: Store, job: _DiskSync, point: PointInTime, progress: Progress | None) -> SyncResult:
    disk, target, plan = point.disk, job.target, job.plan
    clusters = Geometry(disk.size, cluster_bits_for(disk.geometry))
    runs, bytes_changed, trust = _what_to_copy(store, plan, point, clusters)
    is_fresh, behind = plan.kind is SyncKind.FULL, job.bytes_behind(disk.size)
    report = Report(progress, bytes_changed + behind)
    if plan.kind is not SyncKind.INCREMENTAL or bytes_changed or target.needs_fitting(disk.size, behind):
        _note_under_way(job)
        target.fit(disk.size, behind, report.advance)
    open_target = target.writable(is_fresh=is_fresh)
    mirror: Mirror = Mending(open_target) if plan.kind is SyncKind.COMPARE else BlindMirror(open_target)
    source = Metered(point.device, job.pace)
    pieces = Pieces(source, clusters)
    with reading(job.access, point), contextlib.closing(pieces.of_all(runs)) as found:
        for piece in found:
            mirror.put(piece)
            report.advance(piece.length)
    if plan.kind is SyncKind.COMPARE:
        bytes_changed = mirror.bytes_written + mirror.bytes_zeroed
    return SyncResult(
        disk.name, target.place, plan.kind, plan.reason, point.checkpoint.name, disk.size, trust, bytes_changed,
        source.bytes_read, mirror.bytes_compared, mirror.bytes_written, mirror.bytes_zeroed, seconds=0,
        bytes_behind=target.size - disk.size,
    )  # fmt: skip


def _what_to_copy(
    store: Store, plan: SyncPlan, point: PointInTime, clusters: Geometry
) -> tuple[Iterator[Run], int, Trust]:
    """Return ascending runs of `clusters`, their bytes, and how far they can be trusted."""
    disk = point.disk
    if plan.since is None:
        return iter([(0, clusters.block_count)]), disk.size, Trust.EXACT
    changed = changes_since(store, disk.name, plan.since, point.checkpoint.name)
    summary = changed.summary
    runs = bits.regrain_outward(changed.runs(), changed.geometry, clusters.granularity_bits)
    return runs, summary.dirty_bytes, summary.standing.trust


# --- the note ---


def _note_under_way(job: _DiskSync) -> None:
    """Note that we change the target from now on. Drop its checkpoint if it cannot be counted from.

    The mark comes first. A death between the two leaves the mtime, by which the note before knows the target, as it
    was; a note of an interrupted sync takes the new mark for another sync's.
    """
    note = job.notes.note
    mark = job.target.put_new_mark()
    if job.plan.kind is not SyncKind.INCREMENTAL:
        note = dataclasses.replace(note, at=None, unneeded=_with_old(note.unneeded, note.at))
    job.notes.replace(dataclasses.replace(note, under_way=True, mark=mark))


def _note_where_it_is(job: _DiskSync, point: PointInTime) -> None:
    note, checkpoint = job.notes.note, point.checkpoint
    unneeded = tuple(name for name in note.unneeded if name != checkpoint.name)
    sizes = Sizes(point.disk.size, job.target.size)
    at = At(checkpoint.uuid, checkpoint.name, point.disk.epoch, job.target.identity_to_keep(), sizes)
    job.notes.replace(
        dataclasses.replace(note, at=at, under_way=False, mark=None, unneeded=_with_old(unneeded, note.at))
    )


def _note_how_it_was_left(job: _DiskSync) -> None:
    """Let a write by others be noticed before the next sync, where a run that fails can still say what it left.

    The target still equals the disk as `at` says, if this run found it so: what was put in its place after a killed
    sync is not vouched for. Nothing is known of the space behind the disk.
    """
    note = job.notes.note
    if job.plan.kind is not SyncKind.INCREMENTAL or note.at is None:
        return
    if not note.under_way or job.target.is_far:
        return
    with contextlib.suppress(LmdbitmapError, OSError):  # then the note stays that of a sync under way
        job.target.flush()
        at = note.at._replace(identity=job.target.identity_to_keep(), sizes=None)
        job.notes.replace(dataclasses.replace(note, at=at, under_way=False, mark=None))


def _with_old(unneeded: tuple[str, ...], at: At | None) -> tuple[str, ...]:
    return unneeded if at is None else (*unneeded, at.name)


def _forget_unneeded(job: _DiskSync) -> None:
    """Merge checkpoints that nobody counts from into the ones before. On failure the next sync tries again."""
    note = job.notes.note
    if not note.unneeded:
        return
    names = {name for name in note.unneeded if Maker.SYNC.named(name)}
    try:
        stay = job.access.forget(job.disk, lambda member: member.name in names)
        job.notes.replace(dataclasses.replace(note, unneeded=tuple(stay)))
    except LmdbitmapError as error:
        log.warning("disk %s: old checkpoints stay until the next sync: %s", job.disk.name, error)
