"""Lists what a repository holds, to choose what to restore, serve or mount. Nothing is locked or changed."""

from __future__ import annotations

import os

from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.repository import disk_names, known_backups


def backed_up_disks(repository_path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the disks that have backups in a repository, sorted. Raise `NotFound` if there is none."""
    return disk_names(repository_path)


def backups_of(repository_path: str | os.PathLike[str], name: str) -> tuple[BackupEntry, ...]:
    """Return the backups of the disk called `name`, at least one, the oldest first. A restore takes the `id` of each.

    Only one disk is read, so that a damaged manifest hides no other disk. Raises `NotFound` without backups of such a
    disk, and `FormatError` if its manifest cannot be read. No image is checked: that is for `verify_backups`.
    """
    return known_backups(BackupFolder(repository_path, name)).backups
