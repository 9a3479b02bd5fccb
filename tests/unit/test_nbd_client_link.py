"""The NBD client with extended headers: what it sends, what it believes, and a server that changes its mind."""

from __future__ import annotations

import errno
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdbitmap.interfaces import Allocation
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.client.link import Request
from tests.helpers.nbd_far import (
    CONTEXT_ID,
    EIO,
    TRIM,
    WRITE_ZEROES,
    Asked,
    FarServer,
    HangUp,
    chunk,
    extended_chunk,
    far_server,
    simple,
)
from tests.helpers.nbd_raw import BLOCK_STATUS, FUA, READ, WRITE
from tests.helpers.support import PATIENCE_SECONDS

GIB = 1 << 30
SIZE = 64 << 10
HUGE = 24 * GIB + 512
PATTERN = bytes(range(1, 256)) * 300


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    with far_server(tmp_path, SIZE) as server:
        server.extended = True
        yield server


def opened(far: FarServer) -> NbdDevice:
    return NbdDevice.open(far.uri, reconnect_s=PATIENCE_SECONDS)


def once(behave: Callable[[Asked], bytes], command: int) -> Callable[[FarServer, Asked], bytes | None]:
    """Behave oddly for the first request of that kind, and honestly from then on."""
    done: list[Asked] = []

    def first(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command != command or done:
            return None
        done.append(asked)
        return behave(asked)

    return first


def test_all_that_a_device_does_is_done_with_extended_headers(far: FarServer) -> None:
    far.statuses = [(SIZE, 0)]
    with opened(far) as device:
        device.pwrite(PATTERN[:5000], 3)
        assert device.pread(5000, 3) == PATTERN[:5000]
        device.write_zeroes(100, 200)
        device.discard(4000, 100)
        device.flush()
        assert list(device.allocation(7, 1000)) == [Allocation(1000, hole=False, zero=False)]
    assert (
        far.stable[:5003]
        == b"\0\0\0" + PATTERN[:97] + bytes(200) + PATTERN[297:3997] + bytes(100) + PATTERN[4097:5000]
    )
    assert (far.handshakes, far.commands()) == (1, [WRITE, READ, WRITE_ZEROES, TRIM, 3, BLOCK_STATUS])


def test_pieces_of_a_read_may_come_in_any_order_and_as_holes(far: FarServer) -> None:
    def reply(asked: Asked) -> bytes:
        return (
            extended_chunk(asked, 1, struct.pack(">Q", 600) + b"c" * 100, done=False)
            + extended_chunk(asked, 2, struct.pack(">QI", 200, 400), done=False)
            + extended_chunk(asked, 1, struct.pack(">Q", 100) + b"a" * 100, done=False)
            + extended_chunk(asked, 0)
        )

    far.behave = once(reply, READ)
    with opened(far) as device:
        assert device.pread(600, 100) == b"a" * 100 + bytes(400) + b"c" * 100
    assert far.handshakes == 1


def headed(
    asked: Asked, *, magic: int = 0x6E8A278C, cookie: int = 0, offset: int = 0, length: int = 0
) -> bytes:
    """The header of an only chunk, without what follows."""
    return struct.pack(">IHHQQQ", magic, 1, 1, asked.cookie + cookie, asked.offset + offset, length)


LIES: dict[str, tuple[int, Callable[[Asked], bytes]]] = {
    "no magic": (READ, lambda asked: bytes(40)),
    "simple": (WRITE, lambda asked: simple(asked.cookie) + bytes(16)),
    "structured": (READ, lambda asked: chunk(asked.cookie, 1, struct.pack(">Q", asked.offset) + b"!" * 100)),
    "wrong cookie": (READ, lambda asked: headed(asked, cookie=1)),
    "wrong offset": (WRITE, lambda asked: extended_chunk(asked._replace(offset=asked.offset + 1), 0)),
    "64 bits of data": (READ, lambda asked: headed(asked, length=2**64 - 1)),
    "more than was asked for": (READ, lambda asked: headed(asked, length=8 + 101)),
    "nothing is all": (READ, lambda asked: extended_chunk(asked, 0)),
    "endless error": (READ, lambda asked: extended_chunk(asked, 0x8001)[:-8] + struct.pack(">Q", 2**32)),
    "error 0": (WRITE, lambda asked: extended_chunk(asked, 0x8001, bytes(6))),
    "data for a write": (WRITE, lambda asked: extended_chunk(asked, 1, bytes(108))),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lie_costs_the_connection_and_not_the_request(far: FarServer, lie: str) -> None:
    command, reply = LIES[lie]
    far.data[:] = PATTERN[:SIZE]
    far.behave = once(reply, command)
    with opened(far) as device:
        device.pwrite(b"written", 0)
        assert device.pread(100, 1000) == PATTERN[1000:1100]
    assert far.handshakes == 2
    assert far.data[:7] == b"written"


def status(
    asked: Asked, *numbers: int, count: int | None = None, context: int = CONTEXT_ID, kind: int = 6
) -> bytes:
    told = len(numbers) // 2 if count is None else count
    return extended_chunk(asked, kind, struct.pack(f">II{len(numbers)}Q", context, told, *numbers))


STATUS_LIES: dict[str, Callable[[Asked], bytes]] = {
    "none": lambda asked: extended_chunk(asked, 0),
    "no descriptor": lambda asked: status(asked),
    "half a descriptor": lambda asked: status(asked, 5),
    "fewer than it says": lambda asked: status(asked, SIZE, 3, count=2),
    "more than it says": lambda asked: status(asked, 1, 3, SIZE - 1, 3, count=1),
    "an empty extent": lambda asked: status(asked, 0, 3),
    "another context": lambda asked: status(asked, SIZE, 3, context=CONTEXT_ID + 1),
    "of 32 bits": lambda asked: extended_chunk(asked, 5, struct.pack(">III", CONTEXT_ID, SIZE, 3)),
    "too long": lambda asked: extended_chunk(asked, 6)[:-8] + struct.pack(">Q", 8 + 16 * (1 << 20) + 16),
    "64 bits": lambda asked: extended_chunk(asked, 6)[:-8] + struct.pack(">Q", 2**64 - 8),
}


@pytest.mark.parametrize("lie", STATUS_LIES)
def test_lie_about_allocation_costs_the_connection(far: FarServer, lie: str) -> None:
    far.statuses = [(SIZE, 3)]
    far.behave = once(STATUS_LIES[lie], BLOCK_STATUS)
    with opened(far) as device:
        assert list(device.allocation(0, SIZE)) == [Allocation(SIZE, hole=True, zero=True)]
    assert far.handshakes == 2


def test_wide_statuses_that_were_not_agreed_on_cost_the_connection(far: FarServer) -> None:
    far.extended = False
    far.statuses = [(SIZE, 3)]
    wide = struct.pack(">IIQQ", CONTEXT_ID, 1, SIZE, 3)
    far.behave = once(lambda asked: chunk(asked.cookie, 6, wide), BLOCK_STATUS)
    with opened(far) as device:
        assert list(device.allocation(0, SIZE)) == [Allocation(SIZE, hole=True, zero=True)]
    assert far.handshakes == 2


@pytest.mark.parametrize("is_extended", [True, False])
def test_of_a_longer_answer_than_there_is_room_for_the_beginning_counts(
    far: FarServer, is_extended: bool
) -> None:
    far.statuses, far.extended = [(512, 0), (512, 3), (SIZE - 1024, 0)], is_extended
    with opened(far) as device:
        request = Request(BLOCK_STATUS, 0, SIZE, most_extents=2)
        device._conversation.do([request])
        assert list(request.extents()) == [(512, 0), (512, 3)]


# --- 64 bits of length ---


@pytest.mark.parametrize(("is_extended", "most"), [(True, HUGE), (False, GIB)])
def test_allocation_of_a_huge_disk_is_asked_for_at_once(far: FarServer, is_extended: bool, most: int) -> None:
    far.size, far.extended = HUGE, is_extended

    def answer(server: FarServer, asked: Asked) -> bytes:
        return server.status_reply(asked, [(asked.length, 3)])

    far.statuses, far.behave = [(HUGE, 3)], answer
    with opened(far) as device:
        assert list(device.allocation(0, HUGE)) == [Allocation(HUGE, hole=True, zero=True)]
    assert len(far.asked) == -(-HUGE // most)
    assert max(asked.length for asked in far.asked) == most


def test_zeroes_and_discards_stay_short_enough_to_be_answered_soon(far: FarServer) -> None:
    far.size = HUGE
    far.behave = lambda server, asked: extended_chunk(asked, 0)
    with opened(far) as device:
        device.write_zeroes(0, 4 * GIB + 512)
        device.discard(8 * GIB, 5 * GIB)
    assert [asked.command for asked in far.asked] == [WRITE_ZEROES] * 5 + [TRIM] * 5
    assert sum(asked.length for asked in far.asked) == 9 * GIB + 512
    assert max(asked.length for asked in far.asked) == GIB


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_server_that_comes_back_may_know_extended_headers_no_more_or_from_now_on(
    far: FarServer, before: bool, after: bool
) -> None:
    """A question that is longer than compact headers can say becomes a shorter one."""
    far.size, far.extended = HUGE, before

    def answer(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command != BLOCK_STATUS:
            return None
        if server.handshakes == 1:
            server.extended = after
            raise HangUp
        return server.status_reply(asked, [(asked.length, 3)])

    far.statuses, far.behave = [(HUGE, 3)], answer
    with opened(far) as device:
        device.pwrite(b"kept", 0)
        assert list(device.allocation(0, HUGE)) == [Allocation(HUGE, hole=True, zero=True)]
        device.flush()
    assert far.handshakes == 2
    assert far.stable[:4] == b"kept"
    assert max(asked.length for asked in far.asked[3:]) < 1 << 32


def test_error_of_the_server_is_the_callers(far: FarServer) -> None:
    far.behave = once(lambda asked: far.error_reply(asked, EIO), READ)
    with opened(far) as device:
        with pytest.raises(OSError) as refused:
            device.pread(1, 0)
        assert refused.value.errno == errno.EIO
        assert device.pread(1, 0) == b"\0"
    assert far.handshakes == 1


def test_a_server_that_only_writes_through_is_told_so_with_each_write(far: FarServer) -> None:
    far.flags &= ~4
    with opened(far) as device:
        device.pwrite(b"x", 0)
    assert [(asked.command, asked.flags) for asked in far.asked] == [(WRITE, FUA)]


def test_no_memory_is_taken_for_a_hole_that_is_larger_than_what_was_asked_for(far: FarServer) -> None:
    def four_gibibytes(asked: Asked) -> bytes:
        return extended_chunk(asked, 2, struct.pack(">QI", asked.offset, (1 << 32) - 1))

    far.behave = once(four_gibibytes, READ)
    with opened(far) as device:
        tracemalloc.start()
        try:
            assert device.pread(4096, 0) == bytes(4096)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
    assert far.handshakes == 2
