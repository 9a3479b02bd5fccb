"""The request stream through the connection's own loop, without a socket, beside a model of one request at a time."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from lmdbitmap.errors import FormatError
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.contexts import allocation_source
from tests.fuzz.inputs import BYTEWISE, MOST_PIECES, Input, pieces_of
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    request,
)

SMALL_SIZE, LARGE_SIZE = 4096 + 100, 160 * 1024 + 100
"""The large disk has room for a WRITE that is done as it arrives, which is one of more than 128 KiB."""
ALLOCATION = 1
MOST = 32 << 20
ALLOWED = {
    READ: FUA | DF, WRITE: FUA, FLUSH: FUA, TRIM: FUA, CACHE: FUA, WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}  # fmt: skip
CHANGING = (WRITE, TRIM, WRITE_ZEROES)
EINVAL, EPERM, ENOSPC = 22, 1, 28
SCRIPTED, STRUCTURED, READ_ONLY, FAILING, LARGE, EXTENDED = (1 << bit for bit in range(6))
"""Extended are the headers of those that are structured too."""
REQUEST_MAGIC, EXTENDED_MAGIC, CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC = (
    0x25609513, 0x21E41C71, 0x668E33EF, 0x6E8A278C,
)  # fmt: skip
MOST_SCRIPT = 2 * LARGE_SIZE
"""Bytes of a stream, about."""
FAULTS = ("pwrite", "pread_into", "flush", "write_zeroes", "discard", "allocation")
LENGTHS = (0, 1, 100, 512, SMALL_SIZE, SMALL_SIZE + 1, 32768, 131072, 131073, LARGE_SIZE, LARGE_SIZE + 1,
           MOST, MOST + 1, 2**32 - 1)  # fmt: skip
LONG_LENGTHS = (*LENGTHS[:-3], MOST, MOST + 1, 2**32, 2**33 + 512, 2**63, 2**64 - 1)
OFFSETS = (
    0,
    1,
    512,
    SMALL_SIZE - 1,
    SMALL_SIZE,
    65536,
    131072,
    LARGE_SIZE - 1,
    LARGE_SIZE,
    2**63 - 1,
    2**64 - 1,
)


class Asked(NamedTuple):
    """A request, what it must be answered, and the disk's content after it."""

    command: int
    flags: int
    offset: int
    length: int
    error: int
    content: bytes


class Script(NamedTuple):
    """A stream and what a model makes of it. `lie` if it ends in what is no request, `cut` if inside a WRITE."""

    stream: bytes
    asked: list[Asked]
    lie: bool
    cut: tuple[int, int] | None


class Wire:
    """The half of a socket that a connection uses: what arrives is given, what is sent is kept."""

    family = socket.AF_UNIX

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self.sent = bytearray()

    def recv_into(self, buffer: memoryview, _count: int = 0, _flags: int = 0) -> int:
        assert len(buffer) > 0, "room for nothing"
        if not self._piece:
            self._piece = next(self._pieces, b"")
        taken = self._piece[: len(buffer)]
        buffer[: len(taken)] = taken
        self._piece = self._piece[len(taken) :]
        return len(taken)

    def send(self, data: memoryview, _flags: int = 0) -> int:
        """Takes half of what is more than a few bytes, as a full socket would."""
        count = len(data) if len(data) < 64 else len(data) // 2
        self.sent += data[:count]
        return count

    def sendmsg(self, parts: list[bytes], _ancillary: tuple[()] = (), _flags: int = 0) -> int:
        return self.send(memoryview(b"".join(parts)))

    def sendall(self, data: bytes | memoryview, _flags: int = 0) -> None:
        self.sent += data


class Reply(NamedTuple):
    cookie: int
    error: int
    data: bytes
    statuses: list[tuple[int, int]]


def requests(data: bytes) -> None:
    source = Input(data)
    mode, cut = source.byte(), source.byte()
    fault = source.pick(FAULTS) if mode & FAILING else None
    stream = scripted(source, mode) if mode & SCRIPTED else source.rest()
    script = modelled(stream, mode)
    serve(script, mode, 2 if cut == BYTEWISE and len(stream) > MOST_PIECES else cut, fault)


def size_of(mode: int) -> int:
    return LARGE_SIZE if mode & LARGE else SMALL_SIZE


def is_extended(mode: int) -> bool:
    return bool(mode & EXTENDED and mode & STRUCTURED)


def scripted(source: Input, mode: int) -> bytes:
    """Requests whose magic is right, with as much data behind a WRITE as it announces, up to a limit."""
    said, size, long = bytearray(), size_of(mode), is_extended(mode)
    while source.left and len(said) < MOST_SCRIPT:
        command, shape = source.byte() % 10, source.byte()
        flags = 1 << source.byte() % (6 if long else 5) if shape & 1 else 0
        flags |= PAYLOAD_LEN if long and command == WRITE and shape & 8 else 0
        offset = source.pick(OFFSETS) if shape & 2 else source.number(2)
        length = source.pick(LONG_LENGTHS if long else LENGTHS) if shape & 4 else source.number(1)
        carries = command == WRITE or flags & PAYLOAD_LEN
        content = bytes([source.byte() | 1]) * min(length, size + 1) if carries else b""
        if long:
            said += struct.pack(">IHHQQQ", EXTENDED_MAGIC, flags, command, 0, offset, length) + content
        else:
            said += request(command, offset, length, flags=flags, data=content)
        if shape & 128:
            said += source.take(shape >> 4 & 7)
    return bytes(said)


# --- the model ---


def modelled(stream: bytes, mode: int) -> Script:
    """The stream with the requests' cookies numbered, done one after the other on a disk of bytes."""
    numbered, content = bytearray(stream), bytes(size_of(mode))
    asked: list[Asked] = []
    position, long = 0, is_extended(mode)
    layout, expected = (">IHHQQQ", EXTENDED_MAGIC) if long else (">IHHQQI", REQUEST_MAGIC)
    header_size = struct.calcsize(layout)
    while len(stream) - position >= header_size:
        magic, flags, command, _, offset, length = struct.unpack_from(layout, stream, position)
        payload = length if command == WRITE or (long and flags & PAYLOAD_LEN) else 0
        if magic != expected or (long and payload > MOST):
            return Script(bytes(numbered), asked, lie=True, cut=None)
        if command == DISC:
            break
        struct.pack_into(">Q", numbered, position + 8, len(asked))
        position += header_size
        error = error_of(command, flags, offset, length, mode)
        if payload > len(stream) - position:
            unwritten = (len(content), len(content)) if error else (offset, offset + length)
            return Script(bytes(numbered), asked, lie=False, cut=unwritten)
        if not error and command in CHANGING and length:
            new = stream[position : position + length] if command == WRITE else bytes(length)
            content = content[:offset] + new + content[offset + length :]
        position += payload
        asked.append(Asked(command, flags, offset, length, error, content))
    return Script(bytes(numbered), asked, lie=False, cut=None)


def error_of(command: int, flags: int, offset: int, length: int, mode: int) -> int:
    if is_extended(mode) and command == WRITE:
        flags &= ~PAYLOAD_LEN
    if command not in ALLOWED or flags & ~ALLOWED[command]:
        return EINVAL
    if (flags & DF or command == BLOCK_STATUS) and not mode & STRUCTURED:
        return EINVAL
    if command == BLOCK_STATUS and length == 0:
        return EINVAL
    if mode & READ_ONLY and command in CHANGING:
        return EPERM
    if command in (READ, WRITE) and length > MOST:
        return EINVAL
    if command != FLUSH and offset + length > size_of(mode):
        return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
    return 0


# --- the real thing ---


def serve(script: Script, mode: int, choice: int, fault: str | None) -> None:
    device = MemoryDevice(size_of(mode), read_only=bool(mode & READ_ONLY))
    if fault is not None:
        device.fail_next[fault] = errno.EIO
    disk, wire = PlainDisk(device), Wire(pieces_of(script.stream, choice))
    contexts = {ALLOCATION: allocation_source(disk)} if mode & STRUCTURED else {}
    connection = Connection(
        cast(socket.socket, wire), disk, structured=bool(mode & STRUCTURED), contexts=contexts,
        extended=is_extended(mode),
    )  # fmt: skip
    ended = None
    try:
        connection.run()
    except (FormatError, ConnectionResetError) as error:
        ended = error
    assert isinstance(ended, FormatError) == script.lie
    assert not isinstance(ended, ConnectionResetError) or script.cut is not None
    check_answers(script, bytes(wire.sent), mode, choice, fault)
    if fault is None and not script.lie:
        check_content(script, device)


def unique(contents: Iterable[bytes]) -> Iterable[bytes]:
    """Contents that follow each other and are the same object stand for one."""
    return {id(content): content for content in contents}.values()


def check_content(script: Script, device: MemoryDevice) -> None:
    content = device.pread(device.size, 0)
    expected = script.asked[-1].content if script.asked else bytes(device.size)
    start, stop = script.cut or (device.size, device.size)
    assert content[:start] == expected[:start]
    assert content[stop:] == expected[stop:]


def check_answers(script: Script, sent: bytes, mode: int, choice: int, fault: str | None) -> None:
    """One reply for each request, with the error that the model has for it, and data of a moment at or after it."""
    answered: dict[int, Reply] = {}
    for reply in replies_of(script, sent, mode):
        assert reply.cookie not in answered
        answered[reply.cookie] = reply
    whole = not script.lie or choice == BYTEWISE
    assert len(answered) == len(script.asked) if whole else len(answered) <= len(script.asked)
    faults = 0
    for number, reply in answered.items():
        asked = script.asked[number]
        if fault is not None and reply.error != asked.error:
            assert reply.error == errno.EIO
            faults += 1
            continue
        assert reply.error == asked.error
        if fault is None:
            check_data(script.asked[number:], reply, choice)
    assert faults <= (1 if fault is not None and choice == BYTEWISE else len(answered))


def check_data(asked: list[Asked], reply: Reply, choice: int) -> None:
    first = asked[0]
    start, stop = first.offset, first.offset + first.length
    if first.command == READ and not first.error:
        moments = asked[:1] if choice == BYTEWISE else asked
        assert any(
            reply.data == content[start:stop] for content in unique(moment.content for moment in moments)
        )
    if first.command == BLOCK_STATUS and not first.error:
        lengths = [length for length, _ in reply.statuses]
        assert lengths
        assert all(length > 0 for length in lengths)
        assert sum(lengths) == first.length or (first.flags & REQ_ONE and len(lengths) == 1)
        assert sum(lengths) <= first.length


def replies_of(script: Script, sent: bytes, mode: int) -> Iterator[Reply]:
    position = 0
    while position < len(sent):
        magic, middle, cookie = struct.unpack_from(">IIQ", sent, position)
        assert cookie < len(script.asked)
        asked = script.asked[cookie]
        if magic == 0x67446698:
            assert not is_extended(mode)
            assert not (mode & STRUCTURED and asked.command in (READ, BLOCK_STATUS))
            length = asked.length if asked.command == READ and not middle else 0
            data = sent[position + 16 : position + 16 + length]
            assert len(data) == length
            yield Reply(cookie, middle, data, [])
            position += 16 + length
        else:
            assert magic == (EXTENDED_CHUNK_MAGIC if is_extended(mode) else CHUNK_MAGIC)
            assert mode & STRUCTURED
            if is_extended(mode):
                offset, length = struct.unpack_from(">QQ", sent, position + 16)
                assert offset == asked.offset
                position += 32
            else:
                (length,) = struct.unpack_from(">I", sent, position + 16)
                position += 20
            payload = sent[position : position + length]
            assert len(payload) == length
            assert middle >> 16 == 1, "more than one chunk"
            yield structured(cookie, middle & 0xFFFF, payload, asked)
            position += length


def structured(cookie: int, kind: int, payload: bytes, asked: Asked) -> Reply:
    if kind == 0x8001:
        error, said = struct.unpack_from(">IH", payload)
        assert error
        assert len(payload) == 6 + said
        return Reply(cookie, error, b"", [])
    if kind == 1:
        assert asked.command == READ
        assert struct.unpack_from(">Q", payload) == (asked.offset,)
        return Reply(cookie, 0, payload[8:], [])
    if kind == 6:
        context, count = struct.unpack_from(">II", payload)
        assert (context, len(payload)) == (ALLOCATION, 8 + 16 * count)
        return Reply(cookie, 0, b"", list(struct.iter_unpack(">QQ", payload[8:])))
    if kind == 5:
        numbers = struct.unpack(f">{len(payload) // 4}I", payload)
        assert numbers[0] == ALLOCATION
        return Reply(cookie, 0, b"", list(zip(numbers[1::2], numbers[2::2], strict=True)))
    assert (kind, payload) == (0, b"")
    assert asked.command not in (READ, BLOCK_STATUS) or asked.length == 0
    return Reply(cookie, 0, b"", [])
