"""Any bytes at any moment: a client's stream ends in good order or in `FormatError`, and never hangs.

And any honest stream, cut into any pieces, does to the disk and tells the client what a naive model says.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import FormatError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.interfaces import BlockDevice, ServedDisk
from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.contexts import allocation_source
from lmdbitmap.nbd.server.handshake import Agreed, Export, Handshake
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    Reply,
    extended,
    option,
    request,
    string,
)
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image

SIZE = 3 << 20
ALLOCATION = 1
FORMS = SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"

# --- any bytes ---

HONEST_OPTIONS = [
    option(8),
    option(11),
    option(3),
    option(6, string("") + b"\0\2\0\1\0\3"),
    option(10, string("disk") + struct.pack(">I", 1) + string("base:allocation")),
    option(9, string("disk") + struct.pack(">I", 0)),
    option(5),
    option(99, b"payload"),
    option(7, string("nowhere") + b"\0\0"),
]
options = st.one_of(
    st.sampled_from(HONEST_OPTIONS),
    st.builds(option, st.integers(0, 13), st.binary(max_size=40)),
    st.binary(max_size=40),
)
requests = st.one_of(
    st.builds(
        request,
        st.integers(0, 9),
        st.integers(0, SIZE + 10) | st.integers(0, 2**64 - 1),
        st.integers(0, 5000) | st.integers(0, 2**32 - 1),
        cookie=st.integers(0, 2**64 - 1),
        flags=st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16]) | st.integers(0, 2**16 - 1),
        data=st.binary(max_size=100),
    ),
    st.builds(
        extended,
        st.integers(0, 9),
        st.integers(0, SIZE + 10) | st.integers(0, 2**64 - 1),
        st.integers(0, 5000) | st.integers(0, 2**64 - 1),
        cookie=st.integers(0, 2**64 - 1),
        flags=st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32]) | st.integers(0, 2**16 - 1),
        data=st.binary(max_size=100),
    ),
    st.binary(max_size=60),
)


def pieces_of(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return (data[start:stop] for start, stop in itertools.pairwise(bounds))


@given(
    flags=st.just(b"\0\0\0\3") | st.binary(max_size=6),
    said=st.lists(options, max_size=12),
    cuts=st.lists(st.integers(0), max_size=6),
)
def test_haggling_ends_in_agreement_or_in_format_error(
    flags: bytes, said: list[bytes], cuts: list[int]
) -> None:
    export = Export("disk", SIZE, 1, contexts=("base:allocation",))
    handshake = Handshake(lambda: {"disk": export})
    answered = 0
    try:
        for piece in pieces_of(flags + b"".join(said), cuts):
            answered += sum(map(len, handshake.receive(piece)))
    except FormatError:
        return
    # No answer is long enough to be worth provoking.
    assert answered <= len(HONEST_OPTIONS) * 200 + 200 * len(said)
    if isinstance(handshake.outcome, Agreed):
        assert handshake.outcome.export_name == "disk"


class Served(NamedTuple):
    """What a connection sent back, and how it ended."""

    answer: bytes
    outcome: Exception | None


def connection_of(form: str, ours: socket.socket, disk: ServedDisk) -> Connection:
    contexts = {ALLOCATION: allocation_source(disk)} if form != SIMPLE else {}
    return Connection(ours, disk, structured=form != SIMPLE, extended=form == EXTENDED, contexts=contexts)


def serve_disk(disk: ServedDisk, stream: bytes, form: str) -> Served:
    """Give a connection the whole stream and then the end of it; gather the answer meanwhile."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(PATIENCE_SECONDS)
        answers: list[bytes] = []
        sender = threading.Thread(target=_send, args=(theirs, stream))
        listener = threading.Thread(target=_listen, args=(theirs, answers))
        sender.start()
        listener.start()
        outcome: Exception | None = None
        try:
            connection_of(form, ours, disk).run()
        except (FormatError, ConnectionResetError) as error:
            outcome = error
        ours.close()
        for thread in (sender, listener):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
    return Served(b"".join(answers), outcome)


def _send(sock: socket.socket, stream: bytes) -> None:
    try:
        sock.sendall(stream)
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # the server has had enough
        pass


def _listen(sock: socket.socket, answers: list[bytes]) -> None:
    try:
        while data := sock.recv(1 << 20):
            answers.append(data)
    except ConnectionResetError:
        pass


@given(said=st.lists(requests, max_size=8), form=st.sampled_from(FORMS))
@example(said=[b"\x25\x60\x95\x13"], form=STRUCTURED)
def test_transmission_ends_with_the_stream_or_in_format_error(said: list[bytes], form: str) -> None:
    served = serve_disk(PlainDisk(MemoryDevice(SIZE)), b"".join(said), form)
    assert served.outcome is None or isinstance(served.outcome, (FormatError, ConnectionResetError))


# --- any honest stream ---


class Step(NamedTuple):
    """One request of a group, placed `gap` bytes behind the one before it."""

    command: int
    gap: int
    length: int
    flags: int
    seed: int


steps = st.builds(
    Step,
    st.sampled_from([READ, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH, BLOCK_STATUS]),
    st.sampled_from([0, 1, 4096]) | st.integers(0, SIZE // 4),
    st.sampled_from([1, 512, 4096, 32768, 131072, 131073, 700_000]) | st.integers(1, 40_000),
    st.sampled_from([0, 0, FUA]),
    st.integers(1, 255),
)
groups = st.lists(st.lists(steps, min_size=1, max_size=12), min_size=1, max_size=5)


class Model:
    """A disk that is a bytearray. The requests of a group never overlap, so that their order is nobody's concern."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)

    def placed(self, group: list[Step]) -> list[tuple[int, Step]]:
        """(offset, step) of those that fit on the disk."""
        offset = 0
        placed = []
        for step in group:
            offset += step.gap
            if offset + step.length <= SIZE:
                placed.append((offset, step))
                offset += step.length
        return placed

    def apply(self, offset: int, step: Step) -> None:
        if step.command == WRITE:
            self.content[offset : offset + step.length] = data_of(step)
        elif step.command == WRITE_ZEROES:
            self.content[offset : offset + step.length] = bytes(step.length)

    def learn(self, device: BlockDevice, offset: int, step: Step) -> None:
        """What a trimmed range reads as is anybody's guess; it must only stay so."""
        if step.command == TRIM:
            self.content[offset : offset + step.length] = device.pread(step.length, offset)


def data_of(step: Step) -> bytes:
    return bytes([step.seed]) * step.length


def wire(client: RawClient, cookie: int, offset: int, step: Step) -> bytes:
    if step.command == FLUSH:
        return client.request(FLUSH, cookie=cookie)
    data = data_of(step) if step.command == WRITE else b""
    return client.request(step.command, offset, step.length, cookie=cookie, flags=step.flags, data=data)


def check_group(
    client: RawClient, device: BlockDevice, model: Model, group: list[Step], cuts: list[int]
) -> None:
    """Send a group in pieces, and compare every answer with the model."""
    places = model.placed(group)
    placed = dict(enumerate(places))
    stream = b"".join(wire(client, cookie, *place) for cookie, place in placed.items())
    sender = threading.Thread(target=send_all, args=(client, pieces_of(stream, cuts)))
    sender.start()
    for place in places:
        model.apply(*place)
    for _ in places:
        cookie = client.peek_cookie()
        offset, step = placed.pop(cookie)
        reply = client.reply(step.length if step.command == READ else 0, offset)
        assert reply.error == 0
        if client.extended:
            assert reply.offset == (0 if step.command == FLUSH else offset)
        if step.command == READ:
            assert reply.data == model.content[offset : offset + step.length]
        if step.command == BLOCK_STATUS:
            check_status(model, offset, step.length, reply.statuses[ALLOCATION])
    assert placed == {}
    sender.join(PATIENCE_SECONDS)
    assert not sender.is_alive()
    for place in places:
        model.learn(device, *place)


def send_all(client: RawClient, pieces: Iterator[bytes]) -> None:
    for piece in pieces:
        client.send(piece)


def check_status(model: Model, offset: int, length: int, extents: list[tuple[int, int]]) -> None:
    assert sum(extent_length for extent_length, _ in extents) == length
    for extent_length, flags in extents:
        assert extent_length > 0
        if flags & 2:
            assert model.content.count(0, offset, offset + extent_length) == extent_length
        offset += extent_length


@contextlib.contextmanager
def connection_to(device: BlockDevice, form: str) -> Iterator[RawClient]:
    ours, theirs = socket.socketpair()
    server = threading.Thread(target=connection_of(form, ours, PlainDisk(device)).run)
    with ours, RawClient(theirs, structured=form != SIMPLE, extended=form == EXTENDED) as client:
        server.start()
        try:
            yield client
        finally:
            theirs.close()
            server.join(PATIENCE_SECONDS)
            assert not server.is_alive()


@contextlib.contextmanager
def disk_of(kind: str) -> Iterator[BlockDevice]:
    if kind == "memory":
        yield MemoryDevice(SIZE)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make_raw_image(Path(folder) / "disk.raw", SIZE)
        with FileDevice.open(path) as device:
            yield device


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["memory", "file"])
@given(groups=groups, cuts=st.lists(st.integers(0), max_size=5))
@settings(max_examples=25)
def test_an_honest_stream_does_what_the_model_says(
    kind: str, form: str, groups: list[list[Step]], cuts: list[int]
) -> None:
    model = Model()
    with disk_of(kind) as device:
        with connection_to(device, form) as client:
            for group in groups:
                usable = [step for step in group if form != SIMPLE or step.command != BLOCK_STATUS]
                check_group(client, device, model, usable, cuts)
        assert device.pread(SIZE, 0) == model.content


# --- one form beside another ---


class Question(NamedTuple):
    """One request, allowed or not."""

    command: int
    offset: int
    length: int
    flags: int


questions = st.builds(
    Question,
    st.sampled_from([READ, WRITE, TRIM, WRITE_ZEROES, FLUSH, BLOCK_STATUS, 5, 8]),
    st.integers(0, SIZE + 10) | st.sampled_from([0, SIZE - 1, SIZE, 2**64 - 1]),
    st.integers(0, 5000) | st.sampled_from([0, 32768, 131073, SIZE]),
    st.sampled_from([0, 0, 0, FUA, 2, 4, 8, 16, 64]),
)


@given(asked=st.lists(questions, max_size=20))
@settings(max_examples=50)
def test_structured_and_extended_clients_are_answered_alike(asked: list[Question]) -> None:
    answers: list[list[Reply]] = []
    contents = []
    for form in (STRUCTURED, EXTENDED):
        device = MemoryDevice(SIZE)
        with connection_to(device, form) as client:
            answers.append([answer_to(client, question) for question in asked])
        contents.append(device.pread(SIZE, 0))
    assert contents[0] == contents[1]
    assert [reply[1:4] for reply in answers[0]] == [reply[1:4] for reply in answers[1]]
    for question, reply in zip(asked, answers[1], strict=True):
        assert reply.error or question.command == FLUSH or question.offset + question.length <= SIZE


def answer_to(client: RawClient, question: Question) -> Reply:
    data = b"\1" * question.length if question.command == WRITE else b""
    return client.do(question.command, question.offset, question.length, flags=question.flags, data=data)
