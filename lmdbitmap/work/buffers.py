"""Buffers at addresses that the kernel copies to fast.

The kernel copies with `rep movsb`. On AMD Zen 3 and 4 that is three to four times slower if the destination lies 1 to
31 bytes further into its page than the source into its own (glibc's bug 30994). A file's bytes begin at a page
boundary. From some 100 KiB on, `malloc` returns memory that begins 16 bytes into a page, so every read into a large
`bytearray` was slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from lmdbitmap.interfaces import Buffer

_FURTHER: Final = 48
"""malloc's 16 bytes + 48 = 64: the start of a cache line."""


def new_buffer(length: int) -> bytearray:
    """Return a bytearray of `length` zeroes.

    Deleting bytes from the front of a large bytearray only moves its beginning. A buffer that `malloc` takes from
    memory freed before can lie anywhere, and only by chance in a bad place.
    """
    buffer = bytearray(_FURTHER + length)
    del buffer[:_FURTHER]
    return buffer


def in_bytes(data: Buffer) -> memoryview:
    """Return the same memory as a view whose length is in bytes.

    A view may have larger items, or rows of them: as long as its length, only the first of its bytes would be checked,
    marked dirty or read. Raises `TypeError` for a view of scattered memory.
    """
    view = memoryview(data)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


def read_whole(pread_into: Callable[[memoryview, int], None], length: int, offset: int) -> bytes:
    """Return the bytes that `pread_into` fills a buffer with. It allocates `length` bytes: check that first."""
    buffer = new_buffer(length)
    pread_into(memoryview(buffer), offset)
    return bytes(buffer)
