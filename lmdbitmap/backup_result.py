"""What became of each disk of a backup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    SomeFailed,
    StorageError,
    Untrusted,
)
from lmdbitmap.manifest import BackupEntry, Reason

_CODES: Final = {
    InvalidArgument: "invalid",
    NotFound: "not-found",
    AlreadyExists: "already-exists",
    Untrusted: "untrusted",
    Busy: "busy",
    FormatError: "damaged",
    StorageError: "storage-failed",
}
_FULL: Final = "`backup --full`"


@dataclass(frozen=True, slots=True)
class BackupResult:
    """One disk's new backup. `entry` says what was asked for, what it became and why, and the bytes."""

    disk: str
    entry: BackupEntry
    path: str
    bytes_read: int
    """Of the disk."""
    seconds: float
    digest_reason: Reason | None = None
    """Why its digests are not of the algorithm that those of the backup before are of, if that was not asked for."""


class BackupFailure(NamedTuple):
    """A disk of several of which no backup was made."""

    disk: str
    error: LmdbitmapError

    @property
    def reason(self) -> Reason:
        """`code` goes by the class of the error."""
        code = next((code for kind, code in _CODES.items() if isinstance(self.error, kind)), "failed")
        return Reason(code, f"{self.error.problem}; {self.next_step}")

    @property
    def next_step(self) -> str:
        """A full backup is advised of this disk alone: the same command with --full would make all of them full."""
        return self.error.next_step.replace(_FULL, f"`backup {self.disk} REPO --full`")


class BackupsFailed(SomeFailed):
    """Some of several disks have no new backup, for the reasons in `failures`; those in `results` have theirs."""

    def __init__(self, results: Sequence[BackupResult], failures: Sequence[BackupFailure]) -> None:
        first, count = failures[0], len(results) + len(failures)
        is_one = len(failures) == 1
        problems = ", ".join(f"{failure.disk}: {failure.error.problem}" for failure in failures)
        super().__init__(
            f"{len(failures)} of {count} disks {'was' if is_one else 'were'} not backed up: {problems}",
            [failure.error for failure in failures],
            next_step=first.next_step if is_one else "see each of the `failures`",
        )
        self.results = tuple(results)
        self.failures = tuple(failures)
