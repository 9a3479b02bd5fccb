"""An NBD client for tests that says exactly what it is told to, lies included, and checks what it hears.

Written from the specification's tables with `struct` alone, so that a slip in `nbd/protocol.py` shows here.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from tests.helpers.support import PATIENCE_SECONDS

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
ClientType = TypeVar("ClientType", bound="RawClient")
GO, STRUCTURED_REPLY, SET_META_CONTEXT, EXTENDED_HEADERS = 7, 8, 10, 11


class Reply(NamedTuple):
    """All of one reply: its error or 0, READ's data in place, BLOCK_STATUS's descriptors by context id."""

    cookie: int
    error: int
    data: bytes = b""
    statuses: dict[int, list[tuple[int, int]]] = {}  # noqa: RUF012  # a default that nobody changes
    chunks: int = 0
    """Of a structured or extended reply; a simple one has none."""
    offset: int | None = None
    """Of an extended reply."""


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, data: bytes = b""
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data


def extended(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, data: bytes = b""
) -> bytes:
    """A request with extended headers; of a WRITE the flags say that its data follows."""
    flags |= PAYLOAD_LEN if command == WRITE else 0
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + data


def write(offset: int, data: bytes, *, cookie: int = 1, flags: int = 0) -> bytes:
    return request(WRITE, offset, len(data), cookie=cookie, flags=flags, data=data)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


class RawClient:
    """Wraps a connected socket. Whatever it waits for comes soon or fails the test."""

    def __init__(self, sock: socket.socket, *, structured: bool = True, extended: bool = False) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE_SECONDS)
        self.structured = structured
        self.extended = extended
        self._inbox = b""

    @classmethod
    def connect(cls, path: str) -> RawClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_SECONDS)
        try:
            sock.connect(path)
        except BaseException:
            sock.close()  # else the garbage collector warns of it, in the middle of any test
            raise
        return cls(sock)

    def __enter__(self: ClientType) -> ClientType:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly that many bytes; `EOFError` if the server closes before."""
        while len(self._inbox) < length:
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError
            self._inbox += data
        taken, self._inbox = self._inbox[:length], self._inbox[length:]
        return taken

    def peek_cookie(self) -> int:
        """Whose reply comes next: in all kinds of reply the cookie follows eight other bytes."""
        self._inbox = self.receive(16) + self._inbox
        return int.from_bytes(self._inbox[8:16], "big")

    def is_closed_by_server(self) -> bool:
        """Wait for the end of the connection; True if nothing more came before it."""
        try:
            return self._inbox == b"" and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def hears_the_end(self) -> bool:
        """Listen, whatever comes, until the server closes the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(1 << 20):
                pass
        return True

    # -- handshake -----------------------------------------------------------------------------------------

    def greet(self) -> None:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send(b"\0\0\0\3")

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; (type, data) of every reply up to the last."""
        self.send(option(number, data))
        answers: list[tuple[int, bytes]] = []
        while not answers or answers[-1][0] in (2, 3, 4):
            magic, answered, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, answered) == (0x3E889045565A9, number)
            answers.append((kind, self.receive(length)))
        return answers

    def go(
        self, name: str, *, structured: bool = True, extended: bool = False, contexts: Iterable[str] = ()
    ) -> dict[str, int]:
        """The whole handshake; the ids of the contexts that were selected."""
        self.greet()
        self.structured, self.extended = structured, extended
        ids = {}
        if structured:
            assert self.ask(EXTENDED_HEADERS if extended else STRUCTURED_REPLY) == [(1, b"")]
            queries = [string(context) for context in contexts]
            asked = string(name) + struct.pack(">I", len(queries)) + b"".join(queries)
            told = self.ask(SET_META_CONTEXT, asked)[:-1]
            ids = {data[4:].decode(): struct.unpack(">I", data[:4])[0] for _, data in told}
        assert self.ask(GO, string(name) + b"\0\0")[-1] == (1, b"")
        return ids

    # -- transmission --------------------------------------------------------------------------------------

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        cookie: int = 1,
        flags: int = 0,
        data: bytes = b"",
    ) -> bytes:
        """With the headers that were agreed on."""
        write_out = extended if self.extended else request
        return write_out(command, offset, length, cookie=cookie, flags=flags, data=data)

    def reply(self, read_length: int = 0, offset: int = 0) -> Reply:
        """The next reply, whole. For a READ say what was asked, so that its data can be put in place."""
        [magic] = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            assert not self.extended
            error, cookie = struct.unpack(">IQ", self.receive(12))
            carries_data = read_length and not self.structured and not error
            return Reply(cookie, error, self.receive(read_length) if carries_data else b"")
        assert self.structured
        assert magic == self._chunk_magic
        return self._chunks(bytearray(read_length), offset)

    @property
    def _chunk_magic(self) -> int:
        return 0x6E8A278C if self.extended else 0x668E33EF

    def do(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Reply:
        """One request, and its reply."""
        self.send(self.request(command, offset, length, cookie=0xC0FFEE, flags=flags, data=data))
        reply = self.reply(length if command == READ else 0, offset)
        assert (reply.cookie, reply.offset) == (0xC0FFEE, offset if self.extended else None)
        if command in (READ, BLOCK_STATUS):
            assert (reply.chunks > 0) == self.structured
        return reply

    def _chunks(self, data: bytearray, start: int) -> Reply:
        error, covered, chunks, asked = 0, 0, 0, set[int | None]()
        statuses: dict[int, list[tuple[int, int]]] = {}
        while True:
            flags, kind, cookie, place, length = self._chunk_header()
            payload = self.receive(length)
            asked.add(place)
            chunks += 1
            if kind == 1:
                [offset] = struct.unpack(">Q", payload[:8])
                assert 0 <= offset - start <= len(data) - (length - 8), "data outside the request"
                data[offset - start : offset - start + length - 8] = payload[8:]
                covered += length - 8
            elif kind == 6 and self.extended:
                context, count = struct.unpack(">II", payload[:8])
                assert context not in statuses
                statuses[context] = list(struct.iter_unpack(">QQ", payload[8:]))
                assert len(statuses[context]) == count
            elif kind == 5 and not self.extended:
                numbers = struct.unpack(f">{length // 4}I", payload)
                assert numbers[0] not in statuses
                statuses[numbers[0]] = list(zip(numbers[1::2], numbers[2::2], strict=True))
            elif kind == 0x8001:
                error, said = struct.unpack(">IH", payload[:6])
                assert error
                assert said == length - 6
            else:
                assert (kind, payload) == (0, b"")
            if flags == 1:
                break
            assert struct.unpack(">I", self.receive(4)) == (self._chunk_magic,)
        assert error or covered == len(data), "success without all of the data"
        [place] = asked
        return Reply(cookie, error, b"" if error else bytes(data), statuses, chunks, place)

    def _chunk_header(self) -> tuple[int, int, int, int | None, int]:
        """Flags, type, cookie, the request's offset if it is repeated, length."""
        if self.extended:
            flags, kind, cookie, place, length = struct.unpack(">HHQQQ", self.receive(28))
            return flags, kind, cookie, place, length
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        return flags, kind, cookie, None, length
