"""The byte-range locks by which QEMU and we keep out of each other's images (QEMU: block/file-posix.c).

Every user of an image declares with shared one-byte locks what it does and what others must not do:

| byte    | a lock on it says                  |
|---------|------------------------------------|
| 100 + p | I use permission p                 |
| 200 + p | I do not share permission p        |

Then it tests whether somebody else holds the counterpart: 200 + p for what it uses, 100 + p for what it does not
share. It locks first and tests second, so if two users come together, both may be refused, but at least one is.

| we open it                  | uses                           | does not share |
|-----------------------------|--------------------------------|----------------|
| for writing                 | CONSISTENT_READ, WRITE, RESIZE | WRITE, RESIZE  |
| for reading                 | CONSISTENT_READ                | WRITE, RESIZE  |
| for reading, sharing writes | CONSISTENT_READ                |                |

The locks belong to the open file description. So they end when it is closed or its process dies, they exclude a second
opening in the same process too, and a forked child that does not exec keeps holding them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct

from lmdbitmap.errors import Busy, os_errors_at

log = logging.getLogger(__name__)

RAW_LOCK_PERM_BASE = 100
RAW_LOCK_SHARED_BASE = 200
BLK_PERM_CONSISTENT_READ = 0
BLK_PERM_WRITE = 1
BLK_PERM_RESIZE = 3

_STRUCT_FLOCK = "hhqqi0q"  # l_type, l_whence, l_start, l_len, l_pid; 0q pads the end as C does
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def lock_image(fd: int, path: str, *, writes: bool, share_writes: bool) -> bool:
    """Take the locks or raise `Busy`; return False on a file system without locks.

    There we go on without locks, as QEMU does by default: refusing would keep nobody out and only make such images
    impossible to track.
    """
    uses = (
        [BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE, BLK_PERM_RESIZE] if writes else [BLK_PERM_CONSISTENT_READ]
    )
    unshared = [] if share_writes else [BLK_PERM_WRITE, BLK_PERM_RESIZE]
    with os_errors_at(path):
        if not _has_locks(fd):
            log.warning("%s is on a file system without locks: nothing keeps QEMU from opening it", path)
            return False
        for byte in _lock_bytes(uses, unshared):
            _lock_byte(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        for byte in _lock_bytes(unshared, uses):
            if _lock_byte(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK:
                raise Busy(
                    f"{path} is open in QEMU or in another lmdbitmap that does not share it",
                    next_step=f"stop that program first (fuser -v {path} names it)",
                )
    return True


def _lock_bytes(used: list[int], unshared: list[int]) -> list[int]:
    return [RAW_LOCK_PERM_BASE + perm for perm in used] + [RAW_LOCK_SHARED_BASE + perm for perm in unshared]


def _has_locks(fd: int) -> bool:
    try:
        _lock_byte(fd, fcntl.F_OFD_GETLK, fcntl.F_RDLCK, RAW_LOCK_PERM_BASE)
    except OSError as refusal:
        if refusal.errno in _NO_LOCKS:
            return False
        raise
    return True


def _lock_byte(fd: int, command: int, kind: int, byte: int) -> int:
    """Return the `l_type` that the kernel answers: for F_OFD_GETLK, F_UNLCK if no lock conflicts."""
    request = struct.pack(_STRUCT_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
    answer: int = struct.unpack(_STRUCT_FLOCK, fcntl.fcntl(fd, command, request))[0]
    return answer
