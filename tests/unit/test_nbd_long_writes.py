"""Long writes, which are done piece by piece as they arrive, whatever comes in between."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd.server.connection import Connection
from tests.helpers.nbd_raw import FLUSH, FUA, READ, WRITE, request, write
from tests.helpers.support import open_files
from tests.helpers.tracked import TrackedDisk, blocks_of
from tests.unit.test_nbd_connection import MIB, Peer, connected

SIZE = 4 * MIB + 333
KIB = 1 << 10
LARGE = 144 * KIB


@pytest.fixture
def image(tmp_path: Path) -> Iterator[FileDevice]:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    with FileDevice.open(path) as image:
        yield image


def feed(peer: Peer, data: bytes, chosen: random.Random) -> None:
    """Send it in pieces of any size, as a network would."""
    while data:
        cut = chosen.choice([1, 20, 28, 100, 5000, LARGE, LARGE + 28, 400 * KIB])
        peer.send(data[:cut])
        data = data[cut:]


@pytest.mark.parametrize("seed", range(6))
def test_writes_of_all_sizes_in_any_order_leave_what_they_should(image: FileDevice, seed: int) -> None:
    """Beside a plain copy of the disk; large and small, with reads and flushes among them, cut anywhere."""
    chosen, truth, sent = random.Random(seed), bytearray(SIZE), []
    stream = b""
    for cookie in range(1, 60):
        length = chosen.choice(
            [1, 512, 4096, 48 * KIB - 1, 48 * KIB, LARGE, LARGE, LARGE, 130 * KIB, MIB + 5]
        )
        offset = chosen.choice(
            [chosen.randrange(SIZE - length), chosen.randrange((SIZE - length) // 4096) * 4096]
        )
        data = chosen.randbytes(length)
        truth[offset : offset + length] = data
        stream += write(offset, data, cookie=cookie, flags=chosen.choice([0, 0, 0, FUA]))
        sent.append(cookie)
        if chosen.random() < 0.1:
            stream += request(FLUSH, cookie=cookie + 1000)
            sent.append(cookie + 1000)
    with connected(PlainDisk(image)) as peer:
        feed(peer, stream, chosen)
        replies = [peer.reply() for _ in sent]
        assert sorted(reply.cookie for reply in replies) == sorted(sent)
        assert {reply.error for reply in replies} == {0}
        assert peer.do(READ, 0, SIZE).data == bytes(truth)
        assert peer.connection.traffic.bytes_received == len(stream) + 28


def test_replies_come_though_the_client_waits_for_them_before_it_sends_more(image: FileDevice) -> None:
    """In the middle of a header, and in the middle of a large write's data."""
    whole = write(0, bytes([1]) * LARGE, cookie=1)
    with connected(PlainDisk(image)) as peer:
        for cut in (10, 28, 28 + 5000):
            peer.send(whole)
            later = write(LARGE, bytes([2]) * LARGE, cookie=2)
            peer.send(later[:cut])
            assert peer.reply().cookie == 1
            peer.send(later[cut:])
            assert peer.reply().cookie == 2


@pytest.mark.parametrize("offset", [SIZE, MIB])
def test_so_they_do_if_the_later_write_is_refused_or_not(image: FileDevice, offset: int) -> None:
    with connected(PlainDisk(image)) as peer:
        later = write(offset, bytes(MIB), cookie=2)
        peer.send(write(0, bytes(MIB), cookie=1) + later[:5000])
        assert peer.reply()[:2] == (1, 0)
        peer.send(later[5000:])
        assert peer.reply().cookie == 2


def test_replies_that_wait_are_sent_to_a_client_that_says_no_more(image: FileDevice) -> None:
    with connected(PlainDisk(image)) as peer:
        peer.send(write(0, bytes(LARGE), cookie=1) + write(LARGE, bytes(LARGE), cookie=2))
        peer.sock.shutdown(socket.SHUT_WR)
        assert [peer.reply().cookie, peer.reply().cookie] == [1, 2]


@pytest.mark.parametrize("sent", [28, 28 + 4000, 28 + LARGE - 1])
def test_client_that_dies_in_the_middle_is_let_go(image: FileDevice, sent: int) -> None:
    with connected(PlainDisk(image)) as peer:
        assert peer.do(WRITE, 0, LARGE, data=bytes(LARGE)).error == 0
        peer.send(write(0, bytes(LARGE))[:sent])
    assert isinstance(peer.outcome, ConnectionResetError)


class WatchedDisk(PlainDisk):
    """Notes where each piece that is written begins and ends."""

    def __init__(self, device: FileDevice) -> None:
        super().__init__(device)
        self.borders: set[int] = set()

    def lane(self) -> PlainLane:
        return WatchedLane(self, self._device)


class WatchedLane(PlainLane):
    def __init__(self, disk: WatchedDisk, device: BlockDevice) -> None:
        super().__init__(device)
        self._disk = disk

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        for offset, data in writes:
            self._disk.borders |= {offset, offset + len(data)}
        return super().write_many(writes)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_write_end_where_pages_do(image: FileDevice, seed: int) -> None:
    """So that a death between two of them tears no sector: the disks that guests know never do."""
    chosen, disk, borders = random.Random(seed), WatchedDisk(image), set[int]()
    with connected(disk) as peer:
        for cookie in range(30):
            length = chosen.choice([LARGE, 300 * KIB, MIB + 512])  # the longest never comes as a whole
            offset = chosen.randrange((SIZE - length) // 512) * 512
            borders |= {offset, offset + length}
            feed(peer, write(offset, bytes(length), cookie=cookie), chosen)
            assert peer.reply().error == 0
    assert {border % 4096 for border in disk.borders - borders} == {0}
    assert len(disk.borders - borders) >= 10


class FailingDisk(PlainDisk):
    """Its lane refuses the first two pieces of long writes."""

    def lane(self) -> PlainLane:
        return FailingLane(self._device)


class FailingLane(PlainLane):
    failures = 2

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        if not self.failures:
            return super().write_many(writes)
        self.failures -= 1
        return dict.fromkeys(range(len(writes)), errno.ENOSPC)


@pytest.mark.parametrize("cut", [28, 28 + 9000, 28 + 200 * KIB])
def test_failed_write_is_told_its_data_is_drained_and_the_next_one_done(image: FileDevice, cut: int) -> None:
    data = random.Random(1).randbytes(MIB)
    with connected(FailingDisk(image)) as peer:
        errors = []
        for cookie in range(2, 6):
            whole = write(MIB, data, cookie=cookie)
            peer.send(whole[:cut])
            peer.send(whole[cut:])
            reply = peer.reply()
            assert reply.cookie == cookie
            errors.append(reply.error)
        assert errors == [errno.ENOSPC, errno.ENOSPC, 0, 0]  # of the rest of a failed one nothing is tried
        assert peer.do(READ, MIB, len(data)).data == data


@pytest.mark.parametrize("length", [LARGE, MIB])
def test_refused_write_is_drained(image: FileDevice, length: int) -> None:
    with connected(PlainDisk(image)) as peer:
        peer.do(WRITE, 0, LARGE, data=bytes(LARGE))
        assert peer.do(WRITE, SIZE - 5, length, data=bytes(length)).error == errno.ENOSPC
        assert peer.do(READ, 0, 5).data == bytes(5)


def test_data_in_crumbs_is_written_too(image: FileDevice) -> None:
    with connected(PlainDisk(image)) as peer:
        data = random.Random(5).randbytes(LARGE)
        peer.send(write(512, data, cookie=2)[:28])
        for number in range(6000):
            peer.send(data[number : number + 1])
        peer.send(data[6000:])
        assert peer.reply()[:2] == (2, 0)
        assert peer.do(READ, 512, LARGE).data == data
        peer.send(write(512, data, cookie=3)[:28])
        for number in range(6000):
            peer.send(data[number : number + 1])
    assert isinstance(peer.outcome, ConnectionResetError)


@pytest.mark.parametrize("seed", range(6))
def test_turns_wait_for_no_data(image: FileDevice, seed: int) -> None:
    """As when one thread serves many: each turn takes what is there and returns, in the middle of a write too."""
    chosen, truth, stream = random.Random(seed), bytearray(SIZE), b""
    for cookie in range(20):
        length = chosen.choice([4096, LARGE, 300 * KIB, MIB + 5])
        offset, data = chosen.randrange(SIZE - length), chosen.randbytes(length)
        truth[offset : offset + length] = data
        stream += write(offset, data, cookie=cookie)
    client, ours = socket.socketpair()
    with client, ours:
        peer = Peer(client)
        connection = Connection(ours, PlainDisk(image), structured=False, contexts={})
        while stream:  # a turn that waited for more of it would wait for ever
            cut = chosen.randrange(1, 20 * KIB)
            peer.send(stream[:cut])
            stream = stream[cut:]
            assert connection.turn()
        assert connection.turn()
        assert [peer.reply()[:2] for _ in range(20)] == [(cookie, 0) for cookie in range(20)]
        peer.send(write(0, bytes(LARGE))[:5000])
        assert connection.turn()
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            connection.turn()
        connection.close()
    assert image.pread(SIZE, 0) == bytes(truth)


def test_nothing_is_left_open(image: FileDevice) -> None:
    before = len(open_files())
    with connected(PlainDisk(image)) as peer:
        assert peer.do(WRITE, 0, MIB, data=bytes(MIB)).error == 0
    assert len(os.listdir("/proc/self/fd")) == before


# --- the laws ---


def test_each_piece_is_dirty_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 1, at the moment of the system call; and what is written afterwards is there."""
    seen: list[bool] = []
    pwrite = os.pwrite
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked, tracked.attach(max_armed=3) as disk:

        def watched(fd: int, data: bytes, offset: int) -> int:
            if fd == disk.fd:
                blocks = disk.disk.geometry.blocks_outward(offset, len(data))
                seen.append(set(blocks) <= tracked.stored_dirt())
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", watched)
        chosen, truth = random.Random(3), bytearray(SIZE)
        with connected(disk) as peer:
            for number in range(40):
                length = chosen.choice([LARGE, LARGE, MIB])
                offset, data = chosen.randrange(SIZE - length), chosen.randbytes(length)
                truth[offset : offset + length] = data
                assert peer.do(WRITE, offset, length, data=data).error == 0
                if number % 10 == 0:
                    disk.checkpoint(f"c{number}")
            assert peer.do(READ, 0, SIZE).data == bytes(truth)
        changed = {
            block for block in range(SIZE // 4096 + 1) if any(truth[block * 4096 : block * 4096 + 4096])
        }
        assert changed <= blocks_of(disk.changes(since="start"))
    assert len(seen) >= 40
    assert all(seen)
