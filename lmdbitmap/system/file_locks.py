"""Locks on files and folders (flock). They end with the process, so none is left by one that was killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from lmdbitmap.errors import Busy, os_errors_at
from lmdbitmap.system.files import PRIVATE_MODE, open_like_folder
from lmdbitmap.work import forks
from lmdbitmap.work.patience import NO_PATIENCE, Patience

log = logging.getLogger(__name__)

NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a file system without locks answers."""


class LockedFile:
    """An exclusive lock that ends with `close` or with the process, whichever comes first.

    It is closed on exec, and in a forked child, which would keep it for as long as it lives.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        forks.is_not_for_children(self)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def is_named(self) -> bool:
        """Whether its path still leads to the file: if not, the lock keeps nobody out. Raises `OSError`."""
        return _is_named(self.fd, self.path)

    def remove(self) -> None:
        """Remove the file, if it still has its name. Whoever opened it before finds that, and makes another."""
        if self.fd >= 0:
            with suppress(OSError):
                if self.is_named():
                    os.unlink(self.path)

    def forsake(self) -> None:
        """Close the file in a forked child; the lock stays the parent's."""
        self.close()

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
            log.warning(
                "%s is held by another run: waiting for %g s at most", place, round(patience.left_s, 1)
            )
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


def _is_named(fd: int, path: str) -> bool:
    """Return whether `path` still leads to the open file: a lock on a removed file keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def lock_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock the folder for the block, after waiting for its holder. On a file system without locks, do nothing."""
    folder = os.fspath(path)
    with os_errors_at(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os_errors_at(folder):
            lock_where_possible(fd)
        yield
    finally:
        os.close(fd)


def lock_where_possible(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as refusal:
        if refusal.errno not in NO_LOCKS:
            raise
