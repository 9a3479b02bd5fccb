"""Files that are read from, any number of them, a few of which are open at a time."""

from __future__ import annotations

from collections import OrderedDict

from lmdbitmap.device import FileDevice

MOST_OPEN = 64


class FilePool:
    """Opens files when they are read, and closes what was not read for longest. For one thread."""

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        self._most_open = most_open
        self._open: OrderedDict[str, FileDevice] = OrderedDict()

    def device(self, path: str) -> FileDevice:
        """The file, open until others are asked for. Nobody writes to it meanwhile; else `Busy`."""
        if path not in self._open:
            while len(self._open) >= self._most_open:
                self._open.popitem(last=False)[1].close()
            self._open[path] = FileDevice.open(path, read_only=True)
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> FilePool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class PooledFile:
    """One file of a pool."""

    def __init__(self, pool: FilePool, path: str) -> None:
        self.path = path
        self.size = pool.device(path).size
        self._pool = pool

    @property
    def device(self) -> FileDevice:
        return self._pool.device(self.path)

    def pread(self, length: int, offset: int) -> bytes:
        return self.device.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.device.pread_into(buffer, offset)
