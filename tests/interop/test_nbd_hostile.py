"""Clients that die or lie, each followed by an honest one that must find the server as if nothing had happened.

The disk is tracked: after each of them, what the honest one writes is all that changed, and none of it is called clean.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lmdbitmap.nbd.server.server import Server
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    GO,
    READ,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    TRIM,
    WRITE,
    RawClient,
    option,
    request,
    string,
    write,
)
from tests.helpers.support import PATIENCE_SECONDS, requires, run
from tests.helpers.tracked import TrackedDisk, changed_blocks

SIZE = 64 << 20
BLOCK = 4096
MINE = SIZE // 2
"""From here on the honest ones write; what is before it they only read."""
MAX = 2**32 - 1

pytestmark = requires("nbdinfo")


class House(NamedTuple):
    """`content` is what the honest ones wrote; there was nothing but zeroes at the checkpoint."""

    tracked: TrackedDisk
    server: Server
    content: bytearray

    def judge(self) -> None:
        now = self.tracked.image.read_bytes()
        assert now == self.content
        assert changed_blocks(bytes(SIZE), now, BLOCK) <= self.tracked.stored_dirt()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with contextlib.closing(TrackedDisk(tmp_path_factory.mktemp("hostile"), SIZE)) as tracked:
        with tracked.clean().attach() as disk:
            server = Server({"disk": disk}, handshake_timeout_s=PATIENCE_SECONDS)
            server.listen_unix(str(tracked.folder / "nbd.sock"))
            server.start()
            house = House(tracked, server, bytearray(SIZE))
            yield house
            assert server.stop()
        house.judge()
        assert house.content.count(0) < SIZE


@pytest.fixture
def path(house: House) -> Iterator[str]:
    """The server's socket; afterwards clients that know nothing of the others must be served."""
    [uri] = house.server.uris
    path = uri.partition("socket=")[2]
    yield path
    assert run("nbdinfo", "--size", uri).stdout.strip() == str(SIZE)
    offset = MINE + random.randrange(SIZE - MINE)
    with transmitting(path) as honest:
        assert honest.do(WRITE, offset, 1, data=b"h").error == 0
    house.content[offset] = ord("h")
    house.judge()


def say(path: str, data: bytes) -> None:
    """Say it and hang up, whether or not the server still listens."""
    with RawClient.connect(path) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(data)


def greeted(path: str) -> RawClient:
    client = RawClient.connect(path)
    client.greet()
    return client


def transmitting(path: str, *, structured: bool = True) -> RawClient:
    client = RawClient.connect(path)
    client.go("disk", structured=structured, contexts=["base:allocation"])
    return client


HANDSHAKE = (
    b"\0\0\0\3"
    + option(STRUCTURED_REPLY)
    + option(SET_META_CONTEXT, string("disk") + struct.pack(">I", 1) + string("base:allocation"))
    + option(GO, string("disk") + b"\0\1\0\3")
)


@pytest.mark.parametrize("sent", range(0, len(HANDSHAKE) + 1, 7))
def test_a_client_may_hang_up_at_any_byte_of_the_handshake(path: str, sent: int) -> None:
    say(path, HANDSHAKE[:sent])


@pytest.mark.parametrize(
    "lie",
    [
        b"\x16\x03\x01\x02\x00\x01" + bytes(600),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", GO, MAX),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", GO, 65537) + bytes(65537),
        b"\0\0\0\3" + option(99) * 2000,
        b"\0\0\0\0" + option(3),
        b"\0\0\0\3" + option(1, b"no such disk"),
    ],
)
def test_a_lie_in_the_handshake_is_hung_up_on(path: str, lie: bytes) -> None:
    with RawClient.connect(path) as client:
        client.receive(18)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(lie)
        assert client.hears_the_end()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        string("disk"),
        struct.pack(">I", MAX) + b"disk\0\0",
        string("disk") + b"\xff\xff",
        string("x" * 5000) + b"\0\0",
    ],
)
def test_wrong_lengths_inside_an_option_are_answered(path: str, data: bytes) -> None:
    with greeted(path) as client:
        assert client.ask(GO, data)[0][0] == 0x80000003
        assert client.ask(GO, string("disk") + b"\0\0")[-1][0] == 1


@pytest.mark.parametrize(
    "lie",
    [
        bytes(28),
        b"\xff" * 100,
        request(READ)[:27],
        struct.pack(">I", 0x25609513) * 20,
        write(0, b"short")[:-1],
        request(WRITE, 0, MAX) + bytes(100_000),
        request(WRITE, 2**64 - 1, 200_000) + bytes(100_000),
        write(0, b"x" * 100)[:-10] + request(READ, 0, 4096) * 3,
    ],
)
def test_a_lie_in_the_transmission_costs_that_connection(path: str, lie: bytes) -> None:
    with transmitting(path) as client:
        client.send(lie)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    "question",
    [
        request(READ, 0, MAX),
        request(READ, 2**64 - 1, 1),
        request(TRIM, 2**63, MAX),
        request(BLOCK_STATUS, 1, MAX),
        request(8),
        request(0xFFFF, flags=0xFFFF),
        request(READ, flags=1 << 5),
    ],
)
def test_absurd_requests_are_errors(path: str, question: bytes, structured: bool) -> None:
    with transmitting(path, structured=structured) as client:
        client.send(question)
        assert client.reply().error == 22
        assert client.do(READ, 0, 512).data == bytes(512)


def test_clients_that_never_read_are_left_alone_with_their_replies(path: str) -> None:
    with contextlib.ExitStack() as deaf_clients:
        for _ in range(5):
            deaf = deaf_clients.enter_context(transmitting(path))
            deaf.send(request(READ, 0, 16 << 20) * 3)
            with contextlib.suppress(BlockingIOError):
                deaf.sock.setblocking(False)
                while True:
                    deaf.sock.send(request(READ, 0, 4096) * 100)
        with transmitting(path) as honest:
            assert honest.do(READ, MINE - 512, 512).data == bytes(512)


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_half_a_hang_up_is_a_hang_up(path: str, how: int) -> None:
    with transmitting(path) as client:
        client.send(request(READ, 0, 8 << 20) * 4)
        client.sock.shutdown(how)


def test_a_hundred_clients_come_and_go_and_leave_nothing_behind(path: str, house: House) -> None:
    for turn in range(100):
        with RawClient.connect(path) as client:
            if turn % 2:
                client.go("disk")
            client.send(b"\0" * (turn % 30))
    with transmitting(path) as last:
        assert last.do(READ, 0, 1).error == 0
    assert house.server.counters.turned_away == 0
