"""Memory for bytes to be copied into, where that is fast.

With `rep movsb`, as the kernel copies, an AMD Zen 3 or 4 is three to four times slower where the destination lies 1 to
31 bytes further into its page than the source into its own (glibc's bug 30994). A file's bytes begin where a page does.
What `malloc` gives begins 16 bytes into one, from some 100 KiB on: so all that was read into a large `bytearray` was
read slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_FURTHER: Final = 48
"""To a cache line's beginning."""


def new_buffer(length: int) -> bytearray:
    """So many zeroes, as `bytearray` has them.

    Taking bytes off the front of a large bytearray moves its beginning, and nothing else. One that `malloc` has from
    memory that was freed before lies anywhere, and only by chance in a bad place.
    """
    buffer = bytearray(_FURTHER + length)
    del buffer[:_FURTHER]
    return buffer


def read_whole(pread_into: Callable[[memoryview, int], None], length: int, offset: int) -> bytes:
    """The bytes that `pread_into` fills a buffer with. Check the length before: so much memory is taken."""
    buffer = new_buffer(length)
    pread_into(memoryview(buffer), offset)
    return bytes(buffer)
