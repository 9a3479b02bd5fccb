"""One root error. Its subclasses differ in what the caller does next.

| class            | the caller                                   | exit code |
|------------------|----------------------------------------------|-----------|
| `InvalidArgument`| asks for something else                      | 2         |
| `NotFound`       | looks at the name again                      | 1         |
| `AlreadyExists`  | picks another name                           | 1         |
| `Untrusted`      | makes a full backup                          | 3         |
| `Busy`           | waits, or asks the process that owns it      | 4         |
| `OwnerGone`      | checks what was done, and restarts the owner | 1         |
| `FormatError`    | does not use these bytes                     | 1         |
| `StorageError`   | repairs the disk, folder or permissions      | 1         |
| `SomeFailed`     | looks at the class of each of its `causes`   | theirs, if it is the same; else 1 |

Every message is one sentence that ends with the next step. Only `cli/` sets exit codes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final


class LmdbitmapError(Exception):
    """Root of every error that this package raises on purpose: the problem and the next step."""

    def __init__(self, problem: str, *, next_step: str) -> None:
        super().__init__(problem, next_step)
        self.problem = problem
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.problem}; {self.next_step}"

    def __reduce__(self) -> tuple[Any, ...]:
        """With its words and fields: what exceptions do by themselves gives `args` to `__init__`, which wants others.

        A process of a pool tells of it in this way, and a pool breaks or hangs where that fails.
        """
        return _blank, (type(self), self.args), vars(self)


def _blank(kind: type[LmdbitmapError], args: tuple[object, ...]) -> LmdbitmapError:
    error = kind.__new__(kind)
    error.args = args
    return error


class InvalidArgument(LmdbitmapError, ValueError):
    """A name, size or option that can never work."""


class NotFound(LmdbitmapError, LookupError):
    """No disk, checkpoint, bitmap, image or store of that name."""


class AlreadyExists(LmdbitmapError):
    """The name is taken; what it names was left untouched."""


class Untrusted(LmdbitmapError):
    """The bitmap cannot say what changed: everything counts as dirty, a full backup is needed."""


class Busy(LmdbitmapError):
    """Another process or job holds the disk, the image or the store."""


class OwnerGone(LmdbitmapError):
    """The process that owned the disk ended before it answered. The request may have been carried out or not."""


class FormatError(LmdbitmapError, ValueError):
    """Bytes from a file, a store or the wire are not in the expected format."""

    def __init__(self, place: str, *, expected: str, found: object, next_step: str) -> None:
        super().__init__(f"{place}: expected {expected}, found {found}", next_step=next_step)
        self.place = place
        self.expected = expected
        self.found = found


BAD_DISK: Final = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
"""What the kernel says of data, and of a file system's own records, that cannot be read or are damaged."""


class StorageError(LmdbitmapError, OSError):
    """The operating system refused a read, a write or a sync; `errno` and `strerror` say why.

    `strerror` is what the cause says itself: an error that this package raised may say more than its number does.
    """

    def __init__(self, place: str, cause: OSError, *, next_step: str) -> None:
        reason = cause.strerror or (os.strerror(cause.errno) if cause.errno else str(cause))
        super().__init__(f"{place}: {reason}", next_step=next_step)
        self.place = place
        self.errno, self.strerror = cause.errno, reason

    @property
    def is_of_bad_disk(self) -> bool:
        """Whether the disk cannot read it, or the file system has damage there: asking again does not help."""
        return self.errno in BAD_DISK

    def __reduce__(self) -> tuple[Any, ...]:
        """`OSError` keeps these two elsewhere."""
        make, arguments, fields = super().__reduce__()
        return make, arguments, {**fields, "errno": self.errno, "strerror": self.strerror}


class SomeFailed(LmdbitmapError):
    """Some items of a request failed, each for its own reason in `causes`. The other items are done."""

    def __init__(self, problem: str, causes: Sequence[LmdbitmapError], *, next_step: str) -> None:
        super().__init__(problem, next_step=next_step)
        self.causes = tuple(causes)


_NEXT_STEPS = {
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "raise the quota or free some space there, and try again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or use another file system",
    errno.EACCES: "check its owner and permissions, or run as a user who may",
    errno.EPERM: "check its owner, permissions and attributes (lsattr), or run as a user who may",
    errno.EROFS: "the file system is read-only: remount it for writing or choose another folder",
    errno.EIO: "look at the kernel log (dmesg): the disk or the connection to it fails",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
    errno.EUCLEAN: "its file system is damaged there: check that (fsck)",
    errno.EBADMSG: "its file system is damaged there: check that (fsck)",
    errno.ENOMEM: "free some memory and try again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the symbolic links that lead there",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOLCK: "use a file system that has locks",
}
_ANY_STEP = "mend the cause and try again"
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_HELD = {errno.EBUSY, errno.ETXTBSY, errno.EAGAIN}


def error_from_os(place: str, cause: OSError) -> LmdbitmapError:
    """Return the error whose class and next step fit the operating system's refusal at `place`."""
    if cause.errno in _MISSING:
        return NotFound(f"{place} does not exist", next_step="check the name and its folder")
    if cause.errno in _HELD:
        return Busy(f"{place} is in use by another program", next_step="stop that program or wait for it")
    return StorageError(place, cause, next_step=_next_step_after(cause))


def _next_step_after(cause: OSError) -> str:
    code = cause.errno or 0
    if code == errno.EIO and cause.strerror not in (None, os.strerror(code)):
        return _ANY_STEP  # the kernel did not say it, so its log has nothing about it
    return _NEXT_STEPS.get(code, _ANY_STEP)


@contextmanager
def os_errors_at(place: str) -> Iterator[None]:
    """Turn an `OSError` of the block into the class and next step that fit it, naming `place`."""
    try:
        yield
    except LmdbitmapError:
        raise
    except OSError as refusal:
        raise error_from_os(place, refusal) from refusal
