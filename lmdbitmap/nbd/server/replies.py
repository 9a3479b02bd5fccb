"""The replies to one client, READ data included: the outgoing half of the hot loop.

Replies gather in a list and leave in one send of at most `_MOST_GATHERED` bytes plus one READ. Long READs are answered
in one of two ways, and a trial finds the faster one (trial.py). They are copied to memory that is used again, or they
travel by reference: from the page cache into a pipe, and from the pipe to the socket (splicing.py). The pipe is filled
before the header is sent, so that an error of the disk can still be reported. The client then receives the page as it
is on arrival: a write that overlaps a READ in flight may show in it, as the protocol allows. A disk that must not show
it (a point in time) has no `fd`.
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
from lmdbitmap.nbd.server.splicing import ReadPipe
from lmdbitmap.nbd.server.trial import Trial
from lmdbitmap.work.buffers import new_buffer

Read: TypeAlias = tuple[int, bytes, int, int]
"""A request's (magic, flags and type; cookie; offset; length)."""

_MOST_GATHERED: Final = 512 << 10
_MOST_PARTS: Final = 1000
"""The kernel takes 1024 at once."""
LONG_FROM: Final = 32 << 10
"""Bytes from which a READ is long, and answered by itself: below, a copy is cheaper than two more system calls."""
_MOST_JOINED: Final = 128 << 10
"""Copied READs up to this size leave with the replies before, and are copied again if the client receives slowly."""
MOST_KEPT: Final = 1 << 20
"""Bytes of memory for copied READs, kept for as long as the connection lasts. Longer READs travel by reference."""


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
        self._pipe = None if fd is None or encrypted else ReadPipe(fd, sock)
        """None if nothing can travel by reference."""
        self._by_reference = Trial()
        self._large = memoryview(b"")

    def close(self) -> None:
        self.hurry(False)
        self._close_pipe()

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
        form = self._form
        structured, extended = form is STRUCTURED, form is EXTENDED
        pack = EXTENDED_DATA.pack if extended else DATA.pack
        gathered, header_size = self._gathered, form.data_size
        for _, cookie, offset, length in reads:
            if length >= LONG_FROM:
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
        if self._pipe is not None and (self._by_reference.prefers_first or length > MOST_KEPT):
            self._send_by_reference(self._pipe, label, offset, length)
        else:
            self.add_whole_read(label, offset, length)
        self._by_reference.count(length)

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
        if self._in_haste and len(data) <= MOST_KEPT and self._fill_at_once(data, offset):
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
        if length > MOST_KEPT:
            return memoryview(new_buffer(length))
        if length > len(self._large):
            self._large = memoryview(new_buffer(MOST_KEPT))
        return self._large[:length]

    def _refuse(self, label: bytes, offset: int, length: int, failure: Exception) -> None:
        self._complaints.failed("READ", place(offset, length), failure)
        self.add(self._form.outcome(nbd.NBD_CMD_READ, label, error_of(failure)))

    # -- by reference --------------------------------------------------------------------------------------

    def _send_by_reference(self, pipe: ReadPipe, label: bytes, offset: int, length: int) -> None:
        """Do one READ through the pipe, a chunk for every filling; read and send what cannot go this way."""
        self._notice.give()
        self.send()
        start, stop = offset, offset + length
        while offset < stop and (count := pipe.fill(offset, stop - offset)):
            if count < length <= MOST_KEPT and not self._form.in_chunks:
                pipe.close()  # the rest may fail, and behind a simple reply's data no error can be told
                break
            if self._form.in_chunks or offset == start:
                header = self._form.data(label, offset, count, done=offset + count == stop)
                self._sock.sendall(header, socket.MSG_MORE)
                self.bytes_sent += len(header)
            pipe.empty(count)
            self.bytes_sent += count
            offset += count
        if not pipe.fits:
            self._close_pipe()
        if offset == stop:
            return
        if offset > start and not self._form.in_chunks:
            failure = OSError(errno.EIO, "it failed after its simple reply had begun")
            self._complaints.failed("READ", place(offset, stop - offset), failure)
            raise failure
        self.add_whole_read(label, offset, stop - offset)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


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
