"""The replies to one client, READ data included: the outgoing half of the hot loop.

Replies gather in a list and leave in one send of at most `_MOST_GATHERED` bytes plus one READ. Long READs travel by
reference: from the page cache into a pipe, and from the pipe to the socket. The pipe is filled before the header is
sent, so that an error of the disk can still be reported. The client then receives the page as it is on arrival: a write
that overlaps a READ in flight may show in it, as the protocol allows. A disk that must not show it (a point in time)
has no `fd`.

What counts as long depends on the socket. The client of a unix socket copies cold pages itself, alone, and one by one:
it gets its data half as fast again when our processor has copied it to warm memory before. So there only READs too long
for the memory that a connection keeps travel by reference.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable
from typing import Final, TypeAlias

from lmdbitmap.interfaces import Lane
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.complaints import Complaints
from lmdbitmap.nbd.server.forms import (
    DATA,
    DATA_DONE,
    EXTENDED,
    EXTENDED_DATA,
    EXTENDED_DATA_DONE,
    SIMPLE_OK,
    STRUCTURED,
    Form,
)
from lmdbitmap.nbd.server.notice import Notice
from lmdbitmap.nbd.server.requests import FAILURES, error_of, place
from lmdbitmap.nbd.server.splicing import new_pipe
from lmdbitmap.work.buffers import new_buffer

Read: TypeAlias = tuple[int, bytes, int, int]
"""A request's (magic, flags and type; cookie; offset; length)."""

_MOST_GATHERED: Final = 512 << 10
_MOST_PARTS: Final = 1000
"""The kernel takes 1024 at once."""
SPLICE_FROM: Final = 32 << 10
"""Bytes from which a READ travels by reference over TCP: below, copying is cheaper than two more system calls."""
_APART_FROM: Final = 32 << 10
"""Bytes from which a READ that does not is answered by itself, out of memory that is reused."""
_MOST_JOINED: Final = 128 << 10
"""READs up to this size leave with the replies before, and are copied once more if the client receives slowly."""
_MOST_KEPT: Final = 1 << 20
"""Bytes of that memory, kept for as long as the connection lasts."""
SPLICE_FROM_UNIX: Final = _MOST_KEPT + 1
_NEVER: Final = 1 << 62


class Replies:
    """The outgoing side of one connection. `fd` is the disk's descriptor for reads, or None.

    On an encrypted connection nothing travels by reference: the data has to be copied. A READ that leaves the common
    path is identified by its label (forms.py).
    """

    def __init__(
        self,
        sock: socket.socket,
        lane: Lane,
        fd: int | None,
        notice: Notice,
        complaints: Complaints,
        *,
        form: Form,
        encrypted: bool = False,
    ) -> None:
        self.bytes_sent = 0
        self._sock = sock
        self._notice = notice
        self._complaints = complaints
        self._encrypted = encrypted
        self._form = form
        self._gathered: list[bytes | bytearray | memoryview] = []
        self._gathered_bytes = 0
        self._fd = -1 if fd is None else fd
        self._pread_into = lane.pread_into
        self._pread_patiently = _by_lane(lane.pread_into) if fd is None else functools.partial(os.pread, fd)
        self._knows_haste = _knows_haste(fd)
        self._pread = self._pread_patiently
        self._in_haste = False
        self._splice_from = SPLICE_FROM_UNIX if sock.family == socket.AF_UNIX else SPLICE_FROM
        if fd is None or encrypted:
            self._splice_from = _NEVER
        self._apart_from = min(_APART_FROM, self._splice_from)
        self._pipe: tuple[int, int] | None = None
        self._large = memoryview(b"")

    @property
    def waiting(self) -> int:
        """Parts of replies that are not sent yet; an answer without data is one part."""
        return len(self._gathered)

    def close(self) -> None:
        self.hurry(False)
        for end in self._pipe or ():
            os.close(end)
        self._pipe = None

    def hurry(self, haste: bool) -> None:
        """With `haste`, give notice only before a READ waits for the disk; without it, notice does not matter."""
        self._in_haste = haste and self._knows_haste
        self._pread = self._pread_at_once if self._in_haste else self._pread_patiently

    def send(self) -> None:
        """Send all replies added. Waits for a client that does not read; no other client waits with it."""
        gathered = self._gathered
        if gathered:
            if len(gathered) == 1 or self._encrypted:
                self._send_all(b"".join(gathered))
            else:
                self._send_parts(gathered)
            gathered.clear()
            self._gathered_bytes = 0

    def _send_parts(self, parts: list[bytes | bytearray | memoryview]) -> None:
        """Send without joining, unless the rest has to wait: joining costs as much as reading the data."""
        try:
            sent = self._sock.sendmsg(parts, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        self.bytes_sent += sent
        if sent < self._gathered_bytes:
            self._send_rest(memoryview(b"".join(parts))[sent:])

    def _send_all(self, data: bytes | bytearray | memoryview) -> None:
        sent = 0
        if not self._encrypted:
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        self.bytes_sent += sent
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:])

    def _send_rest(self, data: memoryview) -> None:
        self._notice.give()
        self._sock.sendall(data)
        self.bytes_sent += len(data)

    def add(self, reply: bytes) -> None:
        self._gathered.append(reply)
        self._gathered_bytes += len(reply)
        if self._gathered_bytes > _MOST_GATHERED or len(self._gathered) >= _MOST_PARTS:
            self.send()

    def add_reads(self, reads: list[Read]) -> None:
        """Do these READs, none of them empty, and answer each with its data or its error."""
        form, apart_from = self._form, self._apart_from
        structured, extended = form is STRUCTURED, form is EXTENDED
        pack = EXTENDED_DATA.pack if extended else DATA.pack
        gathered, header_size = self._gathered, form.data_size
        for _, cookie, offset, length in reads:
            if length >= apart_from:
                self._add_long_read(form.label(cookie, offset), offset, length)
                continue
            try:
                data = self._pread(length, offset)
            except FAILURES as failure:
                self._refuse(form.label(cookie, offset), offset, length, failure)
                continue
            if len(data) != length:
                self.add_whole_read(form.label(cookie, offset), offset, length)
                continue
            gathered.append(
                pack(DATA_DONE, cookie, length + 8, offset)
                if structured
                else pack(EXTENDED_DATA_DONE, cookie, offset, length + 8, offset)
                if extended
                else SIMPLE_OK + cookie
            )
            gathered.append(data)
            self._gathered_bytes += header_size + length
            if self._gathered_bytes > _MOST_GATHERED or len(gathered) >= _MOST_PARTS:
                self.send()

    def _pread_at_once(self, length: int, offset: int) -> bytes | bytearray:
        data = bytearray(length)
        with contextlib.suppress(BlockingIOError):
            if os.preadv(self._fd, (data,), offset, os.RWF_NOWAIT) == length:
                return data
        self._notice.give()
        self.hurry(False)
        return self._pread(length, offset)

    def _add_long_read(self, label: bytes, offset: int, length: int) -> None:
        if length >= self._splice_from:
            self._splice(label, offset, length)
        else:
            self.add_whole_read(label, offset, length)

    def add_whole_read(self, label: bytes, offset: int, length: int) -> None:
        """Do one READ through memory of its own, and answer it in one chunk."""
        try:
            data = self._room_for(length)
            self._fill(data, offset)
        except FAILURES as failure:
            self._refuse(label, offset, length, failure)
            return
        self.add(self._form.data(label, offset, length, done=True))
        if length > _MOST_JOINED:
            self.send()
            self._send_all(data)
        else:
            self._gathered.append(data)
            self._gathered_bytes += length
            self.send()

    def _fill(self, data: memoryview, offset: int) -> None:
        if self._in_haste and len(data) <= _MOST_KEPT and self._fill_at_once(data, offset):
            return
        if self._knows_haste or len(data) > _MOST_JOINED:
            self._notice.give()
        if self._fd < 0 or os.preadv(self._fd, [data], offset) < len(data):
            self._pread_into(data, offset)  # on a short read the lane raises the reason

    def _fill_at_once(self, data: memoryview, offset: int) -> bool:
        """Return whether the data was in memory: copying so much is no reason to leave the rounds."""
        try:
            return os.preadv(self._fd, [data], offset, os.RWF_NOWAIT) == len(data)
        except BlockingIOError:
            return False

    def _room_for(self, length: int) -> memoryview:
        """Return the same memory each time if it is large enough: Python clears new memory with its lock held."""
        if length > _MOST_KEPT:
            return memoryview(new_buffer(length))
        if length > len(self._large):
            self._large = memoryview(new_buffer(_MOST_KEPT))
        return self._large[:length]

    def _refuse(self, label: bytes, offset: int, length: int, failure: Exception) -> None:
        self._complaints.failed("READ", place(offset, length), failure)
        self.add(self._form.outcome(nbd.NBD_CMD_READ, label, error_of(failure)))

    # -- by reference --------------------------------------------------------------------------------------

    def _splice(self, label: bytes, offset: int, length: int) -> None:
        """Do one READ through the pipe, a chunk for every filling; read and send what cannot go this way."""
        self._notice.give()
        self.send()
        start, stop = offset, offset + length
        while offset < stop and (count := self._fill_pipe(offset, stop - offset)):
            if self._form.in_chunks or offset == start:
                header = self._form.data(label, offset, count, done=offset + count == stop)
                self._sock.sendall(header, socket.MSG_MORE)
                self.bytes_sent += len(header)
            self._empty_pipe(count)
            offset += count
        if offset == stop:
            return
        if offset > start and not self._form.in_chunks:
            failure = OSError(errno.EIO, "it failed after its simple reply had begun")
            self._complaints.failed("READ", place(offset, stop - offset), failure)
            raise failure
        self.add_whole_read(label, offset, stop - offset)

    def _fill_pipe(self, offset: int, length: int) -> int:
        """Fill the pipe; return the number of image bytes in it, or 0 if they have to be read the other way."""
        try:
            if self._pipe is None:
                self._pipe = new_pipe()
            return os.splice(self._fd, self._pipe[1], length, offset_src=offset)
        except OSError as refused:
            # this kind of file cannot be spliced, or this user has no pipe left
            if refused.errno in (errno.EINVAL, errno.EPERM):
                self._splice_from, self._apart_from = _NEVER, _APART_FROM
            return 0

    def _empty_pipe(self, length: int) -> None:
        assert self._pipe is not None
        while length:
            moved = os.splice(self._pipe[0], self._sock.fileno(), length)
            self.bytes_sent += moved
            length -= moved


def _by_lane(pread_into: Callable[[memoryview, int], None]) -> Callable[[int, int], bytes | bytearray]:
    """Reads for a disk without a descriptor."""

    def pread(length: int, offset: int) -> bytearray:
        data = bytearray(length)
        pread_into(memoryview(data), offset)
        return data

    return pread


def _knows_haste(fd: int | None) -> bool:
    """Whether a read of this file can fail instead of waiting for the disk."""
    try:
        return fd is not None and os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT) >= 0
    except OSError as refused:
        return isinstance(refused, BlockingIOError)
