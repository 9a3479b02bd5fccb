"""The number of a store's newest transaction, noted beside its environment, so that a step back is noticed.

When the newest of LMDB's two meta pages is damaged, LMDB silently takes the other one: the store is then as it was one
transaction ago, sound in itself. The same happens when an old copy of `lmdb/` is put back. So the number of every
transaction is noted in STORE/newest once it is durable. The note is not synced: after a power cut it may be an older
one, or none, but never that of a transaction that was not durable.

    offset  size   content of STORE/newest
    0       8      magic `LDBMmark`
    8       16     uuid of the store
    24      8      number of the newest transaction, little-endian
    32      4      CRC-32 of the 32 bytes before
"""

from __future__ import annotations

import contextlib
import os
import struct
from uuid import UUID
from zlib import crc32

from lmdbitmap.system import files

NEWEST = "newest"
_NOTE = struct.Struct("<8s16sQI")
_MAGIC = b"LDBMmark"


class HighWater:
    """The note of one store. Failing to read or write it is no error: the note is evidence, and may be missing."""

    def __init__(self, path: str, store: UUID) -> None:
        self._store = store
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = files.open_like_folder(path)

    def read(self) -> int:
        """Return the number of a transaction that was durable; 0 if none is noted for this store."""
        try:
            magic, store, newest, checksum = _NOTE.unpack(os.pread(self._fd, _NOTE.size, 0))
        except (OSError, struct.error):
            return 0
        known = (magic, store, checksum) == (_MAGIC, self._store.bytes, _checksum(store, newest))
        return newest if known else 0

    def raise_to(self, transaction: int) -> None:
        """Note a transaction that is durable now."""
        if self.read() < transaction:
            self._write(transaction)

    def set(self, transaction: int) -> None:
        """Note `transaction` in place of a higher one that is known to be lost. Durable on return."""
        self._write(transaction)
        with contextlib.suppress(OSError, ValueError):
            os.fdatasync(self._fd)

    def _write(self, transaction: int) -> None:
        checksum = _checksum(self._store.bytes, transaction)
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, _NOTE.pack(_MAGIC, self._store.bytes, transaction, checksum), 0)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _checksum(store: bytes, transaction: int) -> int:
    return crc32(_NOTE.pack(_MAGIC, store, transaction, 0)[:-4])
