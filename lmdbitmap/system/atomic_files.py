"""Small files that must be whole: replaced atomically.

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

A file made `like_folder` belongs to the owner of its folder (files.py).
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from lmdbitmap.errors import InvalidArgument, LmdbitmapError, NotFound, os_errors_at
from lmdbitmap.interfaces import Buffer
from lmdbitmap.system.file_locks import NO_LOCKS, lock_where_possible
from lmdbitmap.system.file_names import finished_name, new_unfinished
from lmdbitmap.system.files import PRIVATE_MODE, fsync_folder, give_to_owner_of


@contextmanager
def replacing(
    path: str | os.PathLike[str],
    mode: int = PRIVATE_MODE,
    *,
    like_folder: bool = False,
    follow: bool = True,
) -> Iterator[BinaryIO]:
    """Yield a new file to fill; if the block does not raise, the file then replaces `path`, durably.

    The file can be written, read and sought; its `name` is the temporary one. If the block raises, `path` is as it
    was. A symbolic link stays and its target is replaced. Anything but a regular file at `path` is refused with
    `InvalidArgument`, so that no file is renamed over /dev/null. `like_folder` gives the file to the owner of its
    folder. That owner may have put a link there for root to follow, so a link is refused then too, and without
    `follow`: in a folder that others may write.
    """
    target = _replaceable(path, follow=follow and not like_folder)
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


def replace(
    path: str | os.PathLike[str],
    data: Buffer,
    mode: int = PRIVATE_MODE,
    *,
    like_folder: bool = False,
    follow: bool = True,
) -> None:
    """Replace the content of `path` by `data`, durably; readers see the old content or the new, never a mixture."""
    with replacing(path, mode, like_folder=like_folder, follow=follow) as file:
        file.write(data)


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
        lock_where_possible(raw.fileno())
    except BaseException:
        raw.close()
        raise
    if os.path.lexists(name):
        return io.BufferedRandom(raw)
    raw.close()
    return None


def _open_private(name: str, flags: int) -> int:
    return os.open(name, flags, PRIVATE_MODE)


def _publish(file: io.BufferedRandom, target: str, mode: int) -> None:
    """Steps 4 to 6, in that order."""
    file.flush()
    os.fchmod(file.fileno(), mode)
    os.fsync(file.fileno())
    os.rename(file.name, target)


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
        if refusal.errno in NO_LOCKS | {errno.EWOULDBLOCK, errno.ENOENT}:
            return False
        raise
    finally:
        os.close(fd)
    return True
