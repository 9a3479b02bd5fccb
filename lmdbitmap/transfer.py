"""Copies backups to another repository, one after the other: what is there is always a beginning of the chain, whole.

An image is copied with the digests of its chunks, synced, and read back; only if it has the digest that the manifest
says does it get its name, and the other manifest one more entry after that. A copy that was killed goes on where it
was: backups that the other manifest has are not copied again, nor is an image that is there already and is the same.

The other folder may hold nothing but what is copied: a backup there that is not the source's is a reason to refuse.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lmdbitmap import files
from lmdbitmap.copier import Progress, Report
from lmdbitmap.device import FileDevice
from lmdbitmap.digests import found_digest, require_algorithms
from lmdbitmap.errors import AlreadyExists, Busy, FormatError, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.file_copy import PIECE_BYTES, FileCopier
from lmdbitmap.manifest import BackupEntry, Manifest
from lmdbitmap.repository import BackupFolder, known_backups_of

_USE_ANOTHER = "look at it with `verify`, and get the file from another copy of the repository"


@dataclass(frozen=True, slots=True)
class CopyResult:
    """One disk's backups: those that were copied now, and how many had been there before."""

    disk: str
    copied: tuple[BackupEntry, ...]
    already_there: int
    bytes_copied: int
    seconds: float


def copy_backups(
    repository_path: str | os.PathLike[str],
    target_path: str | os.PathLike[str],
    names: Sequence[str] = (),
    *,
    progress: Progress | None = None,
) -> list[CopyResult]:
    """Copy all backups of the disks called `names`, or of all, to the repository at `target_path`; durable on return.

    Raises `NotFound` without such a disk, or the package that the digests of an image need, `AlreadyExists` where the
    target has other backups of a disk of that name, `FormatError` for an image that is not what it was, `Busy` for a
    target that somebody writes to, and for a source that changes meanwhile. Disks before the one that failed are
    copied, and of that one the backups before.
    """
    known = known_backups_of(repository_path, names)
    if os.path.realpath(repository_path) == os.path.realpath(target_path):
        raise InvalidArgument(
            f"{os.path.abspath(target_path)} is where the backups are", next_step="name another folder"
        )
    for source, manifest in known:
        source.check_names(manifest.backups)
    report = Report(progress, sum(entry.bytes_stored for _, each in known for entry in each.backups))
    return [
        _copy_disk(source, manifest, BackupFolder(target_path, source.disk_name), report)
        for source, manifest in known
    ]


def _copy_disk(source: BackupFolder, wanted: Manifest, target: BackupFolder, report: Report) -> CopyResult:
    started = time.monotonic()
    if not os.path.lexists(target.path):
        require_algorithms(source, wanted.backups)  # or a folder would be left where nothing comes into
    with target.locked():
        found = target.manifest()
        there = Manifest(wanted.disk) if found is None else found
        require_algorithms(source, wanted.backups[len(there.backups) :])
        if found is None:
            target.replace_manifest(there)  # from now on, an image without its entry is no lost backup
        _require_beginning(target, there, source, wanted)
        target.check_images(there.backups)
        already, missing = there.backups, wanted.backups[len(there.backups) :]
        report.advance(sum(entry.bytes_stored for entry in already))
        for entry in missing:
            _copy_unless_changed(source, wanted, target, entry, report)
            there = dataclasses.replace(there, backups=(*there.backups, entry))
            target.replace_manifest(there)
    return CopyResult(
        disk=source.disk_name,
        copied=missing,
        already_there=len(already),
        bytes_copied=sum(entry.bytes_stored for entry in missing),
        seconds=time.monotonic() - started,
    )


def _require_beginning(target: BackupFolder, there: Manifest, source: BackupFolder, wanted: Manifest) -> None:
    """Refuse a target whose backups are not the first ones of the source."""
    if there.disk.uuid != wanted.disk.uuid:
        raise AlreadyExists(
            f"{target.path} has the backups of another disk that is called {there.disk.name!r} too",
            next_step="copy to another repository, or move that folder away",
        )
    pairs = zip(there.backups, (*wanted.backups, *[None] * len(there.backups)), strict=False)
    other = next((theirs for theirs, ours in pairs if theirs != ours), None)
    if other is not None:
        raise AlreadyExists(
            f"{target.path} has a backup {other.id} that {source.path} does not have, or not any more as it was",
            next_step="copy to another repository, or move that folder away",
        )


def _copy_unless_changed(
    source: BackupFolder, wanted: Manifest, target: BackupFolder, entry: BackupEntry, report: Report
) -> None:
    try:
        _copy_digests(source, target, entry)
        _copy_image(source, target, entry, report)
    except (FormatError, NotFound) as wrong:
        if source.manifest() == wanted:
            raise
        raise Busy(f"{source.path} was changed while it was copied", next_step="copy it again") from wrong


def _copy_digests(source: BackupFolder, target: BackupFolder, entry: BackupEntry) -> None:
    if entry.chunks is None:
        return
    path, digest, offset = source.path_of(entry.chunks.file), hashlib.sha256(), 0
    with (
        FileDevice.open(path, read_only=True) as device,
        files.replacing(target.path_of(entry.chunks.file)) as file,
    ):
        while offset < device.size:
            with os_errors_at(path):
                data = device.pread(min(PIECE_BYTES, device.size - offset), offset)
            file.write(data)
            digest.update(data)
            offset += len(data)
        _require(path, entry.chunks.sha256, digest.hexdigest())


def _copy_image(source: BackupFolder, target: BackupFolder, entry: BackupEntry, report: Report) -> None:
    source.check_images([entry])
    path, copy = source.image_path(entry.file), target.path_of(entry.file)
    if os.path.lexists(copy):
        _require_same(copy, entry)
        report.advance(entry.bytes_stored)
        return
    with FileDevice.open(path, read_only=True) as device, files.replacing(copy) as file:
        copier = FileCopier(file.fileno(), copy)
        for offset in range(0, entry.bytes_stored, PIECE_BYTES):
            length = min(PIECE_BYTES, entry.bytes_stored - offset)
            copier.copy(device, offset, offset, length)
            report.advance(length)
        with os_errors_at(copy), ThreadPoolExecutor(max_workers=1) as beside:
            synced = beside.submit(os.fsync, file.fileno())
            found = found_digest(entry, file.fileno())
            synced.result()
        _require(path, entry.digest, found)


def _require(path: str, expected: str, found: str) -> None:
    if found != expected:
        raise FormatError(path, expected=f"SHA-256 {expected}", found=found, next_step=_USE_ANOTHER)


def _require_same(path: str, entry: BackupEntry) -> None:
    """Take an image that a killed copy left for what it is; any other is somebody's."""
    with FileDevice.open(path, read_only=True) as device, os_errors_at(path):
        assert device.fd is not None
        found = found_digest(entry, device.fd)
    if found != entry.digest:
        raise AlreadyExists(
            f"{path} is there, and is another image than backup {entry.id}",
            next_step="copy to another repository, or move that file away",
        )
