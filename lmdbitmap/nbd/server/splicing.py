"""READ data that travels by reference: from the page cache into a pipe, and from the pipe to the socket.

The pipe holds the kernel's own pages, moved by `os.splice`. No byte is copied to our memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from typing import Final

_PIPE_BYTES: Final = 1 << 20


class ReadPipe:
    """A pipe from the file `fd` to a socket: `fill` it, then `empty` it. It is made when it is first needed."""

    def __init__(self, fd: int, sock: socket.socket) -> None:
        self._fd = fd
        self._sock = sock
        self._ends: tuple[int, int] | None = None
        self.fits = True
        """Whether the file can be spliced, and this user has a pipe left."""

    def fill(self, offset: int, length: int) -> int:
        """Fill the pipe; return the number of the file's bytes in it, or 0 if they have to be read the other way."""
        try:
            if self._ends is None:
                self._ends = _new_pipe()
            return os.splice(self._fd, self._ends[1], length, offset_src=offset)
        except OSError as refused:
            self.fits = refused.errno not in (errno.EINVAL, errno.EPERM)
            return 0

    def empty(self, length: int) -> None:
        """Send the `length` bytes that are in it. Waits for a client that does not read."""
        assert self._ends is not None
        while length:
            length -= os.splice(self._ends[0], self._sock.fileno(), length)

    def close(self) -> None:
        """Drop what is in it. The next filling makes another pipe."""
        for end in self._ends or ():
            os.close(end)
        self._ends = None


def _new_pipe() -> tuple[int, int]:
    """Return the read end and the write end of a pipe of `_PIPE_BYTES`.

    Raises `OSError`, `EPERM` for a user who has as many pipes as fs.pipe-user-pages-soft allows. Any other is of two
    pages, which take twice as long as a copy, or of one, which is full of what was put there before.
    """
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        for end in ends:
            os.close(end)
        raise
    return ends
