"""A base class for devices that cannot be written: it refuses every change."""

from __future__ import annotations

import errno

from lmdbitmap.geometry import check_range
from lmdbitmap.interfaces import Buffer
from lmdbitmap.work.buffers import read_whole


class ReadOnlyDevice:
    """A read-only device of `size` bytes. It refuses with EPERM, as an NBD server does."""

    fd = None
    read_only = True

    @property
    def size(self) -> int:
        raise NotImplementedError  # pragma: no cover

    def pread(self, length: int, offset: int) -> bytes:
        check_range(offset, length, self.size)
        return read_whole(self.pread_into, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        raise NotImplementedError  # pragma: no cover

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._refuse(offset, len(data))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._refuse(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._refuse(offset, length)

    def resize(self, size: int) -> None:
        self._refuse(0, 0)

    def flush(self) -> None:
        """Do nothing: nothing was written."""

    def _refuse(self, offset: int, length: int) -> None:
        check_range(offset, length, self.size)
        raise OSError(errno.EPERM, "it is read-only")
