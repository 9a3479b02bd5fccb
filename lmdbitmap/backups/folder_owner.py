"""Checks, before a backup goes into a repository's folder, that it is the folder meant and whose backups it has.

Both of these look like a person's mistake, and are done only if that person says so:

    take over        the folder has backups of a disk of this name with another uuid. It may be this very disk, which
                     came here from another host or was added anew. Its next backup is compared with the newest one
                     there (a rescan). The manifest that names that backup also names the disk's new uuid, in one
                     replacement: a death leaves the folder to the one disk or to the other, with all that it had.
    new repository   the folder has nothing, but the store knows that this disk was backed up to there, or the whole
                     repository has nothing, and it knows that of any disk: for example, the file system that holds the
                     repository is not mounted.

The checkpoints of backups that were taken over are never believed. They belong to another store. If the disk comes back
to where it was, that store still has them, and knows nothing of the time in between. So these backups lose their epoch:
no backup counts from them, even after a prune or a copy has changed what is around them.

A place that the store knows nothing of may be empty.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import NamedTuple

from lmdbitmap.errors import AlreadyExists, NotFound, os_errors_at
from lmdbitmap.notes.holds import Hold, hold_files
from lmdbitmap.repository.backup_folder import LOCK, BackupFolder
from lmdbitmap.repository.manifest import DiskRef, Manifest, taken_over
from lmdbitmap.repository.manifest_file import COPY, MANIFEST, NEXT
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store


class Permission(NamedTuple):
    """A person's consent about the place that backups go to."""

    take_over: bool = False
    new_repository: bool = False


def require_meant(store: Store, disk: Disk, folder: BackupFolder, permission: Permission) -> None:
    """Raise `NotFound` if the folder lacks the backups it should have. Makes and changes nothing."""
    if permission.take_over and not any(
        os.path.lexists(folder.path_of(name)) for name in (MANIFEST, COPY, NEXT)
    ):
        raise NotFound(
            f"{folder.path} has no backups to take over",
            next_step="see whether its file system is mounted, name another repository, or leave out --take-over",
        )
    if permission.new_repository or not _is_empty(folder):
        return
    for known in _disks_that_count(store, disk, folder.repository_path):
        for file in hold_files(store.path, known.uuid):
            hold = file.hold
            if hold is not None and hold.was_at(folder.repository_path) and hold.expects_backups:
                raise _gone(known, folder, hold)


def owned(found: Manifest | None, disk: Disk, folder: BackupFolder, permission: Permission) -> Manifest:
    """Return the manifest as this disk's. Raise `AlreadyExists` if it is another disk's and is not to be taken over."""
    ours = DiskRef(disk.name, disk.uuid)
    if found is None:
        return Manifest(ours)
    if found.disk.uuid == disk.uuid or not found.backups:
        return dataclasses.replace(found, disk=ours)
    if not permission.take_over:
        raise AlreadyExists(
            f"{folder.path} has the backups of another disk that was called {found.disk.name!r} too",
            next_step="back up to another repository, or, if it is this very disk that was tracked elsewhere or"
            " added anew, say --take-over",
        )
    return taken_over(found, ours)


def _disks_that_count(store: Store, disk: Disk, repository: str) -> list[Disk]:
    """Return the disk, and all others too if the repository has nothing at all: it may be a mount point."""
    with os_errors_at(repository):
        try:
            found = os.listdir(repository)
        except FileNotFoundError:
            found = []
        except NotADirectoryError:  # making the folder reports that
            return [disk]
    if found:
        return [disk]
    with store.read() as reader:
        return [disk, *reader.disks()]


def _is_empty(folder: BackupFolder) -> bool:
    """Return whether the folder has nothing but a lock. The remains of a killed first backup make it not empty."""
    with os_errors_at(folder.path):
        try:
            return set(os.listdir(folder.path)) <= {LOCK}
        except FileNotFoundError:
            return True
        except NotADirectoryError:  # making the folder reports that
            return False


def _gone(disk: Disk, folder: BackupFolder, hold: Hold) -> NotFound:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(hold.used_ns // 1_000_000_000))
    return NotFound(
        f"{folder.path} has no backups, but disk {disk.name!r} was backed up to {folder.repository_path} on {when}",
        next_step="see whether its file system is mounted; to begin a new repository there, say --new-repository",
    )
