"""The three forms of requests and replies, and a client that speaks the extended one: what only that can say."""

from __future__ import annotations

import errno
import itertools
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.commands import PIECE_BYTES
from lmdbitmap.nbd.server.contexts import StatusSource, allocation_source
from lmdbitmap.nbd.server.forms import EXTENDED, SIMPLE, STRUCTURED, Form
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    PAYLOAD_LEN,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    extended,
)
from tests.helpers.support import PATIENCE_SECONDS
from tests.unit import test_nbd_connection
from tests.unit.test_nbd_connection import Peer, connected

SIZE = 4 << 20
MIB, GIB = 1 << 20, 1 << 30
COOKIE = bytes(range(8))
LARGEST = 32 * MIB


# --- bytes ---


@pytest.mark.parametrize(
    ("form", "reply"),
    [
        (SIMPLE, "67446698 00000016 0001020304050607"),
        (STRUCTURED, "668e33ef 0001 8001 0001020304050607 00000006 00000016 0000"),
        (EXTENDED, "6e8a278c 0001 8001 0001020304050607 0000000000000200 0000000000000006 00000016 0000"),
    ],
)
def test_a_failed_read_is_told_in_each_form(form: Form, reply: str) -> None:
    assert form.outcome(READ, form.label(COOKIE, 512), errno.EINVAL) == bytes.fromhex(reply)


@pytest.mark.parametrize(
    ("form", "reply"),
    [
        (SIMPLE, "67446698 00000000 0001020304050607"),
        (STRUCTURED, "67446698 00000000 0001020304050607"),
        (EXTENDED, "6e8a278c 0001 0000 0001020304050607 0000000000000200 0000000000000000"),
    ],
)
def test_writes_flushes_and_all_else_that_is_done_is_told_alike(form: Form, reply: str) -> None:
    label, done = form.label(COOKIE, 512), bytes.fromhex(reply)
    assert form.outcome(TRIM, label) == done
    writes = [(512, memoryview(b"x"))]
    assert form.successes([COOKIE], writes, [label]) == done * 2
    assert form.successes([COOKIE] * 3, writes * 3, [label] * 2) == done * 5
    assert form.successes([], [], [label]) == form.successes([COOKIE], writes, []) == done


@pytest.mark.parametrize(
    ("form", "header"),
    [
        (SIMPLE, "67446698 00000000 0001020304050607"),
        (STRUCTURED, "668e33ef 0000 0001 0001020304050607 00001008 0000000000001200"),
        (EXTENDED, "6e8a278c 0000 0001 0001020304050607 0000000000000200 0000000000001008 0000000000001200"),
    ],
)
def test_data_in_the_middle_of_a_read_says_where_it_belongs(form: Form, header: str) -> None:
    told = form.data(form.label(COOKIE, 512), 4608, 4096, done=False)
    assert told == bytes.fromhex(header)
    assert len(told) == form.data_size


@pytest.mark.parametrize("form", [SIMPLE, STRUCTURED, EXTENDED])
def test_the_heads_that_the_loop_knows_are_those_of_requests_without_flags(form: Form) -> None:
    def head(command: int, flags: int) -> int:
        magic = nbd.NBD_EXTENDED_REQUEST_MAGIC if form is EXTENDED else nbd.NBD_REQUEST_MAGIC
        return int.from_bytes(struct.pack(">IHH", magic, flags, command), "big")

    assert form.plain_read == head(READ, 0)
    assert set(form.plain_writes) == {
        head(WRITE, 0),
        *([head(WRITE, PAYLOAD_LEN)] if form is EXTENDED else []),
    }
    assert form.header.size == (32 if form is EXTENDED else 28)


# --- a client of the extended form ---


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(SIZE)


@pytest.fixture
def peer(device: MemoryDevice) -> Iterator[Peer]:
    with connected(PlainDisk(device), form=test_nbd_connection.EXTENDED) as peer:
        yield peer


def headed(command: int, flags: int, offset: int, length: int) -> bytes:
    """A request's header, whatever it says."""
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, 1, offset, length)


@pytest.mark.parametrize("flags", [PAYLOAD_LEN, 0])
@pytest.mark.parametrize("length", [1, 4096, 200_000])
def test_writes_are_understood_with_their_flag_and_without_it_as_qemu_sends_them(
    peer: Peer, device: MemoryDevice, flags: int, length: int
) -> None:
    data = bytes([7]) * length
    for at in (0, 1 << 20, 2 << 20):
        peer.send(headed(WRITE, flags, at, length) + data)
        assert peer.reply().error == 0
        peer.send(headed(WRITE, flags | FUA, at + length, length) + data)
        assert peer.reply().error == 0
        assert device.pread(2 * length + 1, at) == data * 2 + b"\0"


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 99])
@pytest.mark.parametrize("length", [8, 4096, 1 << 20])
def test_a_payload_that_no_command_wants_is_drained_and_refused(
    peer: Peer, device: MemoryDevice, command: int, length: int
) -> None:
    peer.send(headed(command, PAYLOAD_LEN, 0, length) + b"\xff" * length)
    peer.send(headed(WRITE, PAYLOAD_LEN, 0, 4) + b"good")
    assert [peer.reply().error for _ in range(2)] == [errno.EINVAL, 0]
    assert device.pread(8, 0) == b"good" + bytes(4)


@pytest.mark.parametrize(
    ("command", "flags"), [(WRITE, PAYLOAD_LEN), (WRITE, 0), (READ, PAYLOAD_LEN), (DISC, PAYLOAD_LEN)]
)
@pytest.mark.parametrize("length", [LARGEST + 1, 2**32, 2**64 - 1])
def test_more_payload_than_the_largest_costs_the_connection_at_once(
    device: MemoryDevice, command: int, flags: int, length: int
) -> None:
    with connected(PlainDisk(device), form=test_nbd_connection.EXTENDED) as peer:
        peer.send(headed(command, flags, 0, length))
        assert peer.is_closed_by_server()
    assert isinstance(peer.outcome, FormatError)
    assert str(LARGEST) in str(peer.outcome)


def test_the_largest_payload_is_taken(device: MemoryDevice) -> None:
    disk = PlainDisk(MemoryDevice(LARGEST))
    with connected(disk, form=test_nbd_connection.EXTENDED) as peer:
        assert peer.do(WRITE, 0, LARGEST, data=b"\5" * LARGEST).error == 0
        assert peer.do(READ, 0, LARGEST).data == b"\5" * LARGEST
        assert peer.do(READ, 0, LARGEST + 1).error == errno.EINVAL


@pytest.mark.parametrize("lie", [bytes(32), struct.pack(">IHHQQIxxxx", 0x25609513, 0, READ, 1, 0, 1)])
def test_headers_of_another_form_cost_the_connection(device: MemoryDevice, lie: bytes) -> None:
    with connected(PlainDisk(device), form=test_nbd_connection.EXTENDED) as peer:
        peer.send(lie)
        assert peer.is_closed_by_server()
    assert isinstance(peer.outcome, FormatError)


@pytest.mark.parametrize("sent", [1, 31, 32, 33, 4000])
def test_a_client_that_dies_inside_a_request_is_let_go(device: MemoryDevice, sent: int) -> None:
    with connected(PlainDisk(device), form=test_nbd_connection.EXTENDED) as peer:
        peer.send(extended(WRITE, 0, 8000, data=b"\1" * 8000)[:sent])
        peer.sock.close()
    assert peer.outcome is None or isinstance(peer.outcome, ConnectionResetError)
    assert device.pread(SIZE - 8000, 8000) == bytes(SIZE - 8000)


# --- 64 bits of length ---


HUGE = (1 << 43) + 512
"""8 TiB: what ext4 takes of one file, whose blocks are of 4 KiB, and some of it less."""


class NotingDisk(PlainDisk):
    """Notes what its lane is asked to change; an item of `fails` at its turn, `on_call` at each."""

    def __init__(self, device: FileDevice) -> None:
        super().__init__(device)
        self.calls: list[tuple[str, int, int]] = []
        self.fails: dict[int, OSError] = {}
        self.fast_bytes = HUGE
        """From here on nothing is zeroed fast."""
        self.on_call: Callable[[int], None] = lambda number: None

    def lane(self) -> PlainLane:
        return NotingLane(self, self._device)

    def note(self, name: str, offset: int, length: int) -> None:
        self.calls.append((name, offset, length))
        self.on_call(len(self.calls) - 1)
        if len(self.calls) - 1 in self.fails:
            raise self.fails[len(self.calls) - 1]


class NotingLane(PlainLane):
    def __init__(self, disk: NotingDisk, device: BlockDevice) -> None:
        super().__init__(device)
        self._disk = disk

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._disk.note("write_zeroes", offset, length)
        if fast_only and self._disk.fast_bytes <= offset:
            raise OSError(errno.ENOTSUP, "slow here")
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def discard(self, offset: int, length: int) -> None:
        self._disk.note("discard", offset, length)
        super().discard(offset, length)

    def flush(self) -> None:
        self._disk.note("flush", 0, 0)
        super().flush()


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[NotingDisk]:
    path = tmp_path / "huge.raw"
    path.touch()
    with FileDevice.open(path) as device:
        device.resize(HUGE)
        yield NotingDisk(device)


def huge_peer(
    disk: NotingDisk, contexts: Mapping[int, StatusSource] | None = None
) -> AbstractContextManager[Peer]:
    return connected(disk, form=test_nbd_connection.EXTENDED, contexts=contexts)


@pytest.mark.parametrize(("command", "name"), [(WRITE_ZEROES, "write_zeroes"), (TRIM, "discard")])
def test_a_change_of_many_gigabytes_is_done_in_pieces_and_flushed_once(
    huge: NotingDisk, command: int, name: str
) -> None:
    start, stop = 5 * GIB - 512, 14 * GIB + 1024
    with huge_peer(huge) as peer:
        assert peer.do(WRITE, start - 512, 1024, data=b"x" * 1024).error == 0
        assert peer.do(WRITE, stop - 512, 1024, data=b"x" * 1024).error == 0
        assert peer.do(command, start, stop - start, flags=FUA).error == 0
        around = [peer.do(READ, at - 512, 1024).data for at in (start, stop)]
    assert around == [b"x" * 512 + bytes(512), bytes(512) + b"x" * 512]
    pieces = [(offset, offset + length) for called, offset, length in huge.calls if called == name]
    bounds = [start, *range(5 * GIB, stop, PIECE_BYTES), stop]
    assert pieces == list(itertools.pairwise(bounds))
    assert huge.calls[-1] == ("flush", 0, 0)
    assert len(pieces) + 1 == len(huge.calls) == 12


def test_a_piece_that_fails_is_the_last_one_and_fails_the_request(huge: NotingDisk) -> None:
    huge.fails[2] = OSError(errno.ENOSPC, "full")
    with huge_peer(huge) as peer:
        assert peer.do(WRITE_ZEROES, 0, HUGE).error == errno.ENOSPC
        assert len(huge.calls) == 3
        assert peer.do(READ, 0, 16).data == bytes(16)


@pytest.mark.parametrize("command", [WRITE_ZEROES, TRIM])
def test_a_change_of_many_pieces_ends_with_the_one_under_way_when_the_server_stops(
    huge: NotingDisk, command: int
) -> None:
    """It is not answered: whoever connects again asks for it again."""
    with huge_peer(huge) as peer:
        huge.on_call = lambda number: setattr(peer.connection, "stopping", number == 2)
        peer.send(peer.request(command, 0, HUGE, flags=FUA))
        assert peer.is_closed_by_server()
    assert len(huge.calls) == 3


def test_the_last_piece_is_done_and_answered_although_the_server_stops(huge: NotingDisk) -> None:
    with huge_peer(huge) as peer:
        huge.on_call = lambda number: setattr(peer.connection, "stopping", number == 1)
        assert peer.do(WRITE_ZEROES, 0, 2 * GIB, flags=FUA).error == 0
    assert [name for name, *_ in huge.calls] == ["write_zeroes", "write_zeroes", "flush"]


@pytest.mark.parametrize("command", [WRITE_ZEROES, TRIM])
def test_replies_that_are_ready_do_not_wait_for_a_change_of_many_pieces(
    huge: NotingDisk, command: int
) -> None:
    changing, go_on = threading.Event(), threading.Event()

    def hold_up(number: int) -> None:
        changing.set()
        assert go_on.wait(PATIENCE_SECONDS)

    with huge_peer(huge) as peer:
        huge.on_call = hold_up
        peer.send(peer.request(READ, 0, 16, cookie=1) + peer.request(command, 0, 3 * GIB, cookie=2))
        assert changing.wait(PATIENCE_SECONDS)
        try:
            assert peer.reply(16).cookie == 1
        finally:
            go_on.set()
        assert peer.reply().cookie == 2


def test_zeroes_that_have_to_be_fast_are_refused_before_anything_is_zeroed_or_not_at_all(
    huge: NotingDisk,
) -> None:
    huge.fast_bytes = 3 * GIB
    with huge_peer(huge) as peer:
        assert peer.do(WRITE_ZEROES, 512, 5 * GIB, flags=FAST_ZERO).error == 0
        assert len(huge.calls) == 6
        assert peer.do(WRITE_ZEROES, 3 * GIB, 5 * GIB, flags=FAST_ZERO).error == errno.ENOTSUP
        assert len(huge.calls) == 7


def test_one_extent_of_a_status_may_be_as_long_as_the_disk(huge: NotingDisk) -> None:
    with huge_peer(huge, {1: allocation_source(huge), 2: lambda _, length: [(length, 1)]}) as peer:
        assert peer.do(BLOCK_STATUS, 0, HUGE).statuses == {1: [(HUGE, 3)], 2: [(HUGE, 1)]}
        assert peer.do(WRITE, 6 << 40, 4096, data=b"x" * 4096).error == 0
        [extents, _] = peer.do(BLOCK_STATUS, 512, HUGE - 512).statuses.values()
        assert extents == [((6 << 40) - 512, 3), (4096, 0), (HUGE - (6 << 40) - 4096, 3)]
        assert peer.do(BLOCK_STATUS, 512, HUGE).error == errno.EINVAL
        assert peer.do(CACHE, 0, HUGE).error == 0
