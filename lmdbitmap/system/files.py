"""Files and folders of ours: made, synced and read with a bound.

What is made like its folder belongs to the folder's owner. Otherwise files that root makes in a user's store would be
closed to that user. Only a file that we just made is given away, and by its descriptor: its name may lead to another
file by then.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from lmdbitmap.errors import FormatError, InvalidArgument, os_errors_at
from lmdbitmap.interfaces import Buffer

PRIVATE_MODE: Final = 0o600
PRIVATE_FOLDER_MODE: Final = 0o700
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}
"""What some network file systems answer: nothing more can be done there."""
_NO_TMPFILE = {errno.EISDIR, errno.EOPNOTSUPP}
"""The errors of file systems without O_TMPFILE."""

# --- folders ---


def make_folders(path: str | os.PathLike[str]) -> list[str]:
    """Make a folder and its missing parents, accessible to their owner only; durable on return.

    Returns the folders that it made, outermost first.
    """
    folder = os.path.abspath(path)
    if os.path.isdir(folder):
        return []
    if _is_other_than_a_folder(folder):
        raise InvalidArgument(f"{folder} is not a folder", next_step="name a folder, or one that can be made")
    above = os.path.dirname(folder)
    made = make_folders(above)
    with os_errors_at(folder), suppress(FileExistsError):
        os.mkdir(folder, PRIVATE_FOLDER_MODE)
        made.append(folder)
    fsync_folder(above)
    return made


def _is_other_than_a_folder(path: str) -> bool:
    """Look once: a folder may come and go meanwhile."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return os.path.islink(path)  # to nothing


def remove_folders(folders: Iterable[str]) -> None:
    """Remove the folders that `make_folders` made, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in reversed(list(folders)):
            os.rmdir(folder)


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable, as far as its file system can."""
    folder = os.fspath(path)
    with os_errors_at(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as refusal:
            if refusal.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(fd)


# --- like their folder ---


def make_folder_like(path: str) -> None:
    """Make the folder `path` in an existing folder, unless it is there; durable on return."""
    try:
        os.mkdir(path, PRIVATE_FOLDER_MODE)
    except FileExistsError:
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        give_to_owner_of(os.path.dirname(path), fd)
    finally:
        os.close(fd)
    fsync_folder(os.path.dirname(path))


def open_like_folder(path: str) -> int:
    """Open a file for reading and writing and return its descriptor; a missing file is created empty."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with suppress(FileExistsError):
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
            break
        with suppress(FileNotFoundError):  # removed just now
            return os.open(path, flags)
    try:
        give_to_owner_of(os.path.dirname(path), fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def give_to_owner_of(folder: str, fd: int) -> None:
    """As root, chown the new file or folder `fd` to the owner of `folder`; otherwise do nothing."""
    status = os.stat(folder or ".")
    if os.geteuid() == 0 and status.st_uid != 0:
        with suppress(PermissionError):  # root without the privilege to chown
            os.fchown(fd, status.st_uid, status.st_gid)


# --- content ---


def is_there(path: str) -> bool:
    """Return whether there is something of that name. `os.path.lexists` takes any error for its absence.

    An error names the folder, which may not be looked into.
    """
    with os_errors_at(os.path.dirname(path)):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def open_nameless(folder: str | os.PathLike[str]) -> int:
    """Open a new file in `folder` that has no name, accessible to its owner only: nothing of it can stay behind."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, PRIVATE_MODE)
    except OSError as refusal:
        if refusal.errno not in _NO_TMPFILE:
            raise
    fd, path = tempfile.mkstemp(dir=folder)
    os.unlink(path)
    return fd


def first_bytes(path: str, count: int, *, of_devices: bool = False) -> bytes:
    """Return the first `count` bytes of a file; none if it is empty, missing or not a regular file.

    `of_devices`: of a block device, too.
    """
    with os_errors_at(path):
        if not os.path.isfile(path) and not (of_devices and _is_block_device(path)):
            return b""
        with open(path, "rb", opener=open_nonblocking) as file:
            return file.read(count)


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the whole content of a regular file of at most `limit` bytes; raise `FormatError` for anything else."""
    place = os.fspath(path)
    with os_errors_at(place), open(place, "rb", opener=open_nonblocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _unexpected(place, "a regular file", "something else")
        data = file.read(min(limit, status.st_size) + 1)  # Python takes memory for all that is asked for
    if len(data) > limit:
        raise _unexpected(place, f"at most {limit} bytes", f"{max(status.st_size, len(data))} bytes")
    return data


def open_nonblocking(path: str, flags: int) -> int:
    """Open without waiting for the writer of a fifo."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _unexpected(place: str, expected: str, found: str) -> FormatError:
    return FormatError(place, expected=expected, found=found, next_step="check that it is the right file")


def pread_whole(fd: int, length: int, offset: int) -> bytes:
    """Read `length` bytes, in as many calls as it takes; fewer only where the file ends. Raises `OSError`."""
    parts, count = [], 0
    while count < length and (part := os.pread(fd, length - count, offset + count)):
        parts.append(part)
        count += len(part)
    return b"".join(parts)


def pwrite_whole(fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data`, in as many calls as it takes. Raises `OSError`, `EIO` where the file takes no more."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        rest, offset = rest[count:], offset + count
