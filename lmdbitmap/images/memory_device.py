"""A disk in memory, for our tests and for those of programs that embed the library."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lmdbitmap.geometry import check_range
from lmdbitmap.images.device import DATA, HOLE, PAGE_BYTES, check_size, closed_error, read_only_error
from lmdbitmap.interfaces import Allocation, Buffer, joined
from lmdbitmap.work.buffers import in_bytes


class MemoryDevice:
    """A disk of zeroes that behaves like `FileDevice`.

    `fail_next["pwrite"] = errno.ENOSPC` makes the next `pwrite` raise that error and write nothing.
    """

    fd = None

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        check_size(size)
        self.fail_next: dict[str, int] = {}
        self._bytes = bytearray(size)
        self._read_only = read_only
        self._closed = False
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self._bytes)

    @property
    def read_only(self) -> bool:
        return self._read_only

    def pread(self, length: int, offset: int) -> bytes:
        with self._doing("pread", offset, length):
            return bytes(self._bytes[offset : offset + length])

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer = in_bytes(buffer)
        with self._doing("pread_into", offset, len(buffer)):
            buffer[:] = self._bytes[offset : offset + len(buffer)]

    def pwrite(self, data: Buffer, offset: int) -> None:
        data = in_bytes(data)
        with self._doing("pwrite", offset, len(data), writes=True):
            self._bytes[offset : offset + len(data)] = data

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        with self._doing("write_zeroes", offset, length, writes=True):
            self._bytes[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        with self._doing("discard", offset, length, writes=True):
            self._bytes[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        with self._doing("flush"):
            pass

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        """Yield the allocation; pages of zeroes are holes."""
        with self._doing("allocation", offset, length):
            return joined(self._pages(offset, offset + length))

    def _pages(self, start: int, stop: int) -> Iterator[Allocation]:
        while start < stop:
            end = min(start - start % PAGE_BYTES + PAGE_BYTES, stop)
            is_zero = self._bytes.count(0, start, end) == end - start
            yield Allocation(end - start, *(HOLE if is_zero else DATA))
            start = end

    def resize(self, size: int) -> None:
        check_size(size)
        with self._doing("resize", writes=True):
            del self._bytes[size:]
            self._bytes.extend(bytes(size - len(self._bytes)))

    def close(self) -> None:
        self._closed = True

    @contextmanager
    def _doing(
        self, operation: str, offset: int = 0, length: int = 0, *, writes: bool = False
    ) -> Iterator[None]:
        with self._lock:
            check_range(offset, length, len(self._bytes))
            if self._closed:
                raise closed_error()
            if writes and self._read_only:
                raise read_only_error("memory")
            code = self.fail_next.pop(operation, None)
            if code is not None:
                raise OSError(code, os.strerror(code))
            yield
