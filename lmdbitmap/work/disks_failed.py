"""The error at the end of a run over several disks in which some failed and the others were done."""

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
    """Return the machine-readable code for the class of `error`."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), "failed")


class DisksFailed(SomeFailed):
    """Some of several disks failed; `failures` maps each one's name to its error. The other disks are done."""

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
