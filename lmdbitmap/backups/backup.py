"""Backups of disks, served or not: one qcow2 image each, stacked on the one before.

Law 3: the archive is durable before anything forgets that it was needed. From that follows the order:

    get at the disks (access.py)         own them, or reach who does; what is not known begins a new epoch
    lock their folders                   nobody else backs up here
    undo what a killed run left          its image goes, its checkpoint is merged into the one before
    note what will be made, synced       in the folder and in the store: a run that died from here on is known by it
    checkpoint, on all disks at once     the point in time that the images will hold
    copy, sync, rename the image         the digests of its chunks get their name before it
    note that it is held, synced         a manifest may name the checkpoint from now on
    replace the manifest, synced         the archive is durable
    forget checkpoints                   of this repository, if no coming backup counts from them; and what nobody holds
    mend what is damaged                 of a full backup: no coming one needs what older records said
    drop the note

A death anywhere costs this run's work: its checkpoint records on, or is merged away, and the next backup
counts from the last one in the manifest, whatever happened since.

A disk that fails by itself is left out, before the checkpoint or after it; what was made of it is undone at once, and
the others go on as if it had not been named. The moment is one of all that take part in it, or of none.

A repository forgets checkpoints that its own manifest or note names and no other one holds (holds.py), and those that
nobody holds any more (consumers.py), so that any number of them can back up one disk. It holds two: the newest
backup's, for increments, and the newest full one's, for differential backups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple
from uuid import uuid4

from lmdbitmap.access.access import Access, AccessTerms, access, open_to_read
from lmdbitmap.access.routes import FREEZE_LIMIT_S, OWNER_LIMIT_S, PointInTime
from lmdbitmap.backups import consumers, folder_owner
from lmdbitmap.backups.folder_owner import Permission
from lmdbitmap.backups.image import DiskBackup, ImagePlan, ParentDamaged, write_image
from lmdbitmap.backups.leftovers import forget, undo_unfinished
from lmdbitmap.backups.plan import BackupPlan, digests_for, newest, plan_for
from lmdbitmap.backups.result import BackupResult, BackupsFailed
from lmdbitmap.copying import digest_algorithms
from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.copying.readable import Metered
from lmdbitmap.errors import Busy, FormatError, InvalidArgument, LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.notes.holds import HoldFile, UnderWay
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.qcow2.compression import Compression, chosen
from lmdbitmap.repository.manifest import BackupType, Manifest, NewerManifest
from lmdbitmap.repository.repository import BackupFolder, Unfinished
from lmdbitmap.storage import creating, mending
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.session import OpenDevice
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.pace import Pace, pace_of
from lmdbitmap.work.patience import Patience
from lmdbitmap.work.progress import Progress, Report

log = logging.getLogger(__name__)

_UNREADABLE = Reason(
    "manifest-unreadable", "the manifest is missing or damaged: older images stay, and a new chain begins"
)


def backup(
    store: Store,
    names: Sequence[str],
    repository_path: str | os.PathLike[str],
    *,
    kind: BackupType = BackupType.INCREMENTAL,
    only_that: bool = False,
    attached: Mapping[str, Filter] | None = None,
    scratch: Scratch | None = None,
    quiesced: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
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
    """Back up disks as they are at one point in time; every backup is durable when this returns.

    Disks that another process serves are read through it, those of `attached` through these filters of ours, which
    keep old data where `scratch` says; their guests go on. In `quiesced()` the moment is taken: a guest may be
    asked there to bring its file systems in order. A process that serves the disks may take `freeze_limit_s` for that,
    in which a guest stays frozen; then the backup fails, as `Busy`.

    Where no bitmap can say what an incremental or differential backup has to hold, the disk is compared with its last
    backup (a rescan), and where that is not whole, a full one is made; the entry says why. With `only_that` it is
    `Untrusted` instead, and nothing is done.
    A process through which a disk is read may send nothing for `owner_limit_s`; then the backup fails (`Busy`).
    Another run that uses the folder of a disk, and a program that has a disk or its image for itself, as another backup
    of a disk that nobody serves, is waited for, for `lock_wait_s` in all; then it is `Busy`. Who waits holds no disk.
    With `bytes_per_s` the disks are read no faster than that, all of them together.
    `compression` is `zlib` or `zstd`, or one of them with `:LEVEL`; None stores clusters as they are.
    `digest` is `sha256` or `blake3`; with None a chain goes on with that of its newest backup, and a new one begins
    with the fastest that there is.
    A folder that has the backups of another disk of the same name is refused (`AlreadyExists`). With `take_over` they
    are this very disk's, which was tracked elsewhere, or added anew: the next one is a rescan of them, and the folder
    this disk's from then on. Where the store knows that the disk was backed up to that place, and nothing is there, it
    is `NotFound`: as when a file system is not mounted. With `new_repository` another one begins.
    Raises `Busy` for a disk or image that somebody else holds, and for a folder that somebody backs up to;
    `OwnerGone` where a process through which a disk is read ends meanwhile;
    `NotFound` without such a disk or image, or the package for what was asked for; `FormatError` for a manifest that
    cannot be read; `StorageError` where a snapshot broke. Of several disks one that fails for such a reason is left
    out, and `BackupsFailed` tells of it when the others are done; what `progress` or `quiesced` raises ends the run.
    """
    packing, pace = None if compression is None else chosen(compression), pace_of(bytes_per_s)
    algorithm = None if digest is None else digest_algorithms.named(digest)
    creating.refuse_inside(repository_path)
    if len(set(names)) != len(names):
        raise InvalidArgument("a disk is named twice", next_step="name each disk once")
    terms = AccessTerms(open_device, attached, scratch, owner_limit_s, freeze_limit_s, Patience(lock_wait_s))
    terms.require_sense()
    failures = Failures(at_once=len(names) == 1)
    wanted = _WantedBackup(repository_path, kind, algorithm, only_that, Permission(take_over, new_repository))
    carrying = _Carrying(quiesced, failures.heeding(progress), packing, pace)
    with contextlib.ExitStack() as locks, _told(failures):
        places = _locked_places(store, names, wanted, terms.patience, locks, failures)
        there = [name for name in names if name in places]
        route = locks.enter_context(access(store, there, terms, failures))
        jobs = _prepared(store, route, places, wanted, failures)
        results = _carried_out(store, route, jobs, carrying, failures)
    if failures.errors:
        raise BackupsFailed(results, failures.errors)
    return results


class _Carrying(NamedTuple):
    """How a backup is made, once it is known what it has to hold."""

    quiesced: Callable[[], AbstractContextManager[object]]
    listener: Progress | None
    packing: Compression | None
    pace: Pace | None


def _carried_out(
    store: Store, route: Access, jobs: Sequence[DiskBackup], carrying: _Carrying, failures: Failures
) -> list[BackupResult]:
    """Whatever ends it leaves nothing behind of disks that are not done."""
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
    """Where the whole run fails, the log tells of the disks that were left out before."""
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
    """What fails in the block about one of several disks is undone, and the others go on."""
    with failures.of(job.disk.name):
        try:
            yield
        except (LmdbitmapError, OSError):
            if not failures.at_once:  # else all of it is undone together
                if point is not None:
                    job.access.let_go(point)
                _undo_after_failure(store, job)
            raise


# --- before the checkpoint ---


class _WantedBackup(NamedTuple):
    repository_path: str | os.PathLike[str]
    kind: BackupType
    algorithm: DigestAlgorithm | None
    only_that: bool
    permission: Permission


class _LockedFolder(NamedTuple):
    """Where a disk's backups go, and all that is held for that disk, the lock of the folder first."""

    folder: BackupFolder
    locks: contextlib.ExitStack


def _locked_places(
    store: Store,
    names: Sequence[str],
    wanted: _WantedBackup,
    patience: Patience,
    locks: contextlib.ExitStack,
    failures: Failures,
) -> dict[str, _LockedFolder]:
    """Of all disks that can take part. A folder is held from before its disk is until after that.

    So who waits for a folder keeps nobody from a disk, and nobody who has a disk waits for a folder. In the order of
    their names: two runs that wait do not wait for each other.
    """
    places = {}
    for name in sorted(names):
        with failures.of(name):
            disk = chain.disk_called(store, name)
            place = _LockedFolder(
                BackupFolder(wanted.repository_path, name), locks.enter_context(contextlib.ExitStack())
            )
            folder_owner.require_meant(store, disk, place.folder, wanted.permission)
            place.locks.enter_context(place.folder.locked(patience))
            places[name] = place
    return places


def _prepared(
    store: Store,
    route: Access,
    places: Mapping[str, _LockedFolder],
    wanted: _WantedBackup,
    failures: Failures,
) -> list[DiskBackup]:
    """The parts of all disks that can take part. What was held for the others is let go of."""
    jobs = []
    for disk in list(route.disks):
        with failures.of(disk.name):
            jobs.append(_prepare(store, route, disk, places[disk.name], wanted))
        if disk.name in failures:
            route.leave_out(disk)
    for name, place in places.items():
        if name in failures:
            place.locks.close()
    if wanted.only_that:
        for job in jobs:
            job.require_as_asked()
    return jobs


def _prepare(
    store: Store, route: Access, disk: Disk, place: _LockedFolder, wanted: _WantedBackup
) -> DiskBackup:
    folder = place.folder
    kind = wanted.kind
    found, unreadable = _manifest_of(folder, kind)
    manifest = folder_owner.owned(found, disk, folder, wanted.permission)
    leftovers = undo_unfinished(route, disk, folder) if unreadable is None else []
    folder.require_room(manifest)
    manifest = dataclasses.replace(manifest, holder=manifest.holder or uuid4())
    assert manifest.holder is not None
    hold = place.locks.enter_context(HoldFile(store.path, disk.uuid, manifest.holder).locked())
    ended = None if hold.hold is None else hold.hold.ended
    plan = (
        plan_for(store, disk, folder, manifest, kind, ended)
        if unreadable is None
        else BackupPlan(kind, reason=unreadable)
    )
    digests, sequence = digests_for(plan, manifest, wanted.algorithm), folder.next_sequence(manifest)
    return DiskBackup(
        route, disk, folder, manifest, kind, plan, digests, sequence, leftovers, hold, wanted.only_that
    )


def _manifest_of(folder: BackupFolder, kind: BackupType) -> tuple[Manifest | None, Reason | None]:
    """What backups there are; of a full one that was asked for also why nobody can say, and it begins a new chain."""
    try:
        return folder.manifest(), None
    except NewerManifest:
        raise
    except FormatError as error:
        if kind is not BackupType.FULL:
            raise
        log.error("%s; images stay as they are, and a new chain begins", error.problem)
        return None, _UNREADABLE


# --- the checkpoint ---


def _one_point_in_time(
    store: Store,
    route: Access,
    jobs: Sequence[DiskBackup],
    quiesced: Callable[[], AbstractContextManager[object]],
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
    with quiesced():
        rescans = any(job.plan.type_actual is BackupType.RESCAN for job in taking_part)
        points = route.take_point(name, [job.plan.since for job in taking_part], once=not rescans)
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


# --- the archive, and what comes after it is durable ---


def _made(
    store: Store,
    sources: Sequence[ImagePlan],
    carrying: _Carrying,
    failures: Failures,
) -> list[BackupResult]:
    """Of all disks that come to their end. What is not copied any more of one that fails counts as done."""
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
        source = source.full_instead(damaged.error)
        report.expect(source.bytes_to_copy)
        entry = write_image(source, device, report, carrying.packing)
    job = source.job
    released = tuple(_still_there(store, job, job.manifest.released))
    job.hold.keep(entry.checkpoint, time.time_ns())
    manifest = dataclasses.replace(job.manifest, backups=(*job.manifest.backups, entry), released=released)
    job.folder.replace_manifest(manifest, keep_old=job.plan.reason == _UNREADABLE)
    _forget_unneeded(store, source, manifest)  # law 3: not before this line
    job.folder.drop_note()
    path, seconds = job.folder.path_of(entry.file), time.monotonic() - started
    return BackupResult(job.disk.name, entry, path, device.bytes_read, seconds, job.digests.reason)


def _still_there(
    store: Store, job: DiskBackup, checkpoints: Sequence[CheckpointRef]
) -> Sequence[CheckpointRef]:
    """Those that nobody has forgotten yet."""
    with store.read() as reader:
        members = {member.uuid for member in reader.checkpoints(job.disk.uuid)}
    return [checkpoint for checkpoint in checkpoints if checkpoint.uuid in members]


def _counted_from(manifest: Manifest, disk: Disk) -> Sequence[CheckpointRef]:
    """The checkpoints from which coming backups count: the newest backup's, and the newest full one's."""
    entries = (newest(manifest, full=True), newest(manifest))
    found = {entry.checkpoint: None for entry in entries if entry and entry.epoch == disk.epoch}
    return list(found)


def _forget_unneeded(store: Store, source: ImagePlan, manifest: Manifest) -> None:
    """Let go of checkpoints that no coming backup counts from. The backup is made, whatever happens here."""
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


# --- what did not come so far ---


def _undo_after_failure(store: Store, job: DiskBackup) -> None:
    try:
        others = [work.checkpoint for work in job.leftovers]
        undo_unfinished(job.access, job.disk, job.folder, others)
        with store.read() as reader:
            members = reader.checkpoints(job.disk.uuid)
        job.hold.settle(members)
    except LmdbitmapError as error:
        log.warning("disk %s: the next backup will clean up after this one: %s", job.disk.name, error)
