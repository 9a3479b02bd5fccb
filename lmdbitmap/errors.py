"""One root error; its children are told apart by what the caller does next.

| class            | the caller                                   | exit code |
|------------------|----------------------------------------------|-----------|
| `InvalidArgument`| asks for something else                      | 2         |
| `NotFound`       | looks at the name again                      | 1         |
| `AlreadyExists`  | picks another name                           | 1         |
| `Untrusted`      | makes a full backup                          | 3         |
| `Busy`           | waits, or asks the process that owns it      | 4         |
| `FormatError`    | does not use these bytes                     | 1         |
| `StorageError`   | mends the disk, the folder, the permissions  | 1         |

Every message is one sentence that ends with the next step. Exit codes are given out by `cli/` alone.
"""

from __future__ import annotations

import os


class LmdbitmapError(Exception):
    """Root of every error this package raises on purpose: what is wrong, and what to do next."""

    def __init__(self, problem: str, *, next_step: str) -> None:
        super().__init__(problem, next_step)
        self.problem = problem
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.problem}; {self.next_step}"


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


class FormatError(LmdbitmapError, ValueError):
    """Bytes from a file, a store or the wire that do not say what they must."""

    def __init__(self, place: str, *, expected: str, found: object, next_step: str) -> None:
        super().__init__(f"{place}: expected {expected}, found {found}", next_step=next_step)
        self.place = place
        self.expected = expected
        self.found = found


class StorageError(LmdbitmapError, OSError):
    """The operating system refused a read, a write or a sync; `errno` says why."""

    def __init__(self, place: str, cause: OSError, *, next_step: str) -> None:
        reason = os.strerror(cause.errno) if cause.errno else str(cause)
        super().__init__(f"{place}: {reason}", next_step=next_step)
        self.place = place
        self.errno = cause.errno
