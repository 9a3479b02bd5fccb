"""A device that tells what was done to it, and which of its pages differ from what they should be."""

from __future__ import annotations

from lmdbitmap.images.device import PAGE_BYTES
from lmdbitmap.images.memory_device import MemoryDevice


class Watched(MemoryDevice):
    """Notes every change, and every read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(len(content))
        super().pwrite(content, 0)
        self.written: set[int] = set()
        self.zeroed: set[int] = set()
        self.bytes_read = 0

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        super().pwrite(data, offset)
        self.written |= pages(offset, len(data))

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        self.zeroed |= pages(offset, length)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        super().pread_into(buffer, offset)
        self.bytes_read += len(buffer)

    def content(self) -> bytes:
        return self.pread(self.size, 0)


def pages(offset: int, length: int) -> set[int]:
    return set(range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)))


def differing_pages(one: bytes, other: bytes) -> set[int]:
    return {
        offset // PAGE_BYTES
        for offset in range(0, len(one), PAGE_BYTES)
        if one[offset : offset + PAGE_BYTES] != other[offset : offset + PAGE_BYTES]
    }
