"""Copies backups to another repository, one after the other. Nothing that is there is removed or written anew.

The digests of an image are copied first, then the image, which is written under another name beside its own, synced,
and read back. Only if it has the digest that the manifest says do the image and its entry take effect, together
(`BackupFolder.succeed`). A copy that was killed goes on where it was.

The target's backups stay as they are, even if a prune at the source wrote them anew or removed them: a damaged or wiped
source takes nothing from its copy. That is sound, as a prune keeps what a backup reads as, and its file's name: what is
copied later reads the same, stacked on the old image or on the new one. So each side is pruned by itself. Backups
removed at the target do not come back, unless something new is stacked on them.

The target may not hold a backup that differs from the source's of the same number, nor a newer one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    os_errors_at,
)
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.file_copy import PIECE_BYTES, FileCopier
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import digests_of, found_digest, is_damage, require_algorithms
from lmdbitmap.repository.manifest import TAKEN_OVER_EPOCH, BackupEntry, Manifest, taken_over
from lmdbitmap.repository.repository import (
    folders_of,
    folders_with_backups,
    known_backups,
    refuse_folder_of_disk,
)
from lmdbitmap.storage import creating
from lmdbitmap.system import atomic_files
from lmdbitmap.work.crew import Threads
from lmdbitmap.work.disks_failed import DisksFailed
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.patience import Patience
from lmdbitmap.work.progress import Progress, Report

_USE_ANOTHER = "look at it with `lmdbitmap verify`, and get the file from another copy of the repository"
_UNTIL_THEN = (
    ", or drop backup {}, and those that need it, with `prune --drop`: until then no newer one is copied"
)


@dataclass(frozen=True, slots=True)
class CopyResult:
    """The backups of one disk that were copied now, and where the others are."""

    disk: str
    copied: tuple[BackupEntry, ...]
    already_there: int
    """Backups of the source that the target had."""
    only_there: int
    """Backups of the target that the source has removed."""
    left_out: int
    """Backups of the source that the target has removed."""
    bytes_copied: int
    seconds: float


class CopiesFailed(DisksFailed):
    """Some of several disks were not copied, or not completely; those in `results` are."""

    def __init__(self, results: Sequence[CopyResult], failures: Mapping[str, LmdbitmapError]) -> None:
        super().__init__("copied", len(results), failures)
        self.results = tuple(results)


def copy_backups(
    repository_path: str | os.PathLike[str],
    target_path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    lock_wait_s: float = 0.0,
    progress: Progress | None = None,
) -> list[CopyResult]:
    """Copy all backups of the disks called `names`, or of all, to the repository at `target_path`; durable on return.

    Only None stands for all disks: an empty list is nothing to do.

    Raises `NotFound` without such a disk, or the package that the digests of an image need; `AlreadyExists` if the
    target has other backups of a disk of that name, or newer ones; `FormatError` for an image that is not what it was;
    `Busy` for a source that changes meanwhile, and for a target that another run uses for longer than `lock_wait_s`,
    which is for all folders together. The backups before the one that failed are copied. If one of several disks fails
    it is left out, and `CopiesFailed` reports it in the end.
    """
    folders = folders_of(repository_path, names)
    if os.path.realpath(repository_path) == os.path.realpath(target_path):
        raise InvalidArgument(
            f"{os.path.abspath(target_path)} is where the backups are", next_step="name another folder"
        )
    creating.refuse_inside(target_path)
    refuse_folder_of_disk(target_path)
    failures, patience = Failures(at_once=len(folders) == 1), Patience(lock_wait_s)
    known = folders_with_backups(folders, failures, named=names is not None)
    bytes_stored = [sum(entry.bytes_stored for entry in each.backups) for _, each in known]
    report, passed, results = Report(failures.heeding(progress), sum(bytes_stored)), 0, []
    for (source, manifest), count in zip(known, bytes_stored, strict=True):
        with failures.of(source.disk_name):
            target = BackupFolder(target_path, source.disk_name)
            results.append(_copy_disk(source, manifest, target, patience, report))
        passed += count
        report.reach(passed)
    if failures.errors:
        raise CopiesFailed(results, failures.errors)
    return results


def _copy_disk(
    source: BackupFolder, known: Manifest, target: BackupFolder, patience: Patience, report: Report
) -> CopyResult:
    source.check_names(known.backups)
    if not os.path.lexists(target.path):
        require_algorithms(source, known.backups)  # else an empty folder would be left
    with target.locked(patience):
        started = time.monotonic()
        wanted = known_backups(source)  # again: the run that held the lock may have copied newer ones
        source.check_names(wanted.backups)
        found = target.manifest()
        before = Manifest(wanted.disk) if found is None else found
        _require_kin(target, before, source, wanted)
        missing = _missing(before, wanted)
        require_algorithms(source, missing)
        there = _following(before, wanted, missing)
        if found != there:
            target.replace_manifest(there)  # from now on, an image without its entry is no lost backup
        target.check_images(there.backups)
        report.advance(sum(entry.bytes_stored for entry in {*wanted.backups} - {*missing}))
        try:
            for entry in missing:
                target.require_room(there)
                _copy_unless_changed(source, wanted, target, entry, report)
                there = _with(there, entry)
                target.succeed(there)
        except BaseException:
            with contextlib.suppress(LmdbitmapError):
                target.settle()  # images that were copied and not decided take space
            raise
    return _told(source.disk_name, before, wanted, missing, started)


def _told(
    disk: str, before: Manifest, wanted: Manifest, copied: Sequence[BackupEntry], started: float
) -> CopyResult:
    there, ours = ({entry.id for entry in each.backups} for each in (before, wanted))
    return CopyResult(
        disk=disk,
        copied=tuple(copied),
        already_there=len(there & ours),
        only_there=len(there - ours),
        left_out=len(ours - there) - len(copied),
        bytes_copied=sum(entry.bytes_stored for entry in copied),
        seconds=time.monotonic() - started,
    )


# --- what is to be copied ---


def _point(entry: BackupEntry) -> tuple[object, ...]:
    """Return what identifies the backup: what it holds, and what images above it call it.

    A prune keeps these, and so does a take-over, which drops the epoch. A checkpoint belongs to one backup alone.
    """
    return entry.id, entry.sequence, entry.file, entry.time_ns, entry.checkpoint, entry.disk_size


def _require_kin(target: BackupFolder, there: Manifest, source: BackupFolder, wanted: Manifest) -> None:
    """Raise `AlreadyExists` if the target continues the source's backups differently, or has those of another disk."""
    ours, theirs = {_point(entry) for entry in wanted.backups}, there.backups
    was_added_anew = not theirs or _point(theirs[-1]) in ours
    if there.disk.uuid != wanted.disk.uuid and not was_added_anew:
        raise _not_kin(
            f"{target.path} has the backups of another disk that is called {there.disk.name!r} too"
        )
    taken = {word for entry in wanted.backups for word in (entry.id, entry.sequence, entry.file)}
    for entry in theirs:
        is_ahead = entry.sequence > wanted.newest_sequence
        if _point(entry) not in ours and (is_ahead or not taken.isdisjoint(_point(entry)[:3])):
            raise _not_kin(
                f"{target.path} has a backup {entry.id} that {source.path} does not have, or another of that number"
            )


def _not_kin(problem: str) -> AlreadyExists:
    return AlreadyExists(problem, next_step="copy to another repository, or move that folder away")


def _following(there: Manifest, wanted: Manifest, missing: Sequence[BackupEntry]) -> Manifest:
    """Return the target's manifest as the source's disk's. Backups that the source took over lose their epoch here.

    Checkpoints of backups that were pruned here are the source's to forget, unless a store counts from the target too.
    No backup comes into a mere copy, which would take them off the list: it would grow for ever. If nothing is missing,
    the target may be the original, and the source the copy.
    """
    if missing and there.holder in (None, wanted.holder):  # a copy of ours, or one that was made with `cp`
        there = dataclasses.replace(there, released=())
    if there.disk != wanted.disk:
        return taken_over(there, wanted.disk)
    taken = [entry.sequence for entry in wanted.backups if entry.epoch == TAKEN_OVER_EPOCH]
    last = max(taken, default=-1)
    backups = tuple(
        dataclasses.replace(entry, epoch=TAKEN_OVER_EPOCH) if entry.sequence <= last else entry
        for entry in there.backups
    )
    return dataclasses.replace(there, backups=backups)


def _missing(there: Manifest, wanted: Manifest) -> list[BackupEntry]:
    """Return the backups newer than all that are or were at the target, and those below them that are missing there."""
    known = {entry.id for entry in there.backups}
    newest = there.newest_sequence
    missing: list[BackupEntry] = []
    below: set[str | None] = set()
    for entry in reversed(wanted.backups):
        if entry.id not in known and (entry.sequence > newest or entry.id in below):
            missing.append(entry)
            below.add(entry.parent)
    return missing[::-1]


def _with(manifest: Manifest, entry: BackupEntry) -> Manifest:
    backups = sorted((*manifest.backups, entry), key=lambda each: each.sequence)
    return dataclasses.replace(manifest, backups=tuple(backups))


# --- copying ---


def _copy_unless_changed(
    source: BackupFolder, wanted: Manifest, target: BackupFolder, entry: BackupEntry, report: Report
) -> None:
    place = source.image_path(entry.file)
    try:
        source.check_images([entry])
        _copy_digests(source, target, entry)
        _copy_image(source, target, entry, report)
    except LmdbitmapError as wrong:
        if not is_damage(wrong):
            raise
        if source.manifest() == wanted and source.image_path(entry.file) == place:
            if source.path_of(entry.file) in wrong.problem:  # else the target is at fault
                wrong.next_step += _UNTIL_THEN.format(entry.id)
            raise
        raise Busy(f"{source.path} was changed while it was copied", next_step="copy it again") from wrong


def _copy_digests(source: BackupFolder, target: BackupFolder, entry: BackupEntry) -> None:
    if entry.chunks is not None:
        digests = digests_of(source, entry, entry.chunks)
        atomic_files.replace(target.path_of(entry.chunks.file), digests, follow=False)


def _copy_image(source: BackupFolder, target: BackupFolder, entry: BackupEntry, report: Report) -> None:
    path, copy = source.image_path(entry.file), target.path_of(entry.file)
    if os.path.lexists(copy):
        _require_same(copy, entry)
        report.advance(entry.bytes_stored)
        return
    with (
        FileDevice.open(path, read_only=True) as device,
        atomic_files.replacing(target.successor_path(entry.file), follow=False) as file,
    ):
        copier = FileCopier(file.fileno(), copy)
        for offset in range(0, entry.bytes_stored, PIECE_BYTES):
            length = min(PIECE_BYTES, entry.bytes_stored - offset)
            copier.copy(device, offset, offset, length)
            report.advance(length)
        with os_errors_at(copy), Threads(max_workers=1) as beside:
            synced = beside.submit(os.fsync, file.fileno())
            found = found_digest(entry, file.fileno())
            synced.result()
        _require(path, entry.digest, found)


def _require(path: str, expected: str, found: str) -> None:
    if found != expected:
        raise FormatError(path, expected=f"SHA-256 {expected}", found=found, next_step=_USE_ANOTHER)


def _require_same(path: str, entry: BackupEntry) -> None:
    """Accept an image that is there, and make it durable: it may have been put there just now, by `cp`.

    Raise `AlreadyExists` if it is any other image.
    """
    with FileDevice.open(path, read_only=True) as device, os_errors_at(path):
        assert device.fd is not None
        os.fsync(device.fd)
        found = found_digest(entry, device.fd)
    if found != entry.digest:
        raise AlreadyExists(
            f"{path} is there, and is another image than backup {entry.id}",
            next_step="copy to another repository, or move that file away",
        )
