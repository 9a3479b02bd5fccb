"""What a repository holds, for who chooses what to restore, to serve or to mount. Nothing is locked or changed."""

from __future__ import annotations

import os

from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.repository import BackupFolder, disk_names


def backed_up_disks(repository_path: str | os.PathLike[str]) -> list[str]:
    """The names of the disks that have backups in a repository, sorted. Raises `NotFound` where there is none."""
    return disk_names(repository_path)


def backups_of(repository_path: str | os.PathLike[str], name: str) -> tuple[BackupEntry, ...]:
    """The backups of the disk called `name`, at least one, the oldest first. The `id` of each is what a restore takes.

    Of one disk, so that a damaged manifest hides no other. Raises `NotFound` without backups of such a disk, and
    `FormatError` where nobody can say which there are. No image is looked at: that is for `verify_backups`.
    """
    return BackupFolder(repository_path, name).known_backups().backups
