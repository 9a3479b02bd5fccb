"""A model of another NBD server, which knows what of its disk is durable, and answers as the input says.

Each request has a fate: an honest answer, an error, chunks in pieces and in any order, a lie, junk, or the end of the
connection, with which all that was not flushed may be lost. Behind the end of the input it is honest.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from lmdbitmap.interfaces import Buffer
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.handshake import FarExport
from lmdbitmap.nbd.client.link import Link
from tests.fuzz.inputs import Input

SIZE = 16 << 10
STRUCTURED, EXTENDED, WRITES_THROUGH, STATUSES = (1 << bit for bit in range(4))
MOST_DIALS = 40
LONG = 5000
"""Bytes of which only half are taken at once."""
_CONTEXT = 7
_FLAGS = (
    nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FUA | nbd.NBD_FLAG_SEND_TRIM | nbd.NBD_FLAG_SEND_WRITE_ZEROES
    | nbd.NBD_FLAG_SEND_FAST_ZERO
)  # fmt: skip
_CHANGING = (nbd.NBD_CMD_WRITE, nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_TRIM)
_NUMBERS = (nbd.NBD_EPERM, nbd.NBD_EIO, nbd.NBD_ENOMEM, nbd.NBD_EINVAL, nbd.NBD_ENOSPC, nbd.NBD_EOVERFLOW,
            nbd.NBD_ENOTSUP, nbd.NBD_ESHUTDOWN, 7, 2**32 - 1)  # fmt: skip
HONEST, ERROR, DONE_AND_ERROR, JUNK, END, LIE = range(6)
FATES = (*[HONEST] * 24, ERROR, DONE_AND_ERROR, JUNK, END, LIE, LIE, LIE, LIE)
COOKIE, LENGTH, LAST, KIND, OFFSET, SIMPLE, ID = range(7)
"""What a lie is about. All can be found out: no client can tell that the data it gets is not the disk's."""
_OF_NOBODY = 1 << 60
"""Makes a cookie one that no request has."""
_FIRST_OTHER_KIND = 3
"""Kinds below it are of chunks that a READ is answered with."""


class Asked(NamedTuple):
    """A request as it arrived."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    data: bytes


class FarServer:
    """An export, and the fates of requests to it."""

    def __init__(self, source: Input, mode: int, sizes: int) -> None:
        self.source = source
        self.extended = bool(mode & EXTENDED)
        self.structured = bool(mode & (STRUCTURED | EXTENDED))
        self.minimum = (1, 1, 512, 4096)[sizes % 4]
        self.maximum = (4096, 8192, 65536, 32 << 20)[sizes // 4 % 4]
        self.flags = _FLAGS | (0 if mode & WRITES_THROUGH else nbd.NBD_FLAG_SEND_FLUSH)
        self.context_id = _CONTEXT if self.structured and mode & STATUSES else None
        self.durable = bytearray(range(256)) * (SIZE // 256)
        self.written = bytearray(self.durable)
        self.is_honest = False
        self._dials = 0

    def connect(self) -> Link:
        self._dials += 1
        self.is_honest = self.is_honest or self._dials > MOST_DIALS
        if self._dials > 1 and self.chance(16):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")
        export = FarExport(
            SIZE, self.flags, self.minimum, self.maximum, self.structured, self.context_id,
            extended=self.extended,
        )  # fmt: skip
        return Link(Line(self), export)

    def chance(self, of: int) -> bool:
        return not self.is_honest and self.source.byte() % of == 1

    def do(self, asked: Asked) -> None:
        stop = asked.offset + asked.length
        if asked.command in _CHANGING:
            self.written[asked.offset : stop] = asked.data or bytes(asked.length)
            if asked.flags & nbd.NBD_CMD_FLAG_FUA:
                self.durable[asked.offset : stop] = self.written[asked.offset : stop]
        elif asked.command == nbd.NBD_CMD_FLUSH:
            self.durable[:] = self.written

    def take(self, stream: bytearray) -> Asked | None:
        """Take a whole request off the stream; a well-behaved client is all that this server believes in."""
        layout = nbd.EXTENDED_REQUEST if self.extended else nbd.REQUEST
        if len(stream) < layout.size:
            return None
        magic, flags, command, cookie, offset, length = layout.unpack_from(stream)
        assert magic == (nbd.NBD_EXTENDED_REQUEST_MAGIC if self.extended else nbd.NBD_REQUEST_MAGIC)
        whole = layout.size + (length if command == nbd.NBD_CMD_WRITE else 0)
        if len(stream) < whole:
            return None
        data = bytes(stream[layout.size : whole])
        del stream[:whole]
        assert offset + length <= SIZE
        if command != nbd.NBD_CMD_BLOCK_STATUS:  # a lie about statuses leads to questions within a block
            assert offset % self.minimum == length % self.minimum == 0
        assert command not in (nbd.NBD_CMD_READ, nbd.NBD_CMD_WRITE) or 0 < length <= self.maximum
        return Asked(flags, command, cookie, offset, length, data)


class Line:
    """The server's end of a connection, as the half of a socket that the client uses."""

    def __init__(self, server: FarServer) -> None:
        self._server = server
        self._source = server.source
        self._arrived, self._answers = bytearray(), bytearray()
        self._waiting: list[Asked] = []
        self._is_cut = False

    # -- what the client calls -----------------------------------------------------------------------------

    def settimeout(self, value: float | None, /) -> None:
        pass

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """Takes half of what is long, as a full socket would."""
        data = b"".join(buffers)
        count = len(data) if len(data) < LONG else len(data) // 2
        self.sendall(data[:count])
        return count

    def sendall(self, data: Buffer, /) -> None:
        if self._is_cut:
            raise BrokenPipeError(errno.EPIPE, "cut")
        self._arrived += data
        while (asked := self._server.take(self._arrived)) is not None:
            if asked.command != nbd.NBD_CMD_DISC:
                self._waiting.append(asked)

    def recv_into(self, buffer: memoryview, /) -> int:
        assert len(buffer) > 0
        if self._waiting and not self._answers:
            self._decide()
        if self._is_cut:
            return 0
        count = min(len(buffer), len(self._answers))
        if count > 1 and self._server.chance(8):
            count = 1 + self._source.byte() % (count - 1)
        buffer[:count] = self._answers[:count]
        del self._answers[:count]
        return count

    def recv(self, bufsize: int, /) -> bytes:
        return b""

    def shutdown(self, how: int, /) -> None:
        """Requests that wait may be done or not; what was not flushed may be lost."""
        if not self._is_cut and not self._server.is_honest:
            for asked in self._waiting:
                if self._server.chance(2):
                    self._server.do(asked)
            if self._server.chance(2):
                self._server.written[:] = self._server.durable
        self._is_cut = True

    def close(self) -> None:
        self.shutdown(0)

    # -- answers -------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Answer one of those that wait; what is left out of the input is honest."""
        fate = HONEST if self._server.is_honest else self._source.pick(FATES)
        if fate == END:
            self.shutdown(0)
            return
        if fate == JUNK:
            self._answers += b"?" + self._source.take(self._source.byte())  # no message begins so
            return
        asked = self._waiting.pop(0 if fate == HONEST else self._source.byte() % len(self._waiting))
        if fate != ERROR:
            self._server.do(asked)
        if fate in (ERROR, DONE_AND_ERROR):
            self._fail(asked)
        else:
            self._answer(asked, self._source.byte() % 7 if fate == LIE else None)

    def _fail(self, asked: Asked) -> None:
        error = self._source.pick(_NUMBERS)
        if self._server.extended or (self._server.structured and self._source.byte() % 2):
            self._chunk(asked, nbd.NBD_REPLY_TYPE_ERROR, nbd.error_payload(error, "no"))
        else:
            self._answers += nbd.simple_reply(asked.cookie, error)

    def _answer(self, asked: Asked, lie: int | None) -> None:
        if asked.command == nbd.NBD_CMD_READ:
            self._answer_read(asked, lie)
        elif asked.command == nbd.NBD_CMD_BLOCK_STATUS:
            self._answer_status(asked, lie)
        elif self._server.extended or (self._server.structured and lie != SIMPLE):
            self._chunk(asked, nbd.NBD_REPLY_TYPE_NONE, b"", lie=lie)
        else:
            self._answers += nbd.simple_reply(_cookie(asked, lie))

    def _answer_read(self, asked: Asked, lie: int | None) -> None:
        content = self._server.written[asked.offset : asked.offset + asked.length]
        if not self._server.structured or lie == SIMPLE:
            self._answers += nbd.simple_reply(_cookie(asked, lie)) + content
            return
        is_whole = lie == LENGTH or not self._server.chance(2)
        pieces = [(0, asked.length)] if is_whole else self._pieces(asked.length)
        for number, (start, stop) in enumerate(pieces, 1):
            piece, is_last = bytes(content[start:stop]), number == len(pieces)
            if piece and not any(piece):
                hole = struct.pack(">QI", asked.offset + start, len(piece))
                self._chunk(asked, nbd.NBD_REPLY_TYPE_OFFSET_HOLE, hole, done=is_last, lie=lie)
            else:
                found = struct.pack(">Q", asked.offset + start) + piece
                self._chunk(asked, nbd.NBD_REPLY_TYPE_OFFSET_DATA, found, done=is_last, lie=lie)

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        """Pieces of the whole, one of which may be missing, or come twice."""
        cuts = {0, length, *(self._source.number(2) % (length + 1) for _ in range(self._source.byte() % 5))}
        pieces = list(zip(sorted(cuts), sorted(cuts)[1:]))  # noqa: B905  # each with the next
        if self._source.byte() % 2:
            pieces.reverse()
        if self._server.chance(8):
            pieces.append(self._source.pick(pieces))
        if self._server.chance(8) and len(pieces) > 1:
            pieces.remove(self._source.pick(pieces))
        return pieces

    def _answer_status(self, asked: Asked, lie: int | None) -> None:
        wide = self._server.extended
        extents = [(asked.length, 0)]
        if not self._server.is_honest:
            extents = [
                (self._source.number(2) or self._source.number(8 if wide else 4), self._source.byte() % 4)
                for _ in range(self._source.byte() % 6)
            ] or extents
        context_id = self._source.byte() if lie == ID else _CONTEXT
        if wide:
            payload = nbd.block_status_ext_payload(context_id, extents)
            self._chunk(asked, nbd.NBD_REPLY_TYPE_BLOCK_STATUS_EXT, payload, lie=lie)
        else:
            payload = nbd.block_status_payload(context_id, extents)
            self._chunk(asked, nbd.NBD_REPLY_TYPE_BLOCK_STATUS, payload, lie=lie)

    def _chunk(
        self, asked: Asked, kind: int, payload: bytes, *, done: bool = True, lie: int | None = None
    ) -> None:
        cookie, offset, length, flags = _cookie(asked, lie), asked.offset, len(payload), int(done)
        if lie == LENGTH:
            length = self._source.number(4)
        elif lie == LAST:
            flags = self._source.number(2)
        elif lie == KIND:
            kind = _FIRST_OTHER_KIND + self._source.number(2) % 0xFFF0
        elif lie == OFFSET:
            offset = self._source.number(2)
        if self._server.extended:
            fields = (nbd.NBD_EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
            self._answers += nbd.EXTENDED_REPLY.pack(*fields) + payload
        else:
            header = (nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)
            self._answers += nbd.STRUCTURED_REPLY.pack(*header) + payload


def _cookie(asked: Asked, lie: int | None) -> int:
    return asked.cookie | (_OF_NOBODY if lie == COOKIE else 0)
