"""The results of a backup, disk by disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.notes.references import Reason
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.work.disks_failed import DisksFailed

_FULL: Final = "`backup --full`"


@dataclass(frozen=True, slots=True)
class BackupResult:
    """One disk's new backup. `entry` says which type was asked for, which was made and why, and the bytes."""

    disk: str
    entry: BackupEntry
    path: str
    bytes_read: int
    """Bytes read of the disk."""
    seconds: float
    digest_reason: Reason | None = None
    """Why its digests use another algorithm than the backup before, if that was not asked for."""


class BackupsFailed(DisksFailed):
    """Some of several disks have no new backup, for the reasons in `failures`. The others are in `results`.

    Advice to make a full backup names one disk: the same command with --full would make all of them full.
    """

    def __init__(self, results: Sequence[BackupResult], failures: Mapping[str, LmdbitmapError]) -> None:
        for disk, error in failures.items():
            error.next_step = error.next_step.replace(_FULL, f"`backup {disk} REPO --full`")
        super().__init__("backed up", len(results), failures)
        self.results = tuple(results)
