"""System calls that Python lacks. ctypes is imported when first needed: it costs more than all the rest.

"Unsupported" is an answer here, never an error: False, or nothing done. Any other refusal raises `OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
FICLONERANGE = 0x4020940D
BLKDISCARD = 0x1277
BLKSSZGET = 0x1268
SYNC_FILE_RANGE_WAIT_BEFORE = 1
_BEHIND_ALL_DATA = (1 << 63) - 4096
STATX_BYTES = 256
"""More than struct statx, in which stands, after 80 bytes, when the file was made: seconds, and nanoseconds."""
_STATX_BTIME = 0x800
_AT_FDCWD = -100
STATFS_BYTES = 256
"""More than any struct statfs; its first word is `f_type`."""

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ENODEV}
"""The errors that mean "unsupported". EINVAL too: callers check their ranges, so it comes from the kernel or driver."""


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), never making the file longer; False if this file system or device cannot."""
    call = _fallocate()
    while call(fd, mode | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        refusal = _last_error()
        if refusal.errno in UNSUPPORTED:
            return False
        if refusal.errno != errno.EINTR:
            raise refusal
    return True


def clone_range(source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> bool:
    """Make a range of `fd` share the blocks of `source_fd` (ioctl_ficlonerange(2)).

    Returns False if that fails for any reason: the caller then copies, and the copy reports a real error.
    """
    try:
        fcntl.ioctl(fd, FICLONERANGE, struct.pack("qQQQ", source_fd, source_offset, length, offset))
    except OSError:
        return False
    return True


def block_discard(fd: int, offset: int, length: int) -> None:
    """Discard whole sectors of a block device; do nothing if it cannot discard."""
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", offset, length))
    except OSError as refusal:
        if refusal.errno not in UNSUPPORTED:
            raise


def require_written_back(fd: int) -> None:
    """Raise `OSError` if the system could not write back data of an open file since it was opened, or last asked.

    Such data may be gone from memory by now, and reads then find something else. Waits for nothing: it is asked of a
    range in which no file has data, and the answer is about the whole file.
    """
    import ctypes

    call = _libc().sync_file_range
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    while call(fd, _BEHIND_ALL_DATA, 1, SYNC_FILE_RANGE_WAIT_BEFORE) != 0:
        refusal = _last_error()
        if refusal.errno in UNSUPPORTED:
            return
        if refusal.errno != errno.EINTR:
            raise refusal


def logical_sector_bytes(fd: int) -> int:
    """Return the smallest length of a block device that can be zeroed or discarded, in bytes."""
    answer: int = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0]
    return answer


def filesystem_number(file: str | int) -> int:
    """Return the `f_type` of statfs(2) for the file system that holds a path or an open file."""
    import ctypes

    answer = ctypes.create_string_buffer(STATFS_BYTES)
    libc = _libc()
    refused = libc.fstatfs(file, answer) if isinstance(file, int) else libc.statfs(os.fsencode(file), answer)
    if refused:
        raise _last_error()
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


def born_ns(path: str) -> int:
    """Return when a file was made, in Unix nanoseconds; 0 if its file system, or this system, does not tell."""
    import ctypes

    answer = ctypes.create_string_buffer(STATX_BYTES)
    call = getattr(_libc(), "statx", None)
    if call is None or call(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, answer):
        return 0
    told, seconds, nanoseconds = struct.unpack_from("=I76xqI", answer)
    return max(seconds * 1_000_000_000 + nanoseconds, 0) if told & _STATX_BTIME else 0


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    import ctypes

    call = _libc().fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _last_error() -> OSError:
    import ctypes

    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
