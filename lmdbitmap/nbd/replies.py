"""What goes back to one client, and the data of its READs: the outgoing half of the hot loop.

Replies gather in one buffer and leave in one send. Small READs are read straight into that buffer, behind
their headers. Long ones travel by reference: from the page cache into a pipe, and from the pipe to the socket;
the pipe is filled before the header is sent, so that an error of the disk can still be told. What the client
receives that way is the page as it is when it gets there: a write that overlaps a READ in flight may show in
it, as the protocol allows. A disk that must not show it (a point in time) has no `fd`.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.interfaces import Lane
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.conduit import new_pipe
from lmdbitmap.nbd.notice import Notice
from lmdbitmap.nbd.requests import error_of

_log = logging.getLogger(__name__)

Read: TypeAlias = tuple[bytes, int, int]
"""(cookie, offset, length)"""

_BUFFER: Final = 512 << 10
SPLICE_FROM: Final = 32 << 10
"""READs of this many bytes travel by reference: below it, copying is cheaper than two more system calls."""
_NEVER: Final = 1 << 62

_SIMPLE_OK: Final = struct.pack(">II", nbd.NBD_SIMPLE_REPLY_MAGIC, 0)
"""A simple reply but for its cookie."""
_DATA: Final = struct.Struct(">Q8sIQ")
"""`nbd.OFFSET_DATA_REPLY` with magic, flags and type as one word and the cookie as bytes."""
_DATA_MORE: Final = nbd.NBD_STRUCTURED_REPLY_MAGIC << 32 | nbd.NBD_REPLY_TYPE_OFFSET_DATA
_DATA_DONE: Final = _DATA_MORE | nbd.NBD_REPLY_FLAG_DONE << 16
assert _DATA.size == nbd.OFFSET_DATA_REPLY.size


class Replies:
    """The outgoing side of one connection. `fd` is the disk's descriptor for reads, or None.

    What is encrypted has to be copied: nothing travels by reference then.
    """

    def __init__(
        self,
        sock: socket.socket,
        lane: Lane,
        fd: int | None,
        notice: Notice,
        *,
        structured: bool,
        encrypted: bool = False,
    ) -> None:
        self.bytes_sent = 0
        self._sock = sock
        self._notice = notice
        self._send_at_once = None if encrypted else sock.send
        self._structured = structured
        self._header_size = _DATA.size if structured else nbd.SIMPLE_REPLY.size
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._used = 0
        self._fd = -1 if fd is None else fd
        self._read_into = lane.pread_into if fd is None else _reader(fd, lane.pread_into, notice)
        self._splice_from = _NEVER if fd is None or encrypted else SPLICE_FROM
        self._pipe: tuple[int, int] | None = None

    def close(self) -> None:
        for end in self._pipe or ():
            os.close(end)
        self._pipe = None

    def send(self) -> None:
        """Send all that was added. Waits for a client that does not read; nobody else waits with it."""
        used = self._used
        if used:
            self._send_all(self._view[:used])
            self.bytes_sent += used
            self._used = 0

    def _send_all(self, data: memoryview) -> None:
        sent = 0
        if self._send_at_once is not None:
            try:
                sent = self._send_at_once(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        if sent < len(data):
            self._notice.give()
            self._sock.sendall(data[sent:])

    def add(self, reply: bytes) -> None:
        if len(reply) > _BUFFER - self._used:
            self.send()
            if len(reply) > _BUFFER:
                self._send_past_buffer(reply)
                return
        self._view[self._used : self._used + len(reply)] = reply
        self._used += len(reply)

    def add_successes(self, cookies: list[bytes]) -> None:
        self.add(_SIMPLE_OK + _SIMPLE_OK.join(cookies))

    def add_reads(self, reads: list[Read]) -> None:
        """Do these READs, none of them empty, and answer each with its data or its error."""
        buffer, view, header_size, structured = self._buffer, self._view, self._header_size, self._structured
        read_into, splice_from = self._read_into, self._splice_from
        for cookie, offset, length in reads:
            if length >= splice_from:
                self._splice(cookie, offset, length)
                continue
            if header_size + length > _BUFFER - self._used:
                self.send()
                if header_size + length > _BUFFER:
                    self.add_whole_read(cookie, offset, length)
                    continue
            header = self._used
            data = header + header_size
            try:
                read_into(view[data : data + length], offset)
            except (OSError, LmdbitmapError) as failure:
                self._refuse(cookie, failure)
                continue
            if structured:
                _DATA.pack_into(buffer, header, _DATA_DONE, cookie, length + 8, offset)
            else:
                view[header:data] = _SIMPLE_OK + cookie
            self._used = data + length

    def add_whole_read(self, cookie: bytes, offset: int, length: int) -> None:
        """Do one READ through memory of its own, and answer it in one chunk."""
        self._notice.give()
        data = bytearray(length)
        try:
            self._read_into(memoryview(data), offset)
        except (OSError, LmdbitmapError) as failure:
            self._refuse(cookie, failure)
            return
        self.add(self._header(cookie, offset, length, done=True))
        self.send()
        self._send_past_buffer(data)

    def _send_past_buffer(self, data: bytes | bytearray) -> None:
        self._notice.give()
        self._sock.sendall(data)
        self.bytes_sent += len(data)

    def _header(self, cookie: bytes, offset: int, length: int, *, done: bool) -> bytes:
        if self._structured:
            return _DATA.pack(_DATA_DONE if done else _DATA_MORE, cookie, length + 8, offset)
        return _SIMPLE_OK + cookie

    def _refuse(self, cookie: bytes, failure: Exception) -> None:
        _log.warning("a read failed: %s", failure)
        error, number = error_of(failure), int.from_bytes(cookie, "big")
        if self._structured:
            self.add(nbd.structured_reply(number, nbd.NBD_REPLY_TYPE_ERROR, nbd.error_payload(error)))
        else:
            self.add(nbd.simple_reply(number, error))

    # -- by reference --------------------------------------------------------------------------------------

    def _splice(self, cookie: bytes, offset: int, length: int) -> None:
        """One READ through the pipe, a chunk for every filling; what cannot go this way is read and sent."""
        self._notice.give()
        self.send()
        start, stop = offset, offset + length
        while offset < stop and (count := self._fill_pipe(offset, stop - offset)):
            if self._structured or offset == start:
                header = self._header(cookie, offset, count, done=offset + count == stop)
                self._sock.sendall(header, socket.MSG_MORE)
                self.bytes_sent += len(header)
            self._empty_pipe(count)
            offset += count
        if offset == stop:
            return
        if offset > start and not self._structured:
            raise OSError(errno.EIO, "a read failed after its simple reply had begun")
        self.add_whole_read(cookie, offset, stop - offset)

    def _fill_pipe(self, offset: int, length: int) -> int:
        """How many bytes of the image are in the pipe now; 0 when they have to be read the other way."""
        try:
            if self._pipe is None:
                self._pipe = new_pipe()
            return os.splice(self._fd, self._pipe[1], length, offset_src=offset)
        except OSError as refused:
            if refused.errno == errno.EINVAL:  # not a kind of file that can
                self._splice_from = _NEVER
            return 0

    def _empty_pipe(self, length: int) -> None:
        assert self._pipe is not None
        while length:
            moved = os.splice(self._pipe[0], self._sock.fileno(), length)
            self.bytes_sent += moved
            length -= moved


def _reader(
    fd: int, otherwise: Callable[[memoryview, int], None], notice: Notice
) -> Callable[[memoryview, int], None]:
    """The shortest way to read: the system call for what is in memory, and the lane for what that leaves undone."""
    preadv, flags = os.preadv, _without_waiting(fd)

    def read_into(buffer: memoryview, offset: int) -> None:
        try:
            if preadv(fd, (buffer,), offset, flags) == len(buffer):
                return
        except BlockingIOError:
            pass
        notice.give()
        otherwise(buffer, offset)

    return read_into


def _without_waiting(fd: int) -> int:
    """The flag of a read that fails rather than wait for the disk, where this kind of file knows it."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return 0
    return os.RWF_NOWAIT
