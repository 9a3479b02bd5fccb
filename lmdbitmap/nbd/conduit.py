"""A pipe through which bytes travel by reference: between a socket and an image, without a copy in our memory.

What is in the pipe are the kernel's own pages; only `os.splice` touches them. One connection has one pipe for each
direction, made when it is first needed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from typing import Final

PIPE_BYTES: Final = 1 << 20


class Conduit:
    """From the socket to an image: `fill` it, have a lane write what is `held` from `out`, and say so by `taken`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pipe: tuple[int, int] | None = None
        self.held = 0

    @property
    def out(self) -> int:
        assert self._pipe is not None
        return self._pipe[0]

    def fill(self, limit: int, *, wait: bool = True) -> int:
        """Take at most `limit` bytes in, waiting for the first; how many, or -1 if there are none and `wait` is False.

        To be called while less than a page is held: a full pipe would wait for its reader, which is the caller.
        """
        if self._pipe is None:
            self._pipe = new_pipe()
        try:
            flags = 0 if wait else os.SPLICE_F_NONBLOCK
            count = os.splice(self._sock.fileno(), self._pipe[1], limit, flags=flags)
        except BlockingIOError:
            return -1
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the client left in the middle of a WRITE")
        self.held += count
        return count

    def put(self, data: memoryview) -> None:
        """Have it hold these bytes, less than a page, before what comes from the socket."""
        if data:
            self._pipe = self._pipe or new_pipe()
            self.held += os.write(self._pipe[1], data)

    def taken(self, count: int) -> None:
        self.held -= count

    def empty(self) -> None:
        """What is held is not wanted any more."""
        self.close()

    def close(self) -> None:
        for end in self._pipe or ():
            os.close(end)
        self._pipe, self.held = None, 0


def new_pipe() -> tuple[int, int]:
    """The end to read from and the end to write to, as large as this user may have it."""
    pipe = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:  # this user has many large pipes already: a small one serves too
        pass
    return pipe
