"""Backups of disks, served or not: one qcow2 image per disk and backup, stacked on the image before.

Law 3: the archive is durable before anything forgets that it was needed. The order follows from it:

    get at the disks (access.py)         own them, or reach their owner; if continuity is not proven, a new epoch begins
    lock their folders                   no other run backs up here
    undo what a killed run left          its image is deleted, its checkpoint is merged into the one before
    note what will be made, synced       in the folder and in the store: identifies a run that dies from here on
    checkpoint, on all disks at once     the point in time that the images will hold
    copy, sync, rename the image         the digests of its chunks get their name before the image does
    note that it is held, synced         a manifest may name the checkpoint from now on
    replace the manifest, synced         the archive is durable
    forget checkpoints                   this repository's, if no later backup counts from them; and those nobody holds
    mend what is damaged                 after a full backup only: no later backup needs the older records
    drop the note

A death at any step costs this run's work: its checkpoint keeps recording, or is merged away. The next backup counts
from the last checkpoint in the manifest, whatever happened since.

A disk that fails by itself is left out, before or after the checkpoint. What was made of it is undone at once, and the
other disks go on as if it had not been named. The checkpoint is taken on all disks that take part, or on none.

A repository forgets only checkpoints that its own manifest or note names and no other repository holds (holds.py), and
those that nobody holds any more (consumers.py). So any number of repositories can back up one disk. A repository holds
two checkpoints: the newest backup's, for increments, and the newest full backup's, for differential backups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lmdbitmap.access.access import Access, AccessTerms, access, open_to_read
from lmdbitmap.access.routes import FREEZE_LIMIT_S, OWNER_LIMIT_S, PointInTime, Quiesced
from lmdbitmap.backups import consumers
from lmdbitmap.backups.folder_owner import Permission
from lmdbitmap.backups.image import DiskBackup, ImagePlan, ParentDamaged, write_image
from lmdbitmap.backups.leftovers import forget, undo_unfinished
from lmdbitmap.backups.plan import newest
from lmdbitmap.backups.preparing import UNREADABLE, Preparation, WantedBackup
from lmdbitmap.backups.result import BackupResult, BackupsFailed
from lmdbitmap.copying import digest_algorithms
from lmdbitmap.copying.readable import Metered
from lmdbitmap.errors import Busy, LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.notes.holds import UnderWay
from lmdbitmap.notes.references import CheckpointRef
from lmdbitmap.qcow2.compression import Compression, chosen
from lmdbitmap.repository.manifest import BackupType, Manifest
from lmdbitmap.repository.repository import refuse_folder_of_disk
from lmdbitmap.repository.unfinished import Unfinished
from lmdbitmap.storage import creating, mending
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.session import OpenDevice
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.names import known_member, require_names
from lmdbitmap.work.pace import Pace, pace_of
from lmdbitmap.work.patience import Patience
from lmdbitmap.work.progress import Progress, Report

log = logging.getLogger(__name__)


def backup(
    store: Store,
    names: Sequence[str],
    repository_path: str | os.PathLike[str],
    *,
    kind: BackupType = BackupType.INCREMENTAL,
    only_that: bool = False,
    attached: Mapping[str, Filter] | None = None,
    scratch: Scratch | None = None,
    quiesced: Quiesced = contextlib.nullcontext,
    freeze_limit_s: float = FREEZE_LIMIT_S,
    progress: Progress | None = None,
    open_device: OpenDevice = open_to_read,
    compression: str | None = None,
    digest: str | None = None,
    bytes_per_s: int | None = None,
    owner_limit_s: float = OWNER_LIMIT_S,
    lock_wait_s: float = 0.0,
    take_over: bool = False,
    new_repository: bool = False,
) -> list[BackupResult]:
    """Back up disks as they are at one point in time. Every backup is durable on return.

    Disks that another process serves are read through it. Disks in `attached` are read through these filters of this
    process, which keep old data in `scratch`. Guests go on in both cases. The checkpoint is taken inside `quiesced()`,
    which may ask a guest to bring its file systems in order. A process that serves the disks has `freeze_limit_s` to
    take it, during which a guest stays frozen. After that the backup fails with `Busy`.

    If no bitmap can say what an incremental or differential backup has to hold, the disk is compared with its last
    backup (a rescan). If that backup is not whole, a full one is made. The entry gives the reason. With `only_that`,
    `Untrusted` is raised instead and no backup is made. A disk that was changed while nobody tracked it begins a new
    epoch all the same: `adopt` comes too late then. `changes_of` tells before.

    - `owner_limit_s` is how long a process through which a disk is read may send nothing; then the backup fails
      (`Busy`).
    - `lock_wait_s` is how long the run waits, in all, for another run that uses a disk's folder, and for a program that
      has a disk or its image for itself, such as another backup of an unserved disk; then it is `Busy`. It holds no
      disk meanwhile.
    - `bytes_per_s` limits the rate at which all disks together are read.
    - `compression` is `zlib` or `zstd`, or one of them with `:LEVEL`; None stores clusters as they are.
    - `digest` is `sha256` or `blake3`. With None a chain keeps the algorithm of its newest backup, and a new chain
      begins with the fastest one available.
    - `take_over` accepts a folder with the backups of another disk of the same name, which is refused (`AlreadyExists`)
      without it. It says that they are this very disk's, which was tracked elsewhere or added anew. Its next backup is
      then a rescan of them, and the folder is this disk's from then on.
    - `new_repository` begins another repository in an empty place to which the store knows that a disk was backed up.
      Without it that is `NotFound`: a file system may not be mounted.

    Raises `Busy` if another program holds a disk or image, or backs up to a folder; `OwnerGone` if a process through
    which a disk is read ends meanwhile; `NotFound` without such a disk or image, or the package for what was asked for;
    `FormatError` for a manifest that cannot be read; `StorageError` if a snapshot broke. If one of several disks fails
    for such a reason it is left out, and `BackupsFailed` reports it when the others are done. What `progress` or
    `quiesced` raises ends the run.
    """
    packing, pace = None if compression is None else chosen(compression), pace_of(bytes_per_s)
    algorithm = None if digest is None else digest_algorithms.named(digest)
    creating.refuse_inside(repository_path)
    refuse_folder_of_disk(repository_path)
    require_names(names)
    terms = AccessTerms(open_device, attached, scratch, owner_limit_s, freeze_limit_s, Patience(lock_wait_s))
    terms.require_sense()
    failures = Failures(at_once=len(names) == 1)
    wanted_kind = known_member(BackupType, kind, f"kind of backup {kind!r}")
    permission = Permission(take_over, new_repository)
    wanted = WantedBackup(repository_path, wanted_kind, algorithm, only_that, permission)
    preparation = Preparation(store, wanted, terms.patience, failures)
    carrying = _Carrying(quiesced, failures.heeding(progress), packing, pace)
    with contextlib.ExitStack() as locks, _told(failures):
        places = preparation.locked_folders(names, locks)
        there = [name for name in names if name in places]
        route = locks.enter_context(access(store, there, terms, failures))
        results = _carried_out(store, route, preparation.jobs(route, places), carrying, failures)
    if failures.errors:
        raise BackupsFailed(results, failures.errors)
    return results


class _Carrying(NamedTuple):
    """How a backup is made, independent of what it has to hold."""

    quiesced: Quiesced
    listener: Progress | None
    packing: Compression | None
    pace: Pace | None


def _carried_out(
    store: Store, route: Access, jobs: Sequence[DiskBackup], carrying: _Carrying, failures: Failures
) -> list[BackupResult]:
    """Take the checkpoint and make the backups. On any failure, undo the disks that are not done."""
    try:
        sources = _one_point_in_time(store, route, jobs, carrying.quiesced, failures)
        return _made(store, sources, carrying, failures)
    except BaseException:
        route.end_reading()
        for job in jobs:
            if job.disk.name not in failures:
                _undo_after_failure(store, job)
        raise


@contextlib.contextmanager
def _told(failures: Failures) -> Iterator[None]:
    """If the whole run fails, log the disks that had been left out before."""
    try:
        yield
    except BaseException:
        for name, error in failures.errors.items():
            log.error("disk %s was left out: %s", name, error)
        raise


@contextlib.contextmanager
def _apart(
    failures: Failures, store: Store, job: DiskBackup, point: PointInTime | None = None
) -> Iterator[None]:
    """If the block fails for one of several disks, undo that disk; the others go on."""
    with failures.of(job.disk.name):
        try:
            yield
        except (LmdbitmapError, OSError):
            if not failures.at_once:  # otherwise `_carried_out` undoes all of them together
                if point is not None:
                    job.access.let_go(point)
                _undo_after_failure(store, job)
            raise


# --- the checkpoint ---


def _one_point_in_time(
    store: Store,
    route: Access,
    jobs: Sequence[DiskBackup],
    quiesced: Quiesced,
    failures: Failures,
) -> list[ImagePlan]:
    """Note what will be made, then take one checkpoint on all disks that take part, or on none."""
    time_ns = time.time_ns()
    name = Maker.BACKUP.new_name(time_ns)
    for job in jobs:
        with _apart(failures, store, job):
            _note(store, job, name, time_ns)
        if job.disk.name in failures:
            route.leave_out(job.disk)
    taking_part = [job for job in jobs if job.disk.name not in failures]
    if not taking_part:
        return []
    once = not any(job.plan.compares for job in taking_part)
    points = route.take_point(name, [job.plan.since for job in taking_part], quiesced, once=once)
    sources = []
    for job, point in zip(taking_part, points, strict=True):
        with _apart(failures, store, job, point):
            sources.append(_source(store, job, point))
    return sources


def _note(store: Store, job: DiskBackup, name: str, time_ns: int) -> None:
    job.folder.note_unfinished([*job.leftovers, Unfinished(name, job.file)])
    held = _still_there(store, job, _counted_from(job.manifest, job.disk))
    job.hold.begin(job.folder.repository_path, held, UnderWay(name), time_ns)


def _source(store: Store, job: DiskBackup, point: PointInTime) -> ImagePlan:
    if point.checkpoint.epoch != job.disk.epoch:
        raise Busy(
            f"tracking of disk {job.disk.name!r} began again just now: {point.disk.epoch_reason}",
            next_step="make the backup again",
        )
    return ImagePlan.of(store, job, point)


# --- the archive, and what is done once it is durable ---


def _made(
    store: Store,
    sources: Sequence[ImagePlan],
    carrying: _Carrying,
    failures: Failures,
) -> list[BackupResult]:
    """Make the images; return the results of the disks that succeed. In progress, the rest of a failed disk is done."""
    rest = sum(source.bytes_to_copy for source in sources)
    report, results = Report(carrying.listener, rest), []
    for source in sources:
        with _apart(failures, store, source.job, source.point):
            results.append(_make(store, source, report, carrying))
        rest -= source.bytes_to_copy
        report.reach_all_but(rest)
    return results


def _make(store: Store, source: ImagePlan, report: Report, carrying: _Carrying) -> BackupResult:
    started = time.monotonic()
    device = Metered(source.point.device, carrying.pace)
    try:
        entry = write_image(source, device, report, carrying.packing)
    except ParentDamaged as damaged:
        source = source.without_comparison(damaged.error)
        report.expect(source.bytes_to_copy)
        entry = write_image(source, device, report, carrying.packing)
    job = source.job
    released = tuple(_still_there(store, job, job.manifest.released))
    job.hold.keep(entry.checkpoint, time.time_ns())
    manifest = dataclasses.replace(job.manifest, backups=(*job.manifest.backups, entry), released=released)
    job.folder.replace_manifest(manifest, keep_old=job.plan.reason == UNREADABLE)
    _forget_unneeded(store, source, manifest)  # law 3: not before this line
    job.folder.drop_note()
    path, seconds = job.folder.path_of(entry.file), time.monotonic() - started
    return BackupResult(job.disk.name, entry, path, device.bytes_read, seconds, job.digests.reason)


def _still_there(
    store: Store, job: DiskBackup, checkpoints: Sequence[CheckpointRef]
) -> Sequence[CheckpointRef]:
    """Return those of `checkpoints` that the store still has."""
    with store.read() as reader:
        members = {member.uuid for member in reader.checkpoints(job.disk.uuid)}
    return [checkpoint for checkpoint in checkpoints if checkpoint.uuid in members]


def _counted_from(manifest: Manifest, disk: Disk) -> Sequence[CheckpointRef]:
    """Return the checkpoints that later backups count from: the newest backup's, and the newest full one's."""
    entries = (newest(manifest, full=True), newest(manifest))
    found = {entry.checkpoint: None for entry in entries if entry and entry.epoch == disk.epoch}
    return list(found)


def _forget_unneeded(store: Store, source: ImagePlan, manifest: Manifest) -> None:
    """Forget checkpoints that no later backup counts from. A failure is only logged: the backup is made."""
    job, disk = source.job, source.point.disk
    assert manifest.holder is not None
    held = {entry.checkpoint.uuid for entry in manifest.backups}
    held |= {checkpoint.uuid for checkpoint in manifest.released}
    needed = {checkpoint.uuid for checkpoint in _counted_from(manifest, disk)}
    abandoned = {work.checkpoint for work in job.leftovers}
    try:
        unneeded = held - needed - consumers.held_by_others(store, disk, manifest.holder)
        stay = forget(job.access, disk, lambda member: member.uuid in unneeded or member.name in abandoned)
        for name in abandoned & set(stay):
            log.warning(
                "disk %s: checkpoint %s of a backup that gave up is held still, and stays", disk.name, name
            )
        if job.plan.type_actual is BackupType.FULL and job.access.holds_alone:
            mending.mend_closed_periods(store, disk)
    except LmdbitmapError as error:
        log.warning("disk %s: old checkpoints stay until the next backup: %s", disk.name, error)
    consumers.merge_unheld(store, job.access, disk)


# --- after a failure ---


def _undo_after_failure(store: Store, job: DiskBackup) -> None:
    try:
        others = [work.checkpoint for work in job.leftovers]
        undo_unfinished(job.access, job.disk, job.folder, others)
        with store.read() as reader:
            members = reader.checkpoints(job.disk.uuid)
        job.hold.settle(members)
    except LmdbitmapError as error:
        log.warning("disk %s: the next backup will clean up after this one: %s", job.disk.name, error)
