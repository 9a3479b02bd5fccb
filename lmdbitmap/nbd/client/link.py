"""One connection to a far NBD server: sends requests, and puts answers together.

Any thread may `post`; one thread at a time may `receive`. A thread that posts while another one is sending leaves its
requests to that thread, so requests of many threads leave in one system call. The thread that is to receive must never
wait to send: a server that waits until we take its replies takes no requests meanwhile.

Answers are hostile input. A reply must belong to a request in flight. Its data must lie inside what was asked, cover
all of it and overlap nowhere. No memory is allocated merely because a server sent a number. Anything else is a
`FormatError`, after which the connection must not be used.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from lmdbitmap.interfaces import Buffer
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.handshake import FarExport, nonsense

WINDOW: Final = 256
"""Requests of one kind that may be sent without receiving: their answers fit into a socket's buffer."""
_PART_S: Final = 1.0
_BUFFER: Final = 64 << 10
MOST_EXTENTS: Final = 1 << 20
"""Extents that an answer to BLOCK_STATUS may have."""
_LONGEST: Final = (1 << 32) - (1 << 16)
"""Most bytes that a compact header can ask for, in whole blocks of any size."""
_MAX_ERROR: Final = 64 << 10
_FREE_PIECES: Final = 1024
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_HOLE: Final = struct.Struct(">QI")
AWAY: Final = -1
"""Stands for the server's error: the server was away for too long."""
SILENT: Final = -2
"""Stands for the server's error: a connected server sent nothing for too long."""


class Call:
    """Requests that at most one thread waits for together; `turn` is released when that thread has to look again."""

    __slots__ = ("left", "listens", "turn")

    def __init__(self, left: int) -> None:
        self.left = left
        """Requests not answered yet."""
        self.listens = False
        """Whether its thread has finished sending; only then may it receive for all."""
        self.turn = threading.Lock()
        self.turn.acquire()


class Request:
    """A request and the state of its answer. `error` is the protocol's number, 0, `AWAY` or `SILENT`."""

    __slots__ = (
        "call", "command", "cookie", "covered", "data", "descriptor", "error", "flags", "into", "length", "link",
        "mark", "most_extents", "offset", "pieces", "since", "statuses",
    )  # fmt: skip

    def __init__(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: Buffer = b"",
        into: memoryview | None = None,
        most_extents: int = MOST_EXTENTS,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.data = data
        self.into = into
        self.most_extents = most_extents
        """The rest of a longer answer is dropped, as if the server had said no more."""
        self.cookie = 0
        self.error = 0
        self.statuses: bytes | None = None
        """Descriptors of BLOCK_STATUS, in the layout `descriptor`: at least one, none of them empty."""
        self.descriptor = nbd.BLOCK_DESCRIPTOR
        self.call: Call | None = None
        self.link: Link | None = None
        """The connection it is for; None while there is none."""
        self.mark = 0
        self.since = 0.0
        self.covered = 0
        self.pieces: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Forget parts of an earlier answer, because the request is sent, perhaps again."""
        self.error, self.covered, self.statuses = 0, 0, None
        self.pieces.clear()

    def header(self, *, extended: bool) -> bytes:
        """The header. With 32-bit lengths a longer BLOCK_STATUS asks for less, as its length is only a wish.

        No other request is ever longer.
        """
        if extended:
            flags = self.flags | (nbd.NBD_CMD_FLAG_PAYLOAD_LEN if self.command == nbd.NBD_CMD_WRITE else 0)
            fields = (flags, self.command, self.cookie, self.offset, self.length)
            return nbd.EXTENDED_REQUEST.pack(nbd.NBD_EXTENDED_REQUEST_MAGIC, *fields)
        length = min(self.length, _LONGEST)
        return nbd.REQUEST.pack(
            nbd.NBD_REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, length
        )

    def extents(self) -> Iterable[tuple[int, int]]:
        """(bytes, flags) of the answer to a BLOCK_STATUS; empty if it failed."""
        return () if self.error or self.statuses is None else self.descriptor.iter_unpack(self.statuses)


class Wire(Protocol):
    """The methods of its socket that a connection uses: a plain one, or that of tls.py."""

    def settimeout(self, value: float | None, /) -> None: ...
    def sendmsg(self, buffers: Sequence[Buffer], /) -> int: ...
    def sendall(self, data: Buffer, /) -> None: ...
    def recv_into(self, buffer: memoryview, /) -> int: ...
    def recv(self, bufsize: int, /) -> bytes: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class Link:
    """A connection in its transmission phase. Make one with `dial` (dial.py)."""

    def __init__(self, sock: Wire, export: FarExport) -> None:
        self.export = export
        self._status_kind = (
            nbd.NBD_REPLY_TYPE_BLOCK_STATUS_EXT if export.extended else nbd.NBD_REPLY_TYPE_BLOCK_STATUS
        )
        self._sock = sock
        self._outbox: deque[Request] = deque()
        self._sending = threading.RLock()
        """Its owner is known, so that a sender that is interrupted, wherever it is, gives up what it has."""
        self._closed = False
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    # -- requests out --------------------------------------------------------------------------------------

    def post(self, requests: Sequence[Request]) -> None:
        """Have the requests sent. If the connection breaks meanwhile, the receiving thread will notice."""
        self._outbox.extend(requests)
        try:
            while self._outbox and self._sending.acquire(blocking=False):
                self._send_some()
                self._sending.release()
        except BaseException:  # half a request may be sent: nothing can follow it
            self.hang_up()
            with contextlib.suppress(RuntimeError):  # interrupted while it was not this thread's
                self._sending.release()
            raise

    def _send_some(self) -> None:
        try:
            requests = self._taken()
            if not self._closed:
                self._send(requests)
        except OSError:
            self.hang_up()

    def _taken(self) -> list[Request]:
        taken: list[Request] = []
        with contextlib.suppress(IndexError):
            while len(taken) < WINDOW:
                taken.append(self._outbox.popleft())
        return taken

    def _send(self, requests: list[Request]) -> None:
        parts: list[Buffer] = []
        for request in requests:
            request.begin()
            parts.append(request.header(extended=self.export.extended))
            if request.command == nbd.NBD_CMD_WRITE:
                parts.append(request.data)
        left = sum(map(len, parts)) - self._sock.sendmsg(parts)
        if left:
            self._sock.sendall(b"".join(_tail(parts, left)))

    # -- answers in ----------------------------------------------------------------------------------------

    def receive(self, waiting: Mapping[int, Request]) -> Request | None:
        """Receive one message; return the request whose answer it completes, or None.

        Raises `FormatError` for what no server may send, `OSError` when the connection breaks.
        """
        if self.export.extended:
            return self._receive_extended(waiting)
        self._await(nbd.SIMPLE_REPLY.size)
        (magic,) = _U32.unpack_from(self._buffer, self._start)
        if magic == nbd.NBD_SIMPLE_REPLY_MAGIC:
            _, error, cookie = nbd.SIMPLE_REPLY.unpack(self._take(nbd.SIMPLE_REPLY.size))
            return self._simple(self._sent(waiting, cookie), error)
        if magic != nbd.NBD_STRUCTURED_REPLY_MAGIC or not self.export.structured:
            raise nonsense("reply", "a magic of those agreed on", f"{magic:#x}")
        _, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack(self._take(nbd.STRUCTURED_REPLY.size))
        return self._chunk(self._sent(waiting, cookie), kind, length, flags)

    def _receive_extended(self, waiting: Mapping[int, Request]) -> Request | None:
        header = self._take(nbd.EXTENDED_REPLY.size)
        magic, flags, kind, cookie, offset, length = nbd.EXTENDED_REPLY.unpack(header)
        if magic != nbd.NBD_EXTENDED_REPLY_MAGIC:
            raise nonsense("reply", f"magic {nbd.NBD_EXTENDED_REPLY_MAGIC:#x}", f"{magic:#x}")
        request = self._sent(waiting, cookie)
        if offset != request.offset:
            raise nonsense("reply", f"the request's offset {request.offset}", offset)
        return self._chunk(request, kind, length, flags)

    def _chunk(self, request: Request, kind: int, length: int, flags: int) -> Request | None:
        """Receive a chunk's payload; return the request if the chunk completes it."""
        is_last = bool(flags & nbd.NBD_REPLY_FLAG_DONE)
        self._payload(request, kind, length, is_last)
        return _whole(request) if is_last else None

    def _sent(self, waiting: Mapping[int, Request], cookie: int) -> Request:
        request = waiting.get(cookie)
        if request is None or request.link is not self:
            raise nonsense("reply", "the cookie of a request in flight", f"{cookie:#x}")
        return request

    def _simple(self, request: Request, error: int) -> Request:
        request.error = request.error or error
        if error:
            return request
        if request.command == nbd.NBD_CMD_BLOCK_STATUS or (
            request.command == nbd.NBD_CMD_READ and self.export.structured
        ):
            raise nonsense("reply", "a structured one", "a simple one")
        if request.into is not None:
            self._receive_into(request.into)
        return request

    def _payload(self, request: Request, kind: int, length: int, is_last: bool) -> None:
        if kind == nbd.NBD_REPLY_TYPE_NONE and length == 0 and is_last:
            return
        if kind == nbd.NBD_REPLY_TYPE_OFFSET_DATA and 0 < length - _U64.size <= _room(request):
            (offset,) = _U64.unpack(self._take(_U64.size))
            self._receive_into(_part(request, offset, length - _U64.size))
        elif kind == nbd.NBD_REPLY_TYPE_OFFSET_HOLE and length == _HOLE.size and _room(request):
            offset, hole = _HOLE.unpack(self._take(_HOLE.size))
            part = _part(request, offset, hole)  # checked before memory for the zeroes is allocated
            part[:] = bytes(len(part))
        elif kind == self._status_kind and request.command == nbd.NBD_CMD_BLOCK_STATUS:
            self._status_chunk(request, length)
        elif kind & 1 << 15 and nbd.ERROR_PAYLOAD.size <= length <= _MAX_ERROR:
            error, said = nbd.ERROR_PAYLOAD.unpack_from(self._take(length))
            if error == 0 or said > length - nbd.ERROR_PAYLOAD.size:
                raise nonsense(
                    "error chunk", "an error and its message", f"{error}, {said} of {length} bytes"
                )
            request.error = request.error or error
        else:
            raise nonsense(
                "chunk", f"one that answers command {request.command}", f"type {kind}, {length} bytes"
            )

    def _status_chunk(self, request: Request, length: int) -> None:
        """u32 context id, with extended headers the u32 number of descriptors, and the descriptors."""
        extended = self.export.extended
        head, one = (
            (nbd.BLOCK_STATUS_EXT, nbd.BLOCK_DESCRIPTOR_EXT) if extended else (_U32, nbd.BLOCK_DESCRIPTOR)
        )
        count, rest = divmod(length - head.size, one.size)
        if request.statuses is not None or not 1 <= count <= MOST_EXTENTS or rest:
            raise nonsense("block status", "one list of descriptors", f"{length} bytes")
        payload = self._take(length)
        context_id, *counted = head.unpack_from(payload)
        if context_id != self.export.context_id or counted not in ([], [count]):
            expected = f"{count} descriptors of context {self.export.context_id}"
            raise nonsense("block status", expected, f"{counted} of {context_id}")
        statuses = payload[head.size :]
        if any(extent == 0 for extent, _ in one.iter_unpack(statuses)):
            raise nonsense("block status", "extents with a length", "an empty one")
        request.statuses, request.descriptor = statuses[: request.most_extents * one.size], one

    def _await(self, count: int) -> None:
        """Have `count` bytes, which must fit into the buffer, at `_start`."""
        if self._start + count > _BUFFER:
            at_hand = self._end - self._start
            self._view[:at_hand] = self._view[self._start : self._end]
            self._start, self._end = 0, at_hand
        while self._end - self._start < count:
            self._end += some(self._sock, self._view[self._end :])

    def _take(self, count: int) -> bytes:
        if count > _BUFFER:
            data = bytearray(count)
            self._receive_into(memoryview(data))
            return bytes(data)
        self._await(count)
        taken = bytes(self._view[self._start : self._start + count])
        self._start += count
        if self._start == self._end:
            self._start = self._end = 0
        return taken

    def _receive_into(self, target: memoryview) -> None:
        at_hand = min(self._end - self._start, len(target))
        target[:at_hand] = self._view[self._start : self._start + at_hand]
        self._start += at_hand
        while at_hand < len(target):
            at_hand += some(self._sock, target[at_hand:])

    # -- the end -------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Shut the connection down, so that sending and receiving threads notice its end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def part(self) -> None:
        """Close it. If the server still listens, wait a moment for it to finish what it was doing."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(_PART_S)
            self._sock.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + _PART_S
            while time.monotonic() < deadline and self._sock.recv(_BUFFER):
                pass
        with self._sending:  # a sender has noticed by now; no thread may use the number of a closed file
            self._closed = True
            self._sock.close()

    def forsake(self) -> None:
        """Close it in a forked child; it goes on in the parent."""
        self._sock.close()

    def say_goodbye(self) -> None:
        """Close it in the protocol's way; nothing may be in flight."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(_PART_S)
            self._sock.sendall(Request(nbd.NBD_CMD_DISC).header(extended=self.export.extended))
        self.part()


def _room(request: Request) -> int:
    """Bytes that an answer to the request may bring."""
    return 0 if request.into is None else len(request.into)


def _part(request: Request, offset: int, length: int) -> memoryview:
    """Return the part of a READ's buffer that a chunk is about, and record it as covered."""
    start = offset - request.offset
    if not 0 <= start < start + length <= request.length or request.into is None:
        raise nonsense(
            "READ chunk", f"bytes of {request.length} at {request.offset}", f"{length} at {offset}"
        )
    if start == request.covered:
        request.covered += length
    elif len(request.pieces) < _FREE_PIECES + request.length // 512:
        request.pieces.append((start, start + length))
    else:
        raise nonsense("READ", "chunks of a reasonable size", f"more than {len(request.pieces)} of them")
    return request.into[start : start + length]


def _whole(request: Request) -> Request:
    """Return the request after its last chunk; raise unless it is answered in full, or by an error."""
    if request.error:
        return request
    if request.command == nbd.NBD_CMD_READ:
        for start, stop in sorted(request.pieces):
            if start != request.covered:
                raise nonsense("READ", f"the bytes at {request.covered} once", f"those at {start}")
            request.covered = stop
        if request.covered != request.length:
            raise nonsense("READ", f"{request.length} bytes", request.covered)
    elif request.command == nbd.NBD_CMD_BLOCK_STATUS and request.statuses is None:
        raise nonsense("block status", "descriptors", "none")
    return request


def _tail(parts: Sequence[Buffer], count: int) -> list[Buffer]:
    """The last `count` bytes of all parts together."""
    tail: list[Buffer] = []
    for part in reversed(parts):
        if count <= 0:
            break
        tail.append(memoryview(part)[-count:] if count < len(part) else part)
        count -= len(part)
    return tail[::-1]


def some(sock: Wire, target: memoryview) -> int:
    """Receive at least one byte; return how many."""
    count = sock.recv_into(target)
    if count == 0:
        raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
    return count
