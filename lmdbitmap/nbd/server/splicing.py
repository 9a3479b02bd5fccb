"""A pipe through which bytes travel by reference: between a socket and an image, without a copy in our memory.

What is in the pipe are the kernel's own pages; only `os.splice` touches them. One connection has one pipe for each
direction, made when it is first needed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from typing import Final

from lmdbitmap.interfaces import SplicingLane

PIPE_BYTES: Final = 1 << 20


class SplicePipe:
    """From a socket to the disk behind `lane`: `fill` it, and have it `write` what is `held`."""

    def __init__(self, sock: socket.socket, lane: SplicingLane) -> None:
        self._sock = sock
        self._lane = lane
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)
        self._pipe: tuple[int, int] | None = None
        self._fits = True
        self.held = 0

    def opens(self) -> bool:
        """Make the pipe if there is none; False where this process may not have one, or it leads nowhere."""
        if self._pipe is None and self._fits:
            try:
                self._pipe = new_pipe()
            except OSError:
                return False
            for end in self._pipe:
                os.set_blocking(end, False)  # nobody else is there to end a wait
        return self._fits

    def fill(self, limit: int, *, wait: bool = True) -> int:
        """Take at most `limit` bytes in; how many, or -1 where there are none to come and `wait` is False."""
        if not wait and not self._arrivals.poll(0):
            return -1
        while (count := self._splice(limit)) < 0:
            self._gather()
            self._arrivals.poll()
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the client left in the middle of a WRITE")
        self.held += count
        return count

    def _splice(self, limit: int) -> int:
        """-1 when nothing is there, or no room: waiting for room would be waiting for ourselves."""
        assert self._pipe is not None
        try:
            return os.splice(self._sock.fileno(), self._pipe[1], limit, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return -1

    def _gather(self) -> None:
        """Make room: a client that sends byte by byte fills the pipe's slots with next to nothing."""
        if self.held:
            self.put(memoryview(self._take(self.held)))

    def _take(self, count: int) -> bytes:
        """The next bytes that are held, copied out."""
        assert self._pipe is not None
        self.held -= count
        return os.read(self._pipe[0], count)

    def put(self, data: memoryview) -> None:
        """Have it hold these bytes, less than a page, before what comes from the socket."""
        assert self._pipe is not None
        if data:
            self.held += os.write(self._pipe[1], data)

    def write(self, length: int, offset: int) -> None:
        """Write the next bytes that are held; after an error only `close` is of use.

        To a kind of file that cannot be spliced to they are copied, and `opens` says so from then on.
        """
        assert self._pipe is not None
        try:
            self._lane.write_from_pipe(self._pipe[0], length, offset)
            self.held -= length
        except OSError as refused:
            if refused.errno != errno.EINVAL:
                raise
            self._fits = False
            self._lane.pwrite(self._take(length), offset)

    def close(self) -> None:
        """Let go of the pipe, and of what is held."""
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
