"""Copies bytes from file to file: in the kernel if it can, so that they do not pass through this program."""

from __future__ import annotations

import os

from lmdbitmap.errors import os_errors_at
from lmdbitmap.images.device import FileDevice
from lmdbitmap.system.files import pwrite_whole

PIECE_BYTES = 8 << 20
"""The most bytes to copy between two reports; they are held in memory if the kernel cannot copy."""


class FileCopier:
    """Fills the file `fd`; errors name `place`, its final path. For one thread."""

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        self._place = place
        self._kernel_can = True

    def copy(self, source: FileDevice, from_offset: int, to_offset: int, length: int) -> None:
        """Copy `length` bytes, at most `PIECE_BYTES`."""
        end = from_offset + length
        while from_offset < end:
            count = self._copy_in_kernel(source, from_offset, to_offset, end - from_offset)
            if not count:
                count = self._copy_by_hand(source, from_offset, to_offset, end - from_offset)
            from_offset, to_offset = from_offset + count, to_offset + count

    def _copy_in_kernel(self, source: FileDevice, from_offset: int, to_offset: int, length: int) -> int:
        """Return how many bytes the kernel copied; 0 if it cannot, and then copying by hand reports any real error."""
        if self._kernel_can:
            assert source.fd is not None
            try:
                return os.copy_file_range(source.fd, self._fd, length, from_offset, to_offset)
            except OSError:
                self._kernel_can = False
        return 0

    def _copy_by_hand(self, source: FileDevice, from_offset: int, to_offset: int, length: int) -> int:
        with os_errors_at(source.path):
            data = source.pread(length, from_offset)
        with os_errors_at(self._place):
            pwrite_whole(self._fd, data, to_offset)
        return length
