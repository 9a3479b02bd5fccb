"""Large writes by reference, from the socket into the image through a pipe, whatever comes in between."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice, SplicingLane
from lmdbitmap.nbd.server.splicing import new_pipe
from lmdbitmap.system.linux import splice_to_file
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


def no_pipe() -> tuple[int, int]:
    raise OSError(errno.EMFILE, "too many open files")


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


@pytest.mark.parametrize(("pipes", "offset"), [(new_pipe, SIZE), (no_pipe, MIB)])
def test_so_they_do_if_the_data_does_not_go_by_reference(
    image: FileDevice, monkeypatch: pytest.MonkeyPatch, pipes: Callable[[], tuple[int, int]], offset: int
) -> None:
    """Since the write is refused, or since there is no pipe."""
    monkeypatch.setattr("lmdbitmap.nbd.server.splicing.new_pipe", pipes)
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

    def write_from_pipe(self, pipe_fd: int, length: int, offset: int) -> None:
        self._disk.borders |= {offset, offset + length}
        super().write_from_pipe(pipe_fd, length, offset)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_write_end_where_pages_do(image: FileDevice, seed: int) -> None:
    """So that a death between two of them tears no sector: the disks that guests know never do."""
    chosen, disk, borders = random.Random(seed), WatchedDisk(image), set[int]()
    with connected(disk) as peer:
        for cookie in range(30):
            length = chosen.choice([LARGE, LARGE + 512, 300 * KIB])
            offset = chosen.randrange((SIZE - length) // 512) * 512
            borders |= {offset, offset + length}
            feed(peer, write(offset, bytes(length), cookie=cookie), chosen)
            assert peer.reply().error == 0
    assert {border % 4096 for border in disk.borders - borders} == {0}
    assert len(disk.borders - borders) >= 10


class FailingDisk(PlainDisk):
    """Its lane refuses the first few bytes that come by pipe, or takes some of them and then refuses."""

    def lane(self) -> PlainLane:
        return FailingLane(self._device)


class FailingLane(PlainLane):
    failures = 2

    def write_from_pipe(self, pipe_fd: int, length: int, offset: int) -> None:
        if not self.failures:
            super().write_from_pipe(pipe_fd, length, offset)
            return
        self.failures -= 1
        if self.failures:
            super().write_from_pipe(pipe_fd, length // 2, offset)
        raise OSError(errno.ENOSPC, "full")


def test_failed_write_is_told_its_data_is_drained_and_the_next_one_done(image: FileDevice) -> None:
    data = random.Random(1).randbytes(300 * KIB)
    with connected(FailingDisk(image)) as peer:
        peer.do(WRITE, 0, LARGE, data=bytes(LARGE))  # from here on headers are received by themselves
        for cookie in range(2, 8):
            peer.send(write(MIB, data, cookie=cookie))
        errors = {reply.cookie: reply.error for reply in (peer.reply() for _ in range(2, 8))}
        assert sorted(errors.values()) == [0, 0, 0, 0, errno.ENOSPC, errno.ENOSPC]
        assert errors[7] == 0
        assert peer.do(READ, MIB, len(data)).data == data


class RefusingDisk(PlainDisk):
    """The pieces that come by memory fail; those by pipe would not."""

    def lane(self) -> PlainLane:
        return RefusingLane(self._device)


class RefusingLane(PlainLane):
    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        return dict.fromkeys(range(len(writes)), errno.EIO)


def test_first_piece_that_fails_leaves_nothing_for_the_next_write(image: FileDevice) -> None:
    data = random.Random(2).randbytes(MIB)
    with connected(RefusingDisk(image)) as peer:
        whole = write(0, data, cookie=1)
        peer.send(whole[: 28 + 9000])
        peer.send(whole[28 + 9000 :])
        assert peer.reply().error == errno.EIO
        peer.send(write(MIB, data, cookie=2))
        reply = peer.reply()
        assert (reply.cookie, reply.error) == (2, 0)  # its header came alone, and all of its data by the pipe
        assert peer.do(READ, MIB, MIB).data == data


@pytest.mark.parametrize("length", [LARGE, MIB])
def test_refused_write_is_drained(image: FileDevice, length: int) -> None:
    with connected(PlainDisk(image)) as peer:
        peer.do(WRITE, 0, LARGE, data=bytes(LARGE))
        assert peer.do(WRITE, SIZE - 5, length, data=bytes(length)).error == errno.ENOSPC
        assert peer.do(READ, 0, 5).data == bytes(5)


class UnsplicableDisk(PlainDisk):
    """As on a file system that lacks splice."""

    def lane(self) -> PlainLane:
        return UnsplicableLane(self._device)


class UnsplicableLane(PlainLane):
    def write_from_pipe(self, pipe_fd: int, length: int, offset: int) -> None:
        raise OSError(errno.EINVAL, "no splice here")


def test_file_that_cannot_be_spliced_to_is_written_all_the_same(image: FileDevice) -> None:
    chosen, truth = random.Random(4), bytearray(SIZE)
    with connected(UnsplicableDisk(image)) as peer:
        for length in (LARGE, MIB, LARGE, 300 * KIB, 5, LARGE):
            offset, data = chosen.randrange(SIZE - length), chosen.randbytes(length)
            truth[offset : offset + length] = data
            feed(peer, write(offset, data, cookie=7), chosen)
            assert peer.reply()[:2] == (7, 0)
        assert peer.do(READ, 0, SIZE).data == bytes(truth)


class HalfSplicableDisk(PlainDisk):
    """As on a file system that takes whole sectors only."""

    def lane(self) -> PlainLane:
        return HalfSplicableLane(self._device)


class HalfSplicableLane(PlainLane):
    def write_from_pipe(self, pipe_fd: int, length: int, offset: int) -> None:
        super().write_from_pipe(pipe_fd, length // 2, offset)
        raise OSError(errno.EINVAL, "no splice of this")


def test_piece_that_is_spliced_in_part_fails_and_is_not_taken_for_its_rest(image: FileDevice) -> None:
    data = random.Random(7).randbytes(MIB)
    with connected(HalfSplicableDisk(image)) as peer:
        assert peer.do(WRITE, 0, MIB, data=data).error == errno.EINVAL
        written = peer.do(READ, 0, MIB).data
        assert all(new in (0, wanted) for new, wanted in zip(written, data, strict=True))


def test_data_in_crumbs_fills_no_pipe_and_holds_up_no_end(image: FileDevice) -> None:
    """Each of them takes a slot of the pipe; the last page's worth waits there for its end."""
    with connected(PlainDisk(image)) as peer:
        peer.do(WRITE, 0, LARGE, data=bytes(LARGE))
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


def test_process_that_gets_no_pipe_writes_all_the_same(
    image: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdbitmap.nbd.server.splicing.new_pipe", no_pipe)
    data = random.Random(6).randbytes(MIB)
    with connected(PlainDisk(image)) as peer:
        assert peer.do(WRITE, 5, MIB, data=data).error == 0
        assert peer.do(READ, 5, 4096).data == data[:4096]


def test_user_who_gets_no_large_pipe_any_more_has_the_data_copied(
    image: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user of many: the pipes that there are then are so small that a copy is faster."""
    refused: list[int] = []

    def refuse(fd: int, command: int, size: int) -> int:
        refused.append(fd)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    data = random.Random(8).randbytes(2 * MIB)
    with connected(PlainDisk(image)) as peer:
        before = len(open_files())
        monkeypatch.setattr("lmdbitmap.nbd.server.splicing.fcntl.fcntl", refuse)
        assert peer.do(WRITE, 5, len(data), data=data).error == 0
        for _ in range(2):
            assert peer.do(READ, 5, len(data)).data == data
        assert len(refused) == 2  # once to write, once for all that is read
        assert len(open_files()) == before


def test_nothing_is_left_open(image: FileDevice) -> None:
    before = len(open_files())
    with connected(PlainDisk(image)) as peer:
        assert peer.do(WRITE, 0, MIB, data=bytes(MIB)).error == 0
    assert len(os.listdir("/proc/self/fd")) == before


# --- the laws ---


def test_data_by_reference_is_dirty_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 1, at the moment of the system call; and what is written afterwards is there."""
    seen: list[bool] = []
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked, tracked.attach(max_armed=3) as disk:

        def watched(pipe_fd: int, fd: int, length: int, offset: int) -> None:
            seen.append(set(disk.disk.geometry.blocks_outward(offset, length)) <= tracked.stored_dirt())
            splice_to_file(pipe_fd, fd, length, offset)

        monkeypatch.setattr("lmdbitmap.tracker.lane.splice_to_file", watched)
        chosen, truth = random.Random(3), bytearray(SIZE)
        assert isinstance(disk.lane(), SplicingLane)
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


def test_checkpoint_waits_for_data_on_its_way_by_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2: the lane is busy while the pipe is emptied."""
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked, tracked.attach() as disk:
        lane = disk.lane()
        states: list[bool] = []

        def watched(pipe_fd: int, fd: int, length: int, offset: int) -> None:
            states.append(lane.busy)
            splice_to_file(pipe_fd, fd, length, offset)

        monkeypatch.setattr("lmdbitmap.tracker.lane.splice_to_file", watched)
        out, into = os.pipe()
        try:
            for _ in range(2):  # new dirt, then settled
                os.write(into, bytes(4096))
                lane.write_from_pipe(out, 4096, 8192)
                assert not lane.busy
        finally:
            os.close(out)
            os.close(into)
        assert states == [True, True]
        disk.detach()
        with pytest.raises(OSError):
            lane.write_from_pipe(-1, 4096, 8192)
