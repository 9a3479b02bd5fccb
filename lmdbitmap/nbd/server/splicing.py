"""A pipe that moves bytes by reference between a socket and an image, without a copy in our memory.

The pipe holds the kernel's own pages, moved by `os.splice`. Only `put` and `_take` copy bytes. A
connection has one pipe for each direction, made when it is first needed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import termios
from typing import Final

from lmdbitmap.interfaces import SplicingLane

PIPE_BYTES: Final = 1 << 20


class SplicePipe:
    """A pipe from a socket to the disk behind `lane`: `fill` it, then `write` the bytes that are `held`."""

    def __init__(self, sock: socket.socket, lane: SplicingLane) -> None:
        self._sock = sock
        self._lane = lane
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)
        self._pipe: tuple[int, int] | None = None
        self._fits = True
        self.held = 0

    def opens(self) -> bool:
        """Make the pipe if there is none. False if the process may not have one, or the image takes no splice."""
        if self._pipe is None and self._fits:
            try:
                self._pipe = new_pipe()
            except OSError:
                return False
            for end in self._pipe:
                os.set_blocking(end, False)  # no other thread could end a wait
        return self._fits

    def fill(self, limit: int, *, wait: bool = True) -> int:
        """Take in at most `limit` bytes; return how many, or -1 if none are there and `wait` is False."""
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
        """Splice; return -1 if nothing is there, or no room: waiting for room would be waiting for ourselves."""
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
        """Copy out the next bytes held."""
        assert self._pipe is not None
        self.held -= count
        return os.read(self._pipe[0], count)

    def put(self, data: memoryview) -> None:
        """Put these bytes, less than a page, into the pipe before those from the socket."""
        assert self._pipe is not None
        if data:
            self.held += os.write(self._pipe[1], data)

    def write(self, length: int, offset: int) -> None:
        """Write the next bytes held. After an error only `close` may be called.

        If the image cannot be spliced to, the bytes are copied, and `opens` returns False from then on.
        """
        assert self._pipe is not None
        try:
            self._lane.write_from_pipe(self._pipe[0], length, offset)
            self.held -= length
        except OSError as refused:
            if refused.errno != errno.EINVAL or self._is_begun():
                raise
            self._fits = False
            self._lane.pwrite(self._take(length), offset)

    def _is_begun(self) -> bool:
        """Whether some of the bytes held have left the pipe, so that the next ones are not those of the write."""
        assert self._pipe is not None
        [left] = struct.unpack("i", fcntl.ioctl(self._pipe[0], termios.FIONREAD, bytes(4)))
        return bool(left != self.held)

    def close(self) -> None:
        """Close the pipe, and drop the bytes held."""
        for end in self._pipe or ():
            os.close(end)
        self._pipe, self.held = None, 0


def new_pipe() -> tuple[int, int]:
    """Return the read end and the write end of a pipe of `PIPE_BYTES`.

    Raises `OSError`, `EPERM` for a user who has as many pipes as fs.pipe-user-pages-soft allows. Any other is of two
    pages, which take twice as long as a copy, or of one, which is full of what was put there before.
    """
    pipe = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        for end in pipe:
            os.close(end)
        raise
    return pipe
