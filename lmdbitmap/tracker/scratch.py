"""A snapshot's bounded file for old data (snapshot.py), which leaves nothing behind.

1. The file has no name: whatever dies, nothing of it remains.
2. The file is bounded, and does not take the last space of its file system: a growing image and the store may need it.
   A preallocated file takes its room at once, and cannot lack space later.
3. What is put there is not synced. If its disk takes it badly later, the system says so once, and may read something
   else from then on. So it is asked after each read, and not before.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final, NamedTuple

from lmdbitmap.errors import os_errors_at
from lmdbitmap.system import linux
from lmdbitmap.system.files import open_nameless, pwrite_whole
from lmdbitmap.work import forks

DEFAULT_LIMIT_BYTES: Final = 10 << 30
_SPARE_BYTES: Final = 1 << 30
_SPARE_PART: Final = 100
"""A hundredth of the file system, at most `_SPARE_BYTES`, is left to other files."""


class Scratch(NamedTuple):
    """The folder for old data, and the most bytes of it per disk."""

    folder: str | os.PathLike[str]
    limit_bytes: int = DEFAULT_LIMIT_BYTES
    preallocate: bool = False

    def room(self) -> int:
        """Return how many bytes of old data one file could take now."""
        if self.preallocate:
            return self.limit_bytes
        with os_errors_at(f"the scratch folder {self.folder}"):
            return min(self.limit_bytes, max(_bytes_to_take(os.statvfs(self.folder)), 0))


class ScratchFile:
    """A file without a name, for at most `limit_bytes`, open until `close`. Raises the system's errors."""

    def __init__(self, scratch: Scratch) -> None:
        self.limit_bytes = scratch.limit_bytes
        self._has_its_room = scratch.preallocate
        with os_errors_at(f"the scratch folder {scratch.folder}"):
            self._fd = open_nameless(scratch.folder)
            try:
                if scratch.preallocate:
                    os.posix_fallocate(self._fd, 0, scratch.limit_bytes)
            except BaseException:
                os.close(self._fd)
                raise
        forks.is_not_for_children(self)

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def require_room(self) -> None:
        """Raise if the file could grow only by taking the last space of its file system."""
        if self._has_its_room:
            return
        if _bytes_to_take(os.fstatvfs(self._fd)) < 0:
            raise OSError(
                errno.ENOSPC, "the last space of its file system is left to the guest and the store"
            )

    def put(self, data: memoryview, offset: int) -> None:
        pwrite_whole(self._fd, data, offset)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with what was put there. Fill it in part if the file was emptied meanwhile."""
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                return
            buffer, offset = buffer[count:], offset + count

    def require_kept(self) -> None:
        """Raise if the system lost anything that was put there. Ask after a read: it may have found something else."""
        if self.is_open:
            linux.require_written_back(self._fd)

    def empty(self) -> None:
        """Give the file's space back, as far as the system allows."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Close the file. What the system says of its data then (NFS does) concerns nobody: it is not read any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def forsake(self) -> None:
        """Close the file in a forked child: its room would be taken for as long as the child lives."""
        self.close()


def _bytes_to_take(found: os.statvfs_result) -> int:
    """Return the free bytes of a file system less those that are left to other files."""
    spare_bytes = min(found.f_blocks * found.f_frsize // _SPARE_PART, _SPARE_BYTES)
    return found.f_bavail * found.f_frsize - spare_bytes
