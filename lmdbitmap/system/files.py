"""Small files that must be whole: replaced atomically, locked, and read with a bound.

A file is replaced in seven steps. Death between any two of them leaves the old file or the new one:

1. create a file under a temporary name in the same folder, readable by its owner only
2. lock it (flock): a temporary file without a lock is one whose writer is dead
3. write the content
4. give it its final mode
5. fsync it: the final name must never lead to content that is not there yet
6. rename it over the old one
7. fsync the folder: only now is the new file sure to survive a power cut

A failure in steps 1 to 6 removes the temporary file and leaves the old one. A killed process cannot tidy up, so the
next writer of the same file removes its leftovers. Their names (`NAME.<16 hexadecimal digits>.partial`) are used for
nothing else, and the lock tells them from the files of living writers.

A file or folder made `like_folder` belongs to the owner of its folder. Otherwise files that root makes in a user's
store would be closed to that user. Only a file that we just made is given away, and by its descriptor: its name may
lead to another file by then.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, LmdbitmapError, NotFound, os_errors_at
from lmdbitmap.interfaces import Buffer
from lmdbitmap.system import linux
from lmdbitmap.system.file_names import finished_name, new_unfinished
from lmdbitmap.work.patience import NO_PATIENCE, Patience

log = logging.getLogger(__name__)


PRIVATE_MODE = 0o600
PRIVATE_FOLDER_MODE = 0o700

FILESYSTEM_KINDS = {
    0xEF53: "ext4",  # ext2 and ext3 too: they share the number
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x3153464A: "jfs",
    0x52654973: "reiserfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlay",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0x7366746E: "ntfs3",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x65735546: "fuse",  # sshfs, glusterfs, s3fs, virtiofs: the number does not tell which
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x564C: "ncp",
    0x20030528: "orangefs",
    0x19830326: "beegfs",
    0xAAD7AAEA: "panfs",
    0x47504653: "gpfs",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0x786F4256: "vboxsf",
}
"""The `f_type` of statfs(2), by name."""

NETWORK_FILESYSTEMS = {
    "nfs", "cifs", "smb2", "smb", "fuse", "9p", "ceph", "lustre", "afs", "coda", "ncp", "orangefs", "beegfs",
    "panfs", "gpfs", "gfs2", "ocfs2", "vboxsf",
}  # fmt: skip
"""File systems that cannot hold a store: another machine may write, or two processes' mappings may differ."""


@contextmanager
def replacing(
    path: str | os.PathLike[str], mode: int = PRIVATE_MODE, *, like_folder: bool = False
) -> Iterator[BinaryIO]:
    """Yield a new file to fill; if the block does not raise, the file then replaces `path`, durably.

    The file can be written, read and sought; its `name` is the temporary one. If the block raises, `path` is as it
    was. A symbolic link stays and its target is replaced. Anything but a regular file at `path` is refused with
    `InvalidArgument`, so that no file is renamed over /dev/null. `like_folder` gives the file to the owner of its
    folder. That owner may have put a link there for root to follow, so a link is refused then too.
    """
    target = _replaceable(path, follow=not like_folder)
    _sweep(target)
    partial, file = "", None
    try:
        while file is None:
            # Choose the name before the file exists: an interruption may come right after its creation.
            partial = new_unfinished(target)
            with os_errors_at(target), _folder_of(target):
                file = _create_locked(partial, target)
        with file:
            if like_folder:
                with os_errors_at(target):
                    give_to_owner_of(os.path.dirname(target), file.fileno())
            yield file
            with os_errors_at(target):
                _publish(file, target, mode)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    fsync_folder(os.path.dirname(target))


def replace_atomically(
    path: str | os.PathLike[str], data: Buffer, mode: int = PRIVATE_MODE, *, like_folder: bool = False
) -> None:
    """Replace the content of `path` by `data`, durably; readers see the old content or the new, never a mixture."""
    with replacing(path, mode, like_folder=like_folder) as file:
        file.write(data)


def give_to_owner_of(folder: str, fd: int) -> None:
    """As root, chown the new file or folder `fd` to the owner of `folder`; otherwise do nothing."""
    status = os.stat(folder or ".")
    if os.geteuid() == 0 and status.st_uid != 0:
        with suppress(PermissionError):  # root without the privilege to chown
            os.fchown(fd, status.st_uid, status.st_gid)


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


def _replaceable(path: str | os.PathLike[str], *, follow: bool) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    target = os.path.realpath(path) if follow else os.path.join(os.path.realpath(folder), name)
    with os_errors_at(target):
        if os.path.lexists(target) and not stat.S_ISREG(os.lstat(target).st_mode):
            raise InvalidArgument(
                f"{target} is not a regular file and cannot be replaced by one", next_step="name a file"
            )
    return target


def _sweep(target: str) -> None:
    """Remove what dead writers of this file left. A failure, as in a folder that cannot be listed, is ignored."""
    folder, name = os.path.split(target)
    with suppress(LmdbitmapError):
        remove_leftovers(folder, name)


class _NewFile(io.FileIO):
    """A raw file whose writes raise our errors with the final name, which the caller's block does not know."""

    target: str

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        with os_errors_at(self.target):
            return super().write(data)


@contextmanager
def _folder_of(target: str) -> Iterator[None]:
    """That a file which is to be made does not exist says nothing: what is missing is its folder."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise NotFound(
            f"there is no folder {os.path.dirname(target)}", next_step="make it, or name another place"
        ) from missing


def _create_locked(name: str, target: str) -> io.BufferedRandom | None:
    """Steps 1 and 2; None if `remove_leftovers` swept the file away between the two."""
    raw = _NewFile(name, "x+", opener=_open_private)
    raw.target = target
    try:
        _lock_where_possible(raw.fileno())
    except BaseException:
        raw.close()
        raise
    if os.path.lexists(name):
        return io.BufferedRandom(raw)
    raw.close()
    return None


def _open_private(name: str, flags: int) -> int:
    return os.open(name, flags, PRIVATE_MODE)


def _lock_where_possible(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as refusal:
        if refusal.errno not in _NO_LOCKS:
            raise


def _publish(file: io.BufferedRandom, target: str, mode: int) -> None:
    """Steps 4 to 6, in that order."""
    file.flush()
    os.fchmod(file.fileno(), mode)
    os.fsync(file.fileno())
    os.rename(file.name, target)


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


def make_folders(path: str | os.PathLike[str]) -> list[str]:
    """Make a folder and its missing parents, accessible to their owner only; durable on return.

    Returns the folders that it made, outermost first.
    """
    folder = os.path.abspath(path)
    if os.path.isdir(folder):
        return []
    if os.path.lexists(folder) and not os.path.isdir(folder):  # if it is a folder, somebody made it just now
        raise InvalidArgument(f"{folder} is not a folder", next_step="name a folder, or one that can be made")
    above = os.path.dirname(folder)
    made = make_folders(above)
    with os_errors_at(folder), suppress(FileExistsError):
        os.mkdir(folder, PRIVATE_FOLDER_MODE)
        made.append(folder)
    fsync_folder(above)
    return made


def remove_folders(folders: Iterable[str]) -> None:
    """Remove the folders that `make_folders` made, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in reversed(list(folders)):
            os.rmdir(folder)


_NO_FOLDER_SYNC = {
    errno.EINVAL,
    errno.EOPNOTSUPP,
}  # on some network file systems: nothing more can be done there
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def first_bytes(path: str, count: int) -> bytes:
    """Return the first `count` bytes of a file; none if it is empty, missing or not a regular file."""
    with os_errors_at(path):
        if not os.path.isfile(path):
            return b""
        with open(path, "rb", opener=open_nonblocking) as file:
            return file.read(count)


def remove_leftovers(folder: str | os.PathLike[str], of: str | None = None) -> list[str]:
    """Remove what killed writers of the file named `of`, or of any file, left; return the removed names, sorted.

    Unfinished files of living writers are locked and stay. On a file system without locks the two cannot be told
    apart, and everything stays.
    """
    place = os.fspath(folder)
    with os_errors_at(place):
        whose = {name: finished_name(name) for name in os.listdir(place)}
        left = [name for name, target in whose.items() if target is not None and of in (None, target)]
        return sorted(name for name in left if _remove_if_abandoned(os.path.join(place, name)))


def _remove_if_abandoned(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # finished meanwhile, or not made by us
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError as refusal:
        if refusal.errno in _NO_LOCKS | {errno.EWOULDBLOCK, errno.ENOENT}:
            return False
        raise
    finally:
        os.close(fd)
    return True


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the whole content of a regular file of at most `limit` bytes; raise `FormatError` for anything else."""
    place = os.fspath(path)
    with os_errors_at(place), open(place, "rb", opener=open_nonblocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _unexpected(place, "a regular file", "something else")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _unexpected(place, f"at most {limit} bytes", f"{max(status.st_size, len(data))} bytes")
    return data


def open_nonblocking(path: str, flags: int) -> int:
    """Open without waiting for the writer of a fifo."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _unexpected(place: str, expected: str, found: str) -> FormatError:
    return FormatError(place, expected=expected, found=found, next_step="check that it is the right file")


def pwrite_whole(fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data`, in as many calls as it takes. Raises `OSError`, `EIO` where the file takes no more."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        rest, offset = rest[count:], offset + count


def filesystem_kind(path: str | os.PathLike[str]) -> str:
    """Return the kind of file system that holds `path`, such as `ext4` or `nfs`; `unknown 0x…` if not in our table."""
    place = os.fspath(path)
    with os_errors_at(place):
        number = linux.filesystem_number(place)
    return FILESYSTEM_KINDS.get(number, f"unknown {number:#x}")


def is_network_filesystem(kind: str) -> bool:
    return kind in NETWORK_FILESYSTEMS


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes an ordinary user may still write to the file system that holds `path`."""
    place = os.fspath(path)
    with os_errors_at(place):
        status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


class LockedFile:
    """An exclusive lock that ends with `close` or with the process, whichever comes first.

    It is closed on exec; a forked child that does not exec keeps holding it.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> LockedFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def lock_file(
    path: str | os.PathLike[str], *, like_folder: bool = False, patience: Patience = NO_PATIENCE
) -> LockedFile:
    """Lock the file at `path`, created empty if missing; raise `Busy` if it stays locked for longer than `patience`."""
    place = os.fspath(path)
    has_waited = False
    while True:
        try:
            return _lock_at_once(place, like_folder)
        except Busy:
            if not patience.left_s:
                raise
        if not has_waited:
            log.warning("%s is held by another run: waiting for %.3g s at most", place, patience.left_s)
        has_waited = True
        patience.pause()


def _lock_at_once(place: str, like_folder: bool) -> LockedFile:
    with os_errors_at(place):
        while True:
            fd = open_like_folder(place) if like_folder else _open_or_make(place)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(fd, place):
                    return LockedFile(place, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _open_or_make(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_MODE)


@contextmanager
def lock_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock the folder for the block, after waiting for its holder. On a file system without locks, do nothing."""
    folder = os.fspath(path)
    with os_errors_at(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os_errors_at(folder):
            _lock_where_possible(fd)
        yield
    finally:
        os.close(fd)


def _is_named(fd: int, path: str) -> bool:
    """Return whether `path` still leads to the open file: a lock on a removed file keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
