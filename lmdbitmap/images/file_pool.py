"""A pool of any number of files to read, of which a limited number is open at a time.

A file that is reopened must be the same: same inode, size and mtime. Otherwise the image's tables, which were read
before, would be used on another file. An open file has its locks, as any image has. While it is closed, other programs
may change it; the next opening notices that.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from lmdbitmap.errors import Busy, NotFound
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import ImageIdentity

MOST_OPEN = 64
_MOST_EVER = 4096


def half_of_what_may_be_open() -> int:
    """Return half of this process's limit of open descriptors, at most `_MOST_EVER`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(soft // 2, _MOST_EVER)) if soft != resource.RLIM_INFINITY else _MOST_EVER


@dataclass(slots=True)
class _Opened:
    device: FileDevice
    users: int = 0


class FilePool:
    """Opens files when they are read, and closes the least recently read. Safe for many threads.

    A file that is being read is never closed, so each thread may add one open file to the limit.
    """

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        self._most_open = most_open
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._closed = False

    @contextlib.contextmanager
    def reading(self, path: str, known: ImageIdentity | None = None) -> Iterator[FileDevice]:
        """Yield the file, open and locked against writers. Raises `Busy` if it has a writer or is not `known`."""
        with self._lock:
            opened = self._opened(path, known)
            opened.users += 1
        try:
            yield opened.device
        finally:
            with self._lock:
                opened.users -= 1

    def _opened(self, path: str, known: ImageIdentity | None) -> _Opened:
        if self._closed:
            raise OSError(errno.EBADF, "the files are closed", path)
        if path not in self._open:
            if len(self._open) >= self._most_open:
                self._make_room()
            self._open[path] = _Opened(_the_same(path, known))
        self._open.move_to_end(path)
        return self._open[path]

    def _make_room(self) -> None:
        idle = [path for path, opened in self._open.items() if not opened.users]
        for path in idle[: len(self._open) - self._most_open + 1]:
            self._open.pop(path).device.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._open:
                self._open.popitem()[1].device.close()

    def __enter__(self) -> FilePool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _the_same(path: str, known: ImageIdentity | None) -> FileDevice:
    try:
        device = FileDevice.open(path, read_only=True)
    except NotFound as gone:
        if known is None:
            raise
        raise _changed(path) from gone
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(device.close)
        if known is not None and device.identity() != known:
            raise _changed(path)
        on_failure.pop_all()
    return device


def _changed(path: str) -> Busy:
    return Busy(f"{path} was changed or replaced while it was read", next_step="begin again")


class PooledFile:
    """One file of a pool."""

    def __init__(self, pool: FilePool, path: str) -> None:
        self.path = path
        self._pool = pool
        with pool.reading(path) as device:
            self.size = device.size
            self._identity = device.identity()

    def reading(self) -> contextlib.AbstractContextManager[FileDevice]:
        """Return a context manager with the file's device, which stays open in the block."""
        return self._pool.reading(self.path, self._identity)

    def pread(self, length: int, offset: int) -> bytes:
        with self.reading() as device:
            return device.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        with self.reading() as device:
            device.pread_into(buffer, offset)
