"""A far NBD server for tests that does what it is told to: lie, hang up, forget what nobody flushed.

Written from the specification's tables with `struct` alone, so that a slip in `nbd/protocol.py` shows here. It
serves memory with a volatile cache in front: `data` is what is read, `stable` what survives a `crash`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    DISC,
    EXTENDED_HEADERS,
    FLUSH,
    GO,
    PAYLOAD_LEN,
    READ,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    WRITE,
)

TRIM, WRITE_ZEROES = 4, 6
READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SEND_FAST_ZERO = 2, 4, 8, 32, 64, 2048
ALL = 1 | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO
EXPORT_NAME, STARTTLS = 1, 5
ACK, INFO, META_CONTEXT, UNSUP, TLS_REQD = 1, 3, 4, (1 << 31) + 1, (1 << 31) + 5
EIO, EINVAL, EOVERFLOW, ENOTSUP, ESHUTDOWN = 5, 22, 75, 95, 108
CONTEXT_ID = 77
_OF_STRUCTURED = (SET_META_CONTEXT, STRUCTURED_REPLY)


class Asked(NamedTuple):
    """A request as it came; `connection` counts from 1."""

    connection: int
    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    data: bytes = b""


class Crash(Exception):
    """The server dies now: all connections end, and so does what was not flushed."""


class HangUp(Exception):
    """This connection ends now."""


Behaviour: TypeAlias = Callable[["FarServer", Asked], "bytes | None"]
"""What to send in answer to a request; None for what an honest server sends."""


def honest(server: FarServer, asked: Asked) -> bytes | None:
    return None


def crashing_at_first(command: int) -> Behaviour:
    """It dies at its first request of that kind, and is honest before and afterwards."""
    died: list[Asked] = []

    def behave(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == command and not died:
            died.append(asked)
            raise Crash
        return None

    return behave


class FarServer:
    """Listens at `path` until `close`. What it offers may be changed between connections."""

    def __init__(self, path: Path, size: int = 64 << 10, *, flags: int = ALL) -> None:
        self.path = path
        self.uri = f"nbd+unix:///disk?socket={path}"
        self.size = size
        self.flags = flags
        self.description = ""
        self.structured = True
        self.extended = False
        """Whether it agrees on extended headers; it is structured too then."""
        self.knows_go = True
        self.no_zeroes = True
        self.block_sizes: tuple[int, int, int] | None = None
        self.statuses: list[tuple[int, int]] | None = None
        self.behave: Behaviour = honest
        self.data = bytearray(size)
        self.stable = bytearray(size)
        self.greeting = b"NBDMAGICIHAVEOPT"
        self.dribbles = False
        """Send each byte by itself."""
        self.bytes_to_live: int | None = None
        """Hang up after so many bytes of the handshake."""
        self.handshake_bytes = 0
        self.is_silent = False
        self.tls: ssl.SSLContext | None = None
        """What every client has to begin TLS with, if anything."""
        self.in_plain_text = b""
        """Said behind the last word before TLS, as by somebody in between."""
        self.asked: list[Asked] = []
        self.handshakes = 0
        self.options: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._newest: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(16)
        self._listener = listener
        self._start(self._accept, listener)

    def stop_listening(self) -> None:
        """As a server that is not there: connections that are open stay."""
        listener, self._listener = self._listener, None
        if listener is not None:
            os.unlink(self.path)
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def crash(self) -> None:
        with self._lock:
            self._die()

    def close(self) -> None:
        self.stop_listening()
        with self._lock:
            for sock in self._connections:
                _hang_up(sock)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def await_requests(self, count: int) -> None:
        """Return once that many have come, ever."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.asked) >= count, 20)

    def has_more(self) -> bool:
        """Whether more has come on the newest connection than was looked at."""
        assert self._newest is not None
        try:
            return self._newest.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return False

    def cut_short(self, data: bytes) -> bytes:
        """Send no more than this, and hang up."""
        raise HangUp(data)

    def commands(self) -> list[int]:
        return [asked.command for asked in self.asked]

    def _die(self) -> None:
        self.data[:] = self.stable
        for sock in self._connections:
            _hang_up(sock)

    def _start(self, work: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = threading.Thread(target=work, args=(sock,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with self._lock:
                    self._connections.add(sock)
                self._newest = sock
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.ExitStack() as sockets:
            sockets.enter_context(sock)
            with contextlib.suppress(OSError, EOFError, HangUp):
                self.handshake_bytes = 0
                sock, number = self._shake_hands(sock, sockets)
                while self._answer(sock, number):
                    pass
            with self._lock:
                self._connections.discard(sock)

    # -- handshake -----------------------------------------------------------------------------------------

    def _shake_hands(self, sock: socket.socket, sockets: contextlib.ExitStack) -> tuple[socket.socket, int]:
        """The socket that is spoken over from then on, and its number; `sockets` closes it."""
        if self.is_silent:
            _exactly(sock, 1)
        self._say(sock, self.greeting + struct.pack(">H", 1 | (2 if self.no_zeroes else 0)))
        assert struct.unpack(">I", _exactly(sock, 4)) == (1 | (2 if self.no_zeroes else 0),)
        while True:
            magic, number, length = struct.unpack(">8sII", _exactly(sock, 16))
            assert magic == b"IHAVEOPT"
            data = _exactly(sock, length)
            self.options.append((number, data))
            if self.tls is not None and not isinstance(sock, ssl.SSLSocket):
                sock = sockets.enter_context(self._encrypted(sock, self.tls, number))
                continue
            if number == EXPORT_NAME:
                padding = b"" if self.no_zeroes else bytes(124)
                return sock, self._agree(sock, struct.pack(">QH", self.size, self.flags) + padding)
            said = b"".join(self.option_replies(number))
            if number == GO and self.knows_go:
                return sock, self._agree(sock, said)
            self._say(sock, said)

    def _agree(self, sock: socket.socket, last_word: bytes) -> int:
        """Say the last word of a handshake, which is counted before: a client that heard it may look at once."""
        with self._lock:
            self.handshakes += 1
            number = self.handshakes
        try:
            self._say(sock, last_word)
        except BaseException:
            with self._lock:
                self.handshakes -= 1
            raise
        return number

    def _encrypted(self, sock: socket.socket, tls: ssl.SSLContext, number: int) -> socket.socket:
        if number != STARTTLS:
            self._say(sock, option_reply(number, TLS_REQD))
            return sock
        self._say(sock, option_reply(number, ACK))
        sock.sendall(self.in_plain_text)
        with self._lock:  # whoever makes us die meanwhile waits for the one socket or the other
            self._connections.discard(sock)
            encrypted = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._connections.add(encrypted)
        try:
            encrypted.do_handshake()
        except BaseException:
            encrypted.close()
            raise
        return encrypted

    def _say(self, sock: socket.socket, data: bytes) -> None:
        """A part of the handshake."""
        before, self.handshake_bytes = self.handshake_bytes, self.handshake_bytes + len(data)
        if self.bytes_to_live is None:
            self._send(sock, data)
        else:
            sock.sendall(data[: max(self.bytes_to_live - before, 0)])
            if self.handshake_bytes > self.bytes_to_live:
                raise HangUp

    def _send(self, sock: socket.socket, data: bytes) -> None:
        for piece in (data[n : n + 1] for n in range(len(data))) if self.dribbles else (data,):
            sock.sendall(piece)

    def option_replies(self, number: int) -> Iterator[bytes]:
        if number == GO and self.knows_go:
            yield option_reply(number, INFO, struct.pack(">HQH", 0, self.size, self.flags))
            yield option_reply(number, INFO, struct.pack(">H", 1) + b"disk")
            yield option_reply(number, INFO, struct.pack(">H", 2) + self.description.encode())
            if self.block_sizes is not None:
                yield option_reply(number, INFO, struct.pack(">HIII", 3, *self.block_sizes))
            yield option_reply(number, ACK)
        elif number == SET_META_CONTEXT and self.statuses is not None:
            yield option_reply(number, META_CONTEXT, struct.pack(">I", CONTEXT_ID) + b"base:allocation")
            yield option_reply(number, ACK)
        elif self.extended if number == EXTENDED_HEADERS else self.structured and number in _OF_STRUCTURED:
            yield option_reply(number, ACK)
        else:
            yield option_reply(number, UNSUP, b"never heard of it")

    # -- transmission --------------------------------------------------------------------------------------

    def _answer(self, sock: socket.socket, connection: int) -> bool:
        layout, expected = (">IHHQQQ", 0x21E41C71) if self.extended else (">IHHQQI", 0x25609513)
        header = _exactly(sock, struct.calcsize(layout))
        magic, flags, command, cookie, offset, length = struct.unpack(layout, header)
        assert magic == expected
        if self.extended:
            assert bool(flags & PAYLOAD_LEN) == (command == WRITE)
            flags &= ~PAYLOAD_LEN
        data = _exactly(sock, length) if command == WRITE else b""
        asked = Asked(connection, flags, command, cookie, offset, length, data)
        if command == DISC:
            return False
        with self._lock:
            if sock not in self._connections:
                raise HangUp
            self._note(asked)
            try:
                said = self.behave(self, asked)
            except HangUp as cut:
                sock.sendall(b"".join(cut.args))
                raise
            except Crash:
                self._die()
                raise HangUp from None
            reply = self.reply(asked) if said is None else said
        self._send(sock, reply)
        return True

    def _note(self, asked: Asked) -> None:
        with self._news:
            self.asked.append(asked)
            self._news.notify_all()

    def reply(self, asked: Asked) -> bytes:
        """Do it, and say what an honest server says."""
        part = slice(asked.offset, asked.offset + asked.length)
        if asked.command == READ:
            return self.read_reply(asked, bytes(self.data[part]))
        if asked.command == BLOCK_STATUS:
            return self.status_reply(asked, self.statuses or [])
        if asked.command == WRITE:
            self.data[part] = asked.data
        elif asked.command in (TRIM, WRITE_ZEROES):
            self.data[part] = bytes(asked.length)
        if asked.command == FLUSH or asked.flags & 1:
            self.stable[:] = self.data
        return extended_chunk(asked, 0) if self.extended else simple(asked.cookie)

    def read_reply(self, asked: Asked, data: bytes) -> bytes:
        if self.extended:
            return extended_chunk(asked, 1, struct.pack(">Q", asked.offset) + data)
        if self.structured:
            return chunk(asked.cookie, 1, struct.pack(">Q", asked.offset) + data)
        return simple(asked.cookie) + data

    def status_reply(self, asked: Asked, statuses: list[tuple[int, int]]) -> bytes:
        if self.extended:
            descriptors = b"".join(struct.pack(">QQ", *status) for status in statuses)
            return extended_chunk(asked, 6, struct.pack(">II", CONTEXT_ID, len(statuses)) + descriptors)
        descriptors = b"".join(struct.pack(">II", *status) for status in statuses)
        return chunk(asked.cookie, 5, struct.pack(">I", CONTEXT_ID) + descriptors)

    def error_reply(self, asked: Asked, error: int) -> bytes:
        if self.extended:
            return extended_chunk(asked, 0x8001, struct.pack(">IH", error, 0))
        if self.structured and asked.command in (READ, BLOCK_STATUS):
            return error_chunk(asked.cookie, error)
        return simple(asked.cookie, error)


@contextmanager
def far_server(folder: Path, size: int = 64 << 10, *, flags: int = ALL) -> Iterator[FarServer]:
    server = FarServer(folder / "far", size, flags=flags)
    try:
        yield server
    finally:
        server.close()


def until_it_works(use: Callable[[], None]) -> None:
    """A server that stayed away is not asked for by every request, but once in a while."""
    failures = 0
    while failures < 1_000_000:
        try:
            use()
        except OSError:
            failures += 1
        else:
            return
    raise AssertionError("it never worked")


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def simple(cookie: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, len(payload)) + payload


def extended_chunk(asked: Asked, kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    fields = (int(done), kind, asked.cookie, asked.offset, len(payload))
    return struct.pack(">IHHQQQ", 0x6E8A278C, *fields) + payload


def error_chunk(cookie: int, error: int, message: bytes = b"", *, done: bool = True) -> bytes:
    return chunk(cookie, 0x8001, struct.pack(">IH", error, len(message)) + message, done=done)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
