"""What is wrong with one disk of a repository is no reason to leave the others out: it is told of in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    OwnerGone,
    SomeFailed,
    StorageError,
    Untrusted,
)

_CODES: Final = {
    InvalidArgument: "invalid",
    NotFound: "not-found",
    AlreadyExists: "already-exists",
    Untrusted: "untrusted",
    Busy: "busy",
    FormatError: "damaged",
    StorageError: "storage-failed",
    OwnerGone: "owner-gone",
}


def code_of(error: LmdbitmapError) -> str:
    """For programs: by the class of the error."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), "failed")


class DisksFailed(SomeFailed):
    """Some disks of several failed, each for the reason that `failures` has under its name; the others are done."""

    def __init__(self, done: str, done_count: int, failures: Mapping[str, LmdbitmapError]) -> None:
        count, first = done_count + len(failures), next(iter(failures.values()))
        is_one = len(failures) == 1
        problems = ", ".join(f"{disk}: {error.problem}" for disk, error in failures.items())
        super().__init__(
            f"{len(failures)} of {count} disks {'was' if is_one else 'were'} not {done}: {problems}",
            list(failures.values()),
            next_step=first.next_step if is_one else "see each of the `failures`",
        )
        self.failures = dict(failures)
