"""The transmission phase over a socket pair: every command, every way to fail, and what order is promised."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from lmdbitmap.errors import FormatError, LmdbitmapError, StorageError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice, ServedDisk
from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.contexts import MAX_DESCRIPTORS, StatusSource
from lmdbitmap.nbd.server.replies import MOST_KEPT, Replies
from lmdbitmap.nbd.server.splicing import ReadPipe
from lmdbitmap.nbd.server.traffic import KINDS
from lmdbitmap.nbd.server.trial import Trial
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    request,
    write,
)
from tests.helpers.support import PATIENCE_SECONDS, open_files

SIZE = 4 << 20
MIB = 1 << 20
TOO_LONG_TO_COPY = MOST_KEPT + 1
FORMS = SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"


class Peer(RawClient):
    """The client's end, and how the server's end fared."""

    outcome: Exception | None = None
    connection: Connection

    def serve(self, connection: Connection, sock: socket.socket) -> None:
        self.connection = connection
        try:
            with sock:
                connection.run()
        except (LmdbitmapError, OSError) as error:
            self.outcome = error


@contextlib.contextmanager
def connected(
    disk: ServedDisk,
    *,
    form: str = STRUCTURED,
    contexts: Mapping[int, StatusSource] | None = None,
    received: bytes = b"",
) -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    structured, extended = form != SIMPLE, form == EXTENDED
    connection = Connection(
        ours, disk, structured=structured, extended=extended, contexts=contexts or {}, received=received
    )
    with Peer(theirs, structured=structured, extended=extended) as peer:
        thread = threading.Thread(target=peer.serve, args=(connection, ours))
        thread.start()
        try:
            yield peer
        finally:
            theirs.close()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()


class RecordingDisk(PlainDisk):
    """Notes what its lane is asked to do, in order; `lane_refuses` makes `write_many` fail as a whole."""

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(device)
        self.calls: list[tuple[object, ...]] = []
        self.lane_refuses: Exception | None = None

    def lane(self) -> PlainLane:
        return RecordingLane(self, self._device)


class RecordingLane(PlainLane):
    def __init__(self, disk: RecordingDisk, device: BlockDevice) -> None:
        super().__init__(device)
        self._disk = disk

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        self._disk.calls.append(("write_many", *(offset for offset, _ in writes)))
        if self._disk.lane_refuses is not None:
            raise self._disk.lane_refuses
        return super().write_many(writes)

    def flush(self) -> None:
        self._disk.calls.append(("flush",))
        super().flush()

    def discard(self, offset: int, length: int) -> None:
        self._disk.calls.append(("discard", offset))
        super().discard(offset, length)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._disk.calls.append(("read", offset))
        super().pread_into(buffer, offset)

    def close(self) -> None:
        self._disk.calls.append(("close",))


class DiskOnDescriptor(PlainDisk):
    """As long as a disk can be, whatever its descriptor leads to."""

    size = 1 << 62
    read_only = True
    fd = -1

    def __init__(self, fd: int) -> None:
        super().__init__(MemoryDevice(0))
        self.fd = fd


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(SIZE)


@pytest.fixture(params=FORMS)
def peer(device: MemoryDevice, request: pytest.FixtureRequest) -> Iterator[Peer]:
    with connected(PlainDisk(device), form=request.param) as peer:
        yield peer


def pattern(length: int) -> bytes:
    """Bytes that are nowhere zero and repeat at no power of two."""
    return (bytes(range(1, 252)) * (length // 251 + 1))[:length]


# --- what succeeds ---


@pytest.mark.parametrize("length", [1, 4096, 100_000, MIB, 3 * MIB])
@pytest.mark.parametrize("offset", [0, 12345])
def test_what_was_written_is_read_back(peer: Peer, device: MemoryDevice, offset: int, length: int) -> None:
    data = pattern(length)
    assert peer.do(WRITE, offset, length, data=data).error == 0
    assert device.pread(length, offset) == data
    assert peer.do(READ, offset, length).data == data


def test_the_first_request_may_come_with_the_handshake(device: MemoryDevice) -> None:
    with connected(PlainDisk(device), received=write(0, b"early", cookie=5)[:30]) as peer:
        peer.send(write(0, b"early")[30:])
        assert peer.reply()[:2] == (5, 0)
    assert device.pread(5, 0) == b"early"


def test_trim_write_zeroes_flush_and_cache_are_done_and_answered(peer: Peer, device: MemoryDevice) -> None:
    device.pwrite(b"\xff" * SIZE, 0)
    assert peer.do(TRIM, 0, 4096).error == 0
    assert peer.do(WRITE_ZEROES, 8192, 100, flags=NO_HOLE | FAST_ZERO).error == 0
    assert peer.do(CACHE, 0, SIZE).error == 0
    assert peer.do(FLUSH).error == 0
    assert device.pread(4097, 0) == bytes(4096) + b"\xff"
    assert device.pread(101, 8192) == bytes(100) + b"\xff"


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, FUA])
def test_requests_of_no_bytes_succeed_and_do_nothing(peer: Peer, command: int, flags: int) -> None:
    assert peer.do(command, SIZE, 0, flags=flags).error == 0


def test_a_goodbye_is_answered_by_closing_once_everything_is_answered(peer: Peer) -> None:
    peer.send(peer.request(WRITE, 0, 4, data=b"last", cookie=9) + peer.request(DISC))
    assert peer.reply().cookie == 9
    assert peer.is_closed_by_server()
    assert peer.outcome is None


# --- the order of things ---


def test_all_writes_of_a_batch_reach_the_lane_in_one_call(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    burst = b"".join(write(block * 4096, b"x" * 4096, cookie=block) for block in range(10))
    with connected(disk, received=burst) as peer:
        assert [peer.reply().cookie for _ in range(10)] == list(range(10))
    assert disk.calls == [("write_many", *range(0, 40960, 4096)), ("close",)]


def test_one_flush_after_the_writes_serves_every_fua_and_flush_of_a_batch(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    burst = (
        request(FLUSH, cookie=1)
        + write(0, b"a", cookie=2, flags=FUA)
        + write(1, b"b", cookie=3)
        + write(2, b"c", cookie=4, flags=FUA)
    )
    with connected(disk, received=burst) as peer:
        assert {peer.reply()[:2] for _ in range(4)} == {(1, 0), (2, 0), (3, 0), (4, 0)}
    assert disk.calls == [("write_many", 0, 1, 2), ("flush",), ("close",)]


def test_fua_alone_is_reason_enough_to_flush(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    with connected(disk) as peer:
        assert peer.do(WRITE, 0, 1, flags=FUA, data=b"a").error == 0
    assert disk.calls == [("write_many", 0), ("flush",), ("close",)]


def test_writes_without_fua_are_not_flushed_and_a_trim_with_it_is(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    with connected(disk, received=write(0, b"a") + request(TRIM, 0, 512, flags=FUA)) as peer:
        assert [peer.reply().error for _ in range(2)] == [0, 0]
    assert disk.calls == [("write_many", 0), ("discard", 0), ("flush",), ("close",)]


def test_a_read_behind_a_write_of_the_same_batch_sees_it(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    burst = write(0, b"new", cookie=1) + request(READ, 0, 3, cookie=2) + write(9, b"more", cookie=3)
    with connected(disk, received=burst) as peer:
        replies = [peer.reply(3) if cookie == 2 else peer.reply() for cookie in (1, 3, 2)]
    assert [reply.cookie for reply in replies] == [1, 3, 2]
    assert replies[2].data == b"new"
    assert disk.calls == [("write_many", 0, 9), ("read", 0), ("close",)]


def test_a_request_cut_by_the_end_of_the_buffer_is_put_together(device: MemoryDevice) -> None:
    burst = b"".join(write(block * 4096, bytes([block]) * 4096, cookie=block) for block in range(200))
    at_hand = 512 << 10
    with connected(PlainDisk(device), received=burst[:at_hand]) as peer:
        peer.send(burst[at_hand:])
        assert [peer.reply()[:2] for _ in range(200)] == [(block, 0) for block in range(200)]
    assert device.pread(200 * 4096, 0) == b"".join(bytes([block]) * 4096 for block in range(200))


def test_a_long_write_is_done_in_aligned_pieces_and_flushed_once(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    with connected(disk) as peer:
        assert peer.do(WRITE, 100_000, MIB, flags=FUA, data=pattern(MIB)).error == 0
    [first, *others] = [call[1] for call in disk.calls if call[0] == "write_many"]
    assert first == 100_000
    assert {offset % 65536 for offset in others if isinstance(offset, int)} == {0}
    assert disk.calls[-2:] == [("flush",), ("close",)]
    assert disk.calls.count(("flush",)) == 1
    assert device.pread(MIB, 100_000) == pattern(MIB)


@pytest.mark.parametrize(
    ("fails", "flags", "error", "flushes"),
    [
        (None, 0, 0, 0),
        ("flush", FUA, errno.EIO, 1),
        ("pwrite", FUA, errno.EIO, 0),
    ],
)
def test_a_long_write_is_flushed_if_asked_and_done_and_fails_with_its_flush(
    device: MemoryDevice, fails: str | None, flags: int, error: int, flushes: int
) -> None:
    disk = RecordingDisk(device)
    if fails is not None:
        device.fail_next[fails] = errno.EIO
    with connected(disk) as peer:
        assert peer.do(WRITE, 0, MIB, flags=flags, data=bytes(MIB)).error == error
    assert disk.calls.count(("flush",)) == flushes


def test_a_long_write_that_failed_tells_its_own_error_and_changes_nothing_more(device: MemoryDevice) -> None:
    disk = RecordingDisk(device)
    device.fail_next["pwrite"] = errno.ENOSPC
    with connected(disk) as peer:
        assert peer.do(WRITE, 0, MIB, flags=FUA, data=pattern(MIB)).error == errno.ENOSPC
    assert [call[0] for call in disk.calls] == ["write_many", "close"]
    assert device.pread(MIB, 0) == bytes(MIB)


# --- what fails costs its own request ---


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
def test_requests_past_the_end_fail_and_change_nothing(
    peer: Peer, device: MemoryDevice, command: int
) -> None:
    data = b"x" * 100 if command == WRITE else b""
    refusal = errno.ENOSPC if command in (WRITE, WRITE_ZEROES) else errno.EINVAL
    assert peer.do(command, SIZE - 99, 100, data=data).error == refusal
    assert device.pread(SIZE, 0) == bytes(SIZE)
    assert peer.do(FLUSH).error == 0


@pytest.mark.parametrize("length", [100, MIB, 40 * MIB])
def test_a_refused_write_is_drained_and_the_next_request_understood(peer: Peer, length: int) -> None:
    if peer.extended and length > 32 * MIB:
        return  # which may be 64 bits long, and costs the connection: test_nbd_forms.py
    reply = peer.do(WRITE, SIZE - 50, length, data=bytes(length))
    assert reply.error == (errno.ENOSPC if length <= 32 * MIB else errno.EINVAL)
    assert peer.do(READ, 0, 16).data == bytes(16)


@pytest.mark.parametrize(("command", "flags"), [(99, 0), (READ, NO_HOLE), (WRITE, REQ_ONE), (TRIM, 1 << 9)])
def test_unknown_commands_and_flags_are_invalid(peer: Peer, command: int, flags: int) -> None:
    data = b"payload" if command == WRITE else b""
    assert peer.do(command, 0, 7, flags=flags, data=data).error == errno.EINVAL
    assert peer.do(FLUSH).error == 0


def test_a_read_only_disk_refuses_changes_and_serves_the_rest() -> None:
    with connected(PlainDisk(MemoryDevice(SIZE, read_only=True))) as peer:
        assert peer.do(WRITE, 0, 4, data=b"oops").error == errno.EPERM
        assert peer.do(WRITE, 0, MIB, data=bytes(MIB)).error == errno.EPERM
        assert peer.do(TRIM, 0, 4).error == peer.do(WRITE_ZEROES, 0, 4).error == errno.EPERM
        assert peer.do(READ, 0, 4).data == bytes(4)
        assert peer.do(FLUSH).error == 0


def test_a_refused_request_never_reaches_the_lane() -> None:
    disk = RecordingDisk(MemoryDevice(SIZE, read_only=True))
    with connected(disk) as peer:
        peer.do(WRITE, 0, 1, data=b"x")
        peer.do(WRITE, 0, MIB, data=bytes(MIB))
        peer.do(TRIM, 0, 1)
        peer.do(READ, SIZE, 1)
        peer.do(READ, 0, 33 * MIB)
    assert disk.calls == [("close",)]


@pytest.mark.parametrize(
    ("method", "command", "length"),
    [
        ("pread_into", READ, 4096),
        ("pread_into", READ, MIB),
        ("pwrite", WRITE, 4096),
        ("pwrite", WRITE, MIB),
        ("discard", TRIM, 4096),
        ("write_zeroes", WRITE_ZEROES, 4096),
        ("flush", FLUSH, 0),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ENODEV])
def test_a_failing_disk_is_told_as_the_protocol_can(
    peer: Peer, device: MemoryDevice, method: str, command: int, length: int, number: int
) -> None:
    device.fail_next[method] = number
    data = bytes(length) if command == WRITE else b""
    told = errno.EIO if number == errno.ENODEV else number
    assert peer.do(command, 0, length, data=data).error == told
    assert device.fail_next == {}
    assert peer.do(command, 0, length, data=data).error == 0


def test_one_failing_write_of_a_batch_fails_alone(peer: Peer, device: MemoryDevice) -> None:
    device.fail_next["pwrite"] = errno.ENOSPC
    peer.send(b"".join(peer.request(WRITE, at, 1, data=b"x", cookie=at) for at in range(3)))
    replies = [peer.reply() for _ in range(3)]
    assert [reply[:2] for reply in replies] == [(0, errno.ENOSPC), (1, 0), (2, 0)]
    assert [reply.offset for reply in replies] == ([0, 1, 2] if peer.extended else [None] * 3)


def test_a_failing_flush_fails_those_who_asked_for_it(peer: Peer, device: MemoryDevice) -> None:
    device.fail_next["flush"] = errno.EIO
    peer.send(
        peer.request(WRITE, 0, 1, data=b"x", cookie=1)
        + peer.request(WRITE, 1, 1, data=b"x", cookie=2, flags=FUA)
        + peer.request(FLUSH, 7, cookie=3)
    )
    replies = [peer.reply() for _ in range(3)]
    assert [reply[:2] for reply in replies] == [(1, 0), (2, errno.EIO), (3, errno.EIO)]
    assert [reply.offset for reply in replies] == ([0, 1, 7] if peer.extended else [None] * 3)


class StarvingDevice(MemoryDevice):
    """Nothing that it is asked for finds any memory."""

    def _doing(self, *operation: object, **more: object) -> NoReturn:
        raise MemoryError


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, WRITE_ZEROES, FLUSH])
@pytest.mark.parametrize("length", [4096, MIB, 3 * MIB])
@pytest.mark.parametrize("form", FORMS)
def test_want_of_memory_costs_its_own_request(form: str, length: int, command: int) -> None:
    """A guest whose connection is lost has lost its disk."""
    data = bytes(length) if command == WRITE else b""
    with connected(PlainDisk(StarvingDevice(SIZE)), form=form) as peer:
        assert peer.do(command, 0, length, data=data).error == errno.ENOMEM
        assert peer.do(CACHE, 0, 4096).error == 0
    assert peer.outcome is None


@pytest.mark.parametrize("form", FORMS)
def test_a_read_for_which_there_is_no_buffer_costs_its_own_request(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def refuse(length: int) -> bytearray:
        raise MemoryError

    with connected(PlainDisk(MemoryDevice(SIZE)), form=form) as peer:
        monkeypatch.setattr("lmdbitmap.nbd.server.replies.new_buffer", refuse)
        assert peer.do(READ, 0, MIB).error == errno.ENOMEM
        assert peer.do(READ, 0, 512).data == bytes(512)


@pytest.mark.parametrize("length", [1, MIB])
@pytest.mark.parametrize("form", FORMS)
def test_a_lane_that_refuses_as_a_whole_fails_every_write(
    device: MemoryDevice, form: str, length: int
) -> None:
    disk = RecordingDisk(device)
    disk.lane_refuses = StorageError("store", OSError(errno.ENOSPC, "full"), next_step="free some space")
    with connected(disk, form=form) as peer:
        assert peer.do(WRITE, 0, length, data=bytes(length)).error == errno.ENOSPC


# --- block status ---


def status(*extents: tuple[int, int]) -> StatusSource:
    return lambda offset, length: iter(extents)


def failing(offset: int, length: int) -> Iterable[tuple[int, int]]:
    yield 4096, 1
    raise OSError(errno.EIO, "the map is gone")


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_selected_context_answers_clipped_to_the_request(device: MemoryDevice, form: str) -> None:
    contexts = {7: status((100, 1), (0, 5), (1 << 40, 0)), 9: status((4096, 3))}
    with connected(PlainDisk(device), contexts=contexts, form=form) as peer:
        reply = peer.do(BLOCK_STATUS, 0, 4096)
    assert reply.statuses == {7: [(100, 1), (3996, 0)], 9: [(4096, 3)]}
    assert reply.chunks == 2


def test_req_one_is_one_extent_within_the_request(device: MemoryDevice) -> None:
    with connected(PlainDisk(device), contexts={1: status((8192, 1), (8192, 0))}) as peer:
        assert peer.do(BLOCK_STATUS, 0, 100, flags=REQ_ONE).statuses == {1: [(100, 1)]}
        assert peer.do(BLOCK_STATUS, 0, 16384, flags=REQ_ONE).statuses == {1: [(8192, 1)]}


def test_a_status_reply_ends_at_its_limit_of_extents(device: MemoryDevice) -> None:
    def endless(offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((1, index % 2) for index in range(length))

    with connected(PlainDisk(device), contexts={1: endless}) as peer:
        [extents] = peer.do(BLOCK_STATUS, 0, SIZE).statuses.values()
    assert len(extents) == MAX_DESCRIPTORS == 131072
    assert extents[:2] == [(1, 0), (1, 1)]


@pytest.mark.parametrize("source", [failing, status()])
@pytest.mark.parametrize("form", FORMS[1:])
def test_a_context_that_fails_is_an_error_and_never_a_status(
    device: MemoryDevice, source: StatusSource, form: str
) -> None:
    contexts = {1: status((SIZE, 1)), 2: source}
    with connected(PlainDisk(device), contexts=contexts, form=form) as peer:
        reply = peer.do(BLOCK_STATUS, 0, SIZE)
        assert (reply.error, reply.statuses) == (errno.EIO, {})
        assert peer.do(FLUSH).error == 0


def test_status_without_a_context_or_of_no_bytes_is_invalid(peer: Peer) -> None:
    assert peer.do(BLOCK_STATUS, 0, 4096).error == errno.EINVAL
    with connected(PlainDisk(MemoryDevice(SIZE)), contexts={1: status((SIZE, 0))}) as other:
        assert other.do(BLOCK_STATUS, 0, 0).error == errno.EINVAL
        assert other.do(BLOCK_STATUS, SIZE - 1, 2).error == errno.EINVAL


# --- reads that travel by reference, or are copied ---


@pytest.fixture
def image(tmp_path: Path) -> Iterator[FileDevice]:
    path = tmp_path / "disk.raw"
    path.write_bytes(pattern(SIZE))
    with FileDevice.open(path) as image:
        yield image


@pytest.fixture(params=["by reference", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that long reads go."""
    preferred = property(lambda _: request.param == "by reference", lambda *_: None)
    monkeypatch.setattr(Trial, "prefers_first", preferred, raising=False)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 32768, MIB, MIB + 1, SIZE - 777])
@pytest.mark.parametrize("flags", [0, DF])
def test_reads_of_a_file_of_any_length_are_right(
    image: FileDevice, form: str, length: int, flags: int
) -> None:
    with connected(PlainDisk(image), form=form) as peer:
        reply = peer.do(READ, 777, length, flags=flags if peer.structured else 0)
    assert reply.data == pattern(SIZE)[777 : 777 + length]
    assert reply.chunks == 1 or not (flags and peer.structured)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [4096, MIB, TOO_LONG_TO_COPY])
def test_a_file_cut_behind_our_back_fails_the_read_and_nothing_else(
    image: FileDevice, tmp_path: Path, form: str, length: int
) -> None:
    os.truncate(tmp_path / "disk.raw", MIB)
    with connected(PlainDisk(image), form=form) as peer:
        assert peer.do(READ, 2 * MIB, length).error == errno.EIO
        assert peer.do(READ, 0, 16).data == pattern(16)


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_file_cut_in_the_middle_of_a_long_read_is_an_error_behind_the_data(
    image: FileDevice, tmp_path: Path, form: str
) -> None:
    os.truncate(tmp_path / "disk.raw", MIB)
    with connected(PlainDisk(image), form=form) as peer:
        assert peer.do(READ, 0, 2 * MIB).error == errno.EIO
        assert peer.do(READ, 0, 16).data == pattern(16)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [32 << 10, 128 << 10, MIB - 4096, MIB])
def test_so_it_is_in_any_form_of_a_read_that_can_be_copied(
    image: FileDevice, tmp_path: Path, form: str, length: int
) -> None:
    """A simple reply has no room for an error behind its data: it must not have begun."""
    os.truncate(tmp_path / "disk.raw", MIB)
    with connected(PlainDisk(image), form=form) as peer:
        for _ in range(2):
            assert peer.do(READ, MIB - length + 7000, length).error == errno.EIO
            assert peer.do(READ, MIB - length, length).data == pattern(MIB)[MIB - length :]


def test_a_connection_leaves_no_descriptor_behind(image: FileDevice) -> None:
    def descriptors() -> list[str]:
        return os.listdir("/proc/self/fd")

    before = len(open_files())
    with connected(PlainDisk(image)) as peer:
        assert peer.do(READ, 0, TOO_LONG_TO_COPY).error == 0
        assert len(descriptors()) == before + 4  # two ends of the socket, two of the pipe
    assert len(descriptors()) == before


def test_a_simple_read_that_fails_after_its_reply_began_costs_the_connection(
    image: FileDevice, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "disk.raw", MIB)
    with connected(PlainDisk(image), form=SIMPLE) as peer:
        peer.send(request(READ, 0, 2 * MIB))
        with pytest.raises(EOFError):
            peer.reply(2 * MIB)
    assert isinstance(peer.outcome, OSError)
    assert peer.outcome.errno == errno.EIO


def test_long_reads_of_a_file_that_cannot_travel_by_reference_are_copied() -> None:
    """A process's memory is such a file: its addresses are the offsets."""
    length = TOO_LONG_TO_COPY
    content = ctypes.create_string_buffer(pattern(length), length)
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with connected(DiskOnDescriptor(fd)) as peer:
            before = len(open_files())
            for _ in range(2):
                assert peer.do(READ, ctypes.addressof(content), length).data == pattern(length)
                assert len(open_files()) == before  # the pipe is of no use any more
    finally:
        os.close(fd)


def test_long_reads_try_both_ways_and_are_right_in_either(
    image: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which what is sent by reference takes longest: most of them are copied in the end."""
    ways: list[bool] = []
    send = Replies._send_by_reference

    def noted(replies: Replies, pipe: ReadPipe, label: bytes, offset: int, length: int) -> None:
        ways.append(True)
        send(replies, pipe, label, offset, length)

    monkeypatch.setattr(Replies, "_send_by_reference", noted)
    monkeypatch.setattr("lmdbitmap.nbd.server.trial.WINDOW_BYTES", MIB)
    clock = itertools.accumulate(itertools.cycle([1.0, 9.0]))
    monkeypatch.setattr("lmdbitmap.nbd.server.replies.Trial", lambda: Trial(lambda: next(clock)))
    with connected(PlainDisk(image)) as peer:
        for _ in range(40 + 6):
            assert peer.do(READ, 777, MIB).data == pattern(SIZE)[777 : 777 + MIB]
        assert len(ways) == 3
        assert peer.do(READ, 777, TOO_LONG_TO_COPY).error == 0
    assert len(ways) == 4  # of what is too long there is no choice


@pytest.mark.usefixtures("way")
def test_bytes_sent_are_counted_whichever_way_they_go(image: FileDevice) -> None:
    lengths = [1, 32768, MIB, MIB + 1, SIZE]
    with connected(PlainDisk(image), form=SIMPLE) as peer:
        for length in lengths:
            assert peer.do(READ, 0, length).data == pattern(SIZE)[:length]
    assert peer.connection.traffic.bytes_sent == sum(16 + length for length in lengths)


def test_what_the_kernel_moves_in_part_is_sent_as_a_whole(
    image: FileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = os.splice

    def less(source: int, target: int, length: int, **places: int) -> int:
        return splice(source, target, min(length, 200_000 if places else 50_000), **places)

    monkeypatch.setattr(os, "splice", less)
    with connected(PlainDisk(image)) as peer:
        assert peer.do(READ, 777, 300_000).data == pattern(SIZE)[777:300_777]


@pytest.mark.parametrize("lack", ["no pipe", "no large pipe"])
def test_user_who_gets_no_pipe_has_the_data_copied(
    image: FileDevice, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    """A user of many gets only pipes that are so small that a copy is faster."""
    refused: list[object] = []

    def refuse(*asked: object) -> NoReturn:
        refused.append(asked)
        raise OSError(
            *((errno.EPERM, "too many") if lack == "no large pipe" else (errno.EMFILE, "none left"))
        )

    what = "os.pipe2" if lack == "no pipe" else "fcntl.fcntl"
    with connected(PlainDisk(image)) as peer:
        before = len(open_files())
        monkeypatch.setattr(f"lmdbitmap.nbd.server.splicing.{what}", refuse)
        for length in (MIB, TOO_LONG_TO_COPY):
            assert peer.do(READ, 5, length).data == pattern(SIZE)[5 : 5 + length]
        assert len(open_files()) == before
    assert len(refused) == (2 if lack == "no pipe" else 1)  # of descriptors there may be some again


# --- what costs the connection ---


@pytest.mark.parametrize("lie", [bytes(28), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff" * 4096])
def test_bytes_that_are_no_request_cost_the_connection_after_the_good_ones_are_done(
    device: MemoryDevice, lie: bytes
) -> None:
    with connected(PlainDisk(device)) as peer:
        assert peer.do(WRITE, 0, 4, data=b"good").error == 0
        peer.send(lie)
        assert peer.is_closed_by_server()
    assert isinstance(peer.outcome, FormatError)
    assert device.pread(4, 0) == b"good"


@pytest.mark.parametrize("sent", [1, 27, 28, 29, 4000, 300_000])
def test_a_client_that_dies_in_the_middle_of_a_write_is_let_go(device: MemoryDevice, sent: int) -> None:
    with connected(PlainDisk(device)) as peer:
        peer.send(write(0, pattern(MIB))[:sent])
        peer.sock.close()
    assert peer.outcome is None or isinstance(peer.outcome, ConnectionResetError)
    assert device.pread(SIZE - MIB, MIB) == bytes(SIZE - MIB)


def test_counters_tell_what_was_answered_and_carried(device: MemoryDevice) -> None:
    with connected(PlainDisk(device)) as peer:
        peer.do(WRITE, 0, 1000, data=bytes(1000))
        peer.do(READ, 0, 100)
        peer.do(READ, 0, TOO_LONG_TO_COPY)
        peer.do(TRIM, SIZE, 1)
        peer.do(WRITE_ZEROES, 0, 1)
        peer.do(FLUSH)
        peer.do(BLOCK_STATUS, 0, SIZE)
        peer.do(CACHE, 0, 1)
    traffic = peer.connection.traffic
    counted = dict(zip(KINDS, traffic.counts, strict=True))
    assert counted == {"reads": 2, "writes": 1, "zeroes": 2, "flushes": 1, "block_status": 1, "other": 1}
    assert (traffic.connections, traffic.requests) == (1, 8)
    assert traffic.bytes_received == 8 * 28 + 1000
    assert traffic.bytes_sent > 2 * 28 + 100 + TOO_LONG_TO_COPY
    assert sum(traffic.flushes.counts) == 1


def test_what_came_before_a_change_that_the_stop_cuts_short_is_answered(
    device: MemoryDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done. A change need not be long to have a boundary between two pieces in it."""
    monkeypatch.setattr("lmdbitmap.nbd.server.commands.PIECE_BYTES", MIB)

    def stop(*_: object) -> None:
        client.connection.stopping = True

    monkeypatch.setattr(PlainLane, "discard", stop)
    with connected(PlainDisk(device), form=SIMPLE) as client:
        client.send(write(0, b"done", cookie=1) + request(TRIM, MIB // 2, MIB, cookie=2))
        assert client.peek_cookie() == 1
        client.receive(16)
        assert client.is_closed_by_server()


def test_a_long_write_is_one_request(device: MemoryDevice) -> None:
    with connected(PlainDisk(device)) as peer:
        peer.do(WRITE, 0, MIB, data=bytes(MIB))
    assert peer.connection.traffic.counts[:2] == (0, 1)


def test_one_batch_in_sixteen_is_timed(device: MemoryDevice) -> None:
    with connected(PlainDisk(device)) as peer:
        for _ in range(40):
            peer.do(READ, 0, 1)
    traffic = peer.connection.traffic
    assert traffic.counts[:2] == (40, 0)
    assert sum(traffic.batches.counts) == 3


def test_one_turn_in_sixteen_is_timed_too(device: MemoryDevice) -> None:
    """A connection that shares its thread with others is served by turns."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        contextlib.closing(Connection(ours, PlainDisk(device), structured=False, contexts={})) as connection,
    ):
        for number in range(33):
            theirs.sendall(request(READ, 0, 1, cookie=number))
            assert connection.turn()
            assert len(theirs.recv(1000)) == 16 + 1
        assert sum(connection.traffic.batches.counts) == 3
