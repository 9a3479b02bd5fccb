"""Half a WRITE and then nothing more, in each of the ways in which a write is done: no change goes unnamed.

The judge is a comparison of the image with what it was at the checkpoint, block by block, and what the store says is
asked as somebody would who finds everybody dead at that moment.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.tls import server_context
from tests.helpers.certificates import Certificates, shared_papers
from tests.helpers.nbd_raw import EXTENDED_HEADERS, GO, READ, STRUCTURED_REPLY, WRITE, RawClient, string
from tests.helpers.support import PATIENCE_SECONDS, requires
from tests.helpers.tracked import NAME, TrackedDisk, changed_blocks

SIZE = (4 << 20) + 512
BLOCK = 4096
STARTTLS = 5
ACK = (1, b"")
FORMS = {"simple": None, "structured": STRUCTURED_REPLY, "extended": EXTENDED_HEADERS}
DONE = 20_000, 30_000
"""Offset and length of a write that comes whole, before the half one."""

pytestmark = requires("openssl")


class Half(NamedTuple):
    """The first `sent` bytes of the data of a WRITE."""

    offset: int
    length: int
    sent: int
    lands: bool
    """Whether some of it is in the image in the end."""


HALVES = {
    "only its header": Half(1 << 20, 8192, 0, lands=False),
    "what is collected until it is whole": Half((1 << 20) + 7, 40_000, 39_999, lands=False),
    "what is done as it comes, begun": Half((1 << 20) + 7, 1 << 20, 1, lands=False),
    "what is done as it comes": Half((1 << 20) + 7, 1 << 20, 700_001, lands=True),
    "what is done as it comes, but for a byte": Half(1 << 20, 1 << 20, (1 << 20) - 1, lands=True),
    "what is done as it comes, up to the end": Half(SIZE - (1 << 20), 1 << 20, 900_000, lands=True),
    "what is refused": Half(SIZE - 8192, 8193, 8000, lands=False),
    "what is refused and drained": Half(SIZE - 8192, 1 << 20, 700_000, lands=False),
}
"""Of more than 128 KiB, data goes into the image as it comes, in pieces."""


class House(NamedTuple):
    tracked: TrackedDisk
    server: Server
    socket_path: str
    port: int
    papers: Certificates

    def client(self, form: str, *, tls: bool) -> RawClient:
        client = self._encrypted() if tls else self._greeted(socket.AF_UNIX, self.socket_path)
        client.structured, client.extended = form != "simple", form == "extended"
        wanted = FORMS[form]
        assert wanted is None or client.ask(wanted) == [ACK]
        assert client.ask(GO, string(NAME) + b"\0\0")[-1] == ACK
        return client

    def _greeted(self, family: int, address: str | tuple[str, int]) -> RawClient:
        sock = socket.socket(family)
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(address)
        client = RawClient(sock)
        client.greet()
        return client

    def _encrypted(self) -> RawClient:
        plain = self._greeted(socket.AF_INET, ("127.0.0.1", self.port))
        assert plain.ask(STARTTLS) == [ACK]
        return RawClient(self.papers.client_context().wrap_socket(plain.sock, server_hostname="localhost"))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    papers, path = shared_papers(), str(tmp_path / "nbd.sock")
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        tracked.image.write_bytes(random.Random(1).randbytes(SIZE))
        with tracked.attach() as disk:
            disk.checkpoint("start")
            server = Server({NAME: disk})
            server.listen_unix(path)
            listener = server.listen_tcp("127.0.0.1", 0, server_context(str(papers.folder)))
            server.start()
            yield House(tracked, server, path, listener.sock.getsockname()[1], papers)
            assert server.stop()


def blocks(offset: int, length: int) -> set[int]:
    return set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))


@pytest.mark.parametrize("tls", [False, True], ids=["unix socket", "TLS"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_what_half_a_write_left_in_the_image_is_named(house: House, half: Half, form: str, tls: bool) -> None:
    before, chosen = house.tracked.image.read_bytes(), random.Random(2)
    with house.client(form, tls=tls) as client:
        client.send(client.request(WRITE, *DONE, data=chosen.randbytes(DONE[1])))
        client.send(client.request(WRITE, half.offset, half.length, cookie=2) + chosen.randbytes(half.sent))
        client.sock.shutdown(socket.SHUT_WR)
        assert client.hears_the_end()
    changed = changed_blocks(before, house.tracked.image.read_bytes(), BLOCK)
    assert changed <= house.tracked.stored_dirt()
    assert blocks(*DONE) <= changed <= blocks(*DONE) | blocks(half.offset, half.length)
    assert bool(changed - blocks(*DONE)) == half.lands
    assert_is_served(house, form, tls=tls)


def assert_is_served(house: House, form: str, *, tls: bool) -> None:
    """The next client finds the disk, reads what is in the image, and has its writes tracked."""
    with house.client(form, tls=tls) as honest:
        assert honest.do(READ, 0, 1 << 20).data == house.tracked.image.read_bytes()[: 1 << 20]
        assert honest.do(WRITE, SIZE - 512, 512, data=bytes(512)).error == 0
        assert (SIZE - 512) // BLOCK in house.tracked.stored_dirt()
