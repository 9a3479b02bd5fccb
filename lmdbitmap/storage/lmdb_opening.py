"""How an LMDB environment is opened: the settings that durability rests on, and what it must not be opened on.

`sync` and `metasync` are on and `writemap` is off, so a transaction that returned is on stable storage.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import NamedTuple

import lmdb

from lmdbitmap.errors import StorageError, os_errors_at
from lmdbitmap.storage import lmdb_tree
from lmdbitmap.storage.lmdb_errors import DamagedStore, translated
from lmdbitmap.system import file_systems, files, linux

MAP_BYTES = 64 << 30
"""Address space reserved at open. It costs no memory and no disk, and is more than most stores ever need."""
MIN_MAP_BYTES = 1 << 30
MAX_READERS = 1024
_MAX_DATABASES = 16
_LOCK_FILE_BYTES = (MAX_READERS + 2) * 64
"""As long as LMDB would make it: 64 bytes for each reader, and some for itself."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


class File(NamedTuple):
    """Which file it is: its device, its inode, and when it was made, as an inode is used again."""

    device: int
    inode: int
    born_ns: int


def file_of(path: str) -> File:
    """Return which file the environment in the folder `path` is now."""
    data_path = lmdb_tree.data_path_of(path)
    try:
        status = os.stat(data_path)
    except FileNotFoundError as error:  # somebody is making it anew at this moment
        raise DamagedStore(path, expected="an environment", found="none") from error
    with os_errors_at(data_path):
        return File(status.st_dev, status.st_ino, linux.born_ns(data_path))


def open_lmdb(path: str, *, create: bool = False) -> lmdb.Environment:
    """Open with the settings that durability depends on; ask for less address space if that is limited."""
    _refuse_network_filesystem(path)
    data_path = lmdb_tree.data_path_of(path)
    wanted = max(MAP_BYTES, 2 * os.path.getsize(data_path) if os.path.exists(data_path) else 0)
    while True:
        try:
            with translated(path):
                opened = lmdb.open(
                    os.fsencode(path), map_size=wanted, subdir=True, create=create, mode=0o600, lock=True,
                    sync=True, metasync=True, writemap=False, map_async=False, meminit=True, readahead=False,
                    max_readers=MAX_READERS, max_dbs=_MAX_DATABASES, max_spare_txns=0, lib_version=0,
                )  # fmt: skip
            _close_on_exec(data_path)
            return opened
        except StorageError as error:
            if isinstance(error.__cause__, lmdb.MapResizedError) and 2 * os.path.getsize(data_path) > wanted:
                wanted = 2 * os.path.getsize(data_path)  # another process made it grow just now
                continue
            if error.errno != errno.ENOMEM or wanted // 2 < MIN_MAP_BYTES:
                raise
            wanted //= 2


def reserve_lock_file(path: str) -> None:
    """Give the lock file, which nobody has open, all of its pages. LMDB maps it: on a full disk a hole is SIGBUS.

    A disk that is full already is refused only if the first page is a hole: the others are for dozens of views at once.
    """
    fd = files.open_like_folder(os.path.join(path, "lock.mdb"))
    try:
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size or _LOCK_FILE_BYTES)
    except OSError as refusal:
        if refusal.errno in _FULL and not _begins_with_data(fd):
            raise
    finally:
        os.close(fd)


def _begins_with_data(fd: int) -> bool:
    try:
        return os.lseek(fd, 0, os.SEEK_DATA) == 0
    except OSError:
        return False


def _close_on_exec(data_path: str) -> None:
    """Keep LMDB's descriptor of the file, which it leaves open to them, from programs that this process executes."""
    with contextlib.suppress(OSError):
        there = os.stat(data_path)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.path.samestat(os.fstat(int(name)), there):
                    os.set_inheritable(int(name), False)


def _refuse_network_filesystem(path: str) -> None:
    kind = file_systems.filesystem_kind(path)
    if file_systems.is_network_filesystem(kind):
        raise StorageError(
            f"store {path} on {kind}",
            OSError(errno.ENOTSUP, "network file system"),
            next_step="keep the store on a local disk: LMDB's locks and memory map do not work across a network",
        )


def require_sound_tree(path: str) -> None:
    """Check a file that no process has open: LMDB trusts its pages, and a damaged one can crash the process."""
    try:
        problems = lmdb_tree.structural_problems(lmdb_tree.data_path_of(path))
    except ValueError as error:
        raise DamagedStore(path, expected="an LMDB file", found=error) from error
    if problems:
        found = f"{problems[0]} ({len(problems)} in all)"
        raise DamagedStore(path, expected="a sound tree of pages", found=found)
