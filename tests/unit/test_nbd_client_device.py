"""The NBD client against a far server that lies, dawdles, dies and forgets (tests/helpers/nbd_far.py)."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import (
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    StorageError,
)
from lmdbitmap.interfaces import Allocation, TrackableDevice
from lmdbitmap.nbd.client import dial
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.protocol import of_disk
from tests.helpers.nbd_far import (
    ALL,
    CONTEXT_ID,
    EINVAL,
    EIO,
    ENOTSUP,
    EOVERFLOW,
    ESHUTDOWN,
    READ_ONLY,
    SEND_FAST_ZERO,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    TRIM,
    WRITE_ZEROES,
    Asked,
    Crash,
    FarServer,
    HangUp,
    chunk,
    error_chunk,
    far_server,
    simple,
    until_it_works,
)
from tests.helpers.nbd_raw import BLOCK_STATUS, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, WRITE
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import quick_folder

SIZE = 64 << 10
PATTERN = bytes(range(1, 256)) * 300
PATIENT, AT_ONCE = PATIENCE_SECONDS, 0.0


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    with far_server(tmp_path, SIZE) as server:
        yield server


def opened(far: FarServer, *, reconnect_s: float = PATIENT, read_only: bool = False) -> NbdDevice:
    return NbdDevice.open(far.uri, reconnect_s=reconnect_s, read_only=read_only)


def once(behave: Callable[[Asked], bytes], command: int) -> Callable[[FarServer, Asked], bytes | None]:
    """Behave oddly for the first request of that kind, and honestly from then on."""
    done: list[Asked] = []

    def first(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command != command or done:
            return None
        done.append(asked)
        return behave(asked)

    return first


FORMS = ["simple", "structured", "extended"]


def agree(far: FarServer, form: str) -> None:
    far.structured, far.extended = form != "simple", form == "extended"


def hang_up(asked: Asked) -> bytes:
    raise HangUp


# --- opening ---


def test_server_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no server answers at nbd"):
        NbdDevice.open(f"nbd+unix:///disk?socket={tmp_path / 'none'}")


def test_server_that_listens_and_says_nothing_is_busy(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdbitmap.nbd.client.device.DIAL_S", 0.05)
    far.is_silent = True
    with pytest.raises(Busy, match="did not answer"):
        opened(far)


def queue(path: Path, stack: ExitStack) -> socket.socket:
    """A unix socket that listens, with as many clients in its queue as fit."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen(0)
    waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
    waiting.connect(str(path))
    return listener


def test_server_whose_queue_is_full_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdbitmap.nbd.client.device.DIAL_S", 0.05)
    with ExitStack() as stack:
        queue(tmp_path / "far", stack)
        with pytest.raises(Busy, match="did not answer"):
            NbdDevice.open(f"nbd+unix:///disk?socket={tmp_path / 'far'}")


def test_place_in_a_queue_that_is_full_is_waited_for(tmp_path: Path) -> None:
    with ExitStack() as stack:
        listener = queue(tmp_path / "far", stack)
        ours = stack.enter_context(socket.socket(socket.AF_UNIX))
        leaves = threading.Timer(0.2, lambda: listener.accept()[0].close())
        leaves.start()
        dial._connect(ours, str(tmp_path / "far"), PATIENCE_SECONDS)
        leaves.join()
        with listener.accept()[0] as theirs:
            theirs.sendall(b"you")
        assert ours.recv(3) == b"you"


def test_that_we_may_not_connect_is_not_said_of_the_server(far: FarServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(StorageError, match="Too many open files; raise the limit on open files"):
            opened(far)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def hanging(host: str, stack: ExitStack) -> tuple[str, int]:
    """An address that takes no connection, and refuses none, because as many wait there as may."""
    listener = stack.enter_context(socket.socket())
    listener.bind((host, 0))
    listener.listen(0)
    for _ in range(3):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    address: tuple[str, int] = listener.getsockname()
    return address


def test_a_host_of_several_addresses_that_hang_takes_no_longer_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they are allowed adds up; how long they take is also up to who else uses the processor."""
    allowed_s, connect = list[float](), dial._connect

    def connect_within(sock: socket.socket, address: Any, timeout_s: float) -> None:
        allowed_s.append(timeout_s)
        connect(sock, address, timeout_s)

    monkeypatch.setattr(dial, "_connect", connect_within)
    monkeypatch.setattr("lmdbitmap.nbd.client.device.DIAL_S", 0.6)
    with ExitStack() as stack:
        addresses = [hanging(f"127.0.0.{number}", stack) for number in range(1, 4)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        started = time.monotonic()
        with pytest.raises(Busy, match="did not answer"):
            NbdDevice.open("nbd://far.example/disk")
        took_s = time.monotonic() - started
    assert len(allowed_s) == 3
    assert sum(allowed_s) < 0.7, "each of them had 0.6 s"
    assert took_s > sum(allowed_s) - 0.1, "they were not waited for"


def test_a_slow_name_server_takes_no_time_from_the_server(
    monkeypatch: pytest.MonkeyPatch, far: FarServer
) -> None:
    late_s = 0.0

    def look_up(*_: object, **__: object) -> list[tuple[int, int, int, str, str]]:
        nonlocal late_s
        late_s += 60.0
        return [(socket.AF_UNIX, 1, 0, "", str(far.path))]

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late_s)
    monkeypatch.setattr("lmdbitmap.nbd.client.dial.time", clock)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with NbdDevice.open("nbd://far.example/disk") as device:
        assert device.pread(1, 0) == b"\0"


def test_the_last_address_of_a_host_is_tried_too(monkeypatch: pytest.MonkeyPatch, far: FarServer) -> None:
    found = [(socket.AF_UNIX, 1, 0, "", path) for path in ("/nowhere", str(far.path))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with NbdDevice.open("nbd://far.example/disk") as device:
        assert device.pread(1, 0) == b"\0"


def test_disconnect_at_every_byte_of_the_handshake_is_an_error_and_no_hang(far: FarServer) -> None:
    opened(far).close()
    far.bytes_to_live = 0
    refusals = 0
    while True:
        try:
            opened(far).close()
        except LmdbitmapError:
            far.bytes_to_live += 1
            refusals += 1
        else:
            break
    assert refusals == far.handshake_bytes


def test_read_only_export_is_refused_for_writing_and_taken_for_reading(far: FarServer) -> None:
    far.flags = 1 | READ_ONLY
    with pytest.raises(InvalidArgument, match="served read-only; let its server serve it for writing"):
        opened(far)
    with opened(far, read_only=True) as device:
        assert device.read_only
        assert device.pread(4, 0) == bytes(4)
        device.flush()
    assert far.commands() == [READ]


def test_export_that_can_neither_flush_nor_write_through_is_refused(far: FarServer) -> None:
    far.flags = ALL & ~SEND_FLUSH & ~SEND_FUA
    with pytest.raises(InvalidArgument, match="written but not flushed"):
        opened(far)


def test_identity_is_the_place_and_the_size(far: FarServer, tmp_path: Path) -> None:
    with opened(far) as device, opened(far) as again:
        tracked: TrackableDevice = device
        identity = tracked.identity()
        assert identity == again.identity()
        assert (identity.size, identity.mtime_ns) == (SIZE, 0)
    with NbdDevice.open(far.uri.replace("disk", "other")) as other:
        assert other.identity()[:2] != identity[:2]


def test_resizing_is_refused(far: FarServer) -> None:
    with opened(far) as device, pytest.raises(InvalidArgument, match="cannot be resized through NBD"):
        device.resize(SIZE)


# --- answers ---


@pytest.mark.parametrize("form", FORMS)
def test_replies_may_come_in_any_pieces(far: FarServer, form: str) -> None:
    agree(far, form)
    far.dribbles = True
    far.data[:1000] = PATTERN[:1000]
    with opened(far) as device:
        assert device.pread(1000, 0) == PATTERN[:1000]
        device.pwrite(b"new", 5)
        assert device.pread(5, 4) == PATTERN[4:5] + b"new" + PATTERN[8:9]


def test_pieces_of_a_read_may_come_in_any_order_and_as_holes(far: FarServer) -> None:
    def reply(asked: Asked) -> bytes:
        return (
            chunk(asked.cookie, 1, struct.pack(">Q", 600) + b"c" * 100, done=False)
            + chunk(asked.cookie, 2, struct.pack(">QI", 200, 400), done=False)
            + chunk(asked.cookie, 1, struct.pack(">Q", 100) + b"a" * 100, done=False)
            + chunk(asked.cookie, 0)
        )

    far.behave = once(reply, READ)
    with opened(far, reconnect_s=AT_ONCE) as device:
        buffer = bytearray(b"?" * 600)
        device.pread_into(memoryview(buffer), 100)
        assert buffer == b"a" * 100 + bytes(400) + b"c" * 100


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("told", "heard"), [(EIO, errno.EIO), (28, errno.ENOSPC), (12345, errno.EINVAL)])
def test_error_of_the_server_is_the_callers_and_costs_no_connection(
    far: FarServer, form: str, told: int, heard: int
) -> None:
    agree(far, form)
    far.behave = once(lambda asked: far.error_reply(asked, told), WRITE)
    with opened(far) as device:
        with pytest.raises(OSError) as refused:
            device.pwrite(b"x", 0)
        assert refused.value.errno == heard
        device.pwrite(b"y", 0)
    assert far.handshakes == 1


@pytest.mark.parametrize("kind", [0x8001, 0x8002, 0x8FFF])
def test_error_amid_the_pieces_of_a_read_fails_it_and_costs_no_connection(far: FarServer, kind: int) -> None:
    def reply(asked: Asked) -> bytes:
        data = chunk(asked.cookie, 1, struct.pack(">Q", 0) + b"a" * 100, done=False)
        place = struct.pack(">Q", 150) if kind == 0x8002 else b""
        error = chunk(asked.cookie, kind, struct.pack(">IH", EIO, 3) + b"ouch"[:3] + place, done=False)
        return data + error + chunk(asked.cookie, 0)

    far.behave = once(reply, READ)
    with opened(far) as device:
        with pytest.raises(OSError) as refused:
            device.pread(200, 0)
        assert refused.value.errno == errno.EIO
        assert device.pread(200, 0) == bytes(200)
    assert far.handshakes == 1


def data_chunk(asked: Asked, offset: int, length: int, *, done: bool = True) -> bytes:
    return chunk(asked.cookie, 1, struct.pack(">Q", offset) + b"!" * length, done=done)


LIES: dict[str, tuple[int, Callable[[Asked], bytes]]] = {
    "no magic": (READ, lambda asked: bytes(40)),
    "wrong cookie": (READ, lambda asked: chunk(asked.cookie + 1, 0)),
    "wrong cookie, simple": (WRITE, lambda asked: simple(asked.cookie + 1)),
    "simple reply to a read": (READ, lambda asked: simple(asked.cookie) + bytes(100)),
    "nothing is all": (READ, lambda asked: chunk(asked.cookie, 0)),
    "an end that is none": (READ, lambda asked: chunk(asked.cookie, 0, done=False)),
    "an end with a payload": (READ, lambda asked: chunk(asked.cookie, 0, b"x")),
    "too little": (READ, lambda asked: data_chunk(asked, 1000, 99)),
    "too much": (READ, lambda asked: data_chunk(asked, 1000, 101)),
    "before": (READ, lambda asked: data_chunk(asked, 999, 100)),
    "behind": (READ, lambda asked: data_chunk(asked, 1100, 1)),
    "no data": (READ, lambda asked: data_chunk(asked, 1000, 0)),
    "twice": (READ, lambda asked: data_chunk(asked, 1000, 100, done=False) + data_chunk(asked, 1000, 100)),
    "overlap": (READ, lambda asked: data_chunk(asked, 1000, 60, done=False) + data_chunk(asked, 1050, 50)),
    "gap": (READ, lambda asked: data_chunk(asked, 1000, 40, done=False) + data_chunk(asked, 1050, 50)),
    "hole beyond": (READ, lambda asked: chunk(asked.cookie, 2, struct.pack(">QI", 1000, 2**32 - 1))),
    "empty hole": (READ, lambda asked: chunk(asked.cookie, 2, struct.pack(">QI", 1000, 0))),
    "odd hole": (READ, lambda asked: chunk(asked.cookie, 2, struct.pack(">QIB", 1000, 100, 0))),
    "four gigabytes": (READ, lambda asked: chunk(asked.cookie, 1)[:-4] + b"\xff\xff\xff\xff"),
    "unknown chunk": (READ, lambda asked: chunk(asked.cookie, 77, b"x")),
    "error 0": (READ, lambda asked: error_chunk(asked.cookie, 0)),
    "short error": (READ, lambda asked: chunk(asked.cookie, 0x8001, b"abc")),
    "long message": (READ, lambda asked: chunk(asked.cookie, 0x8001, struct.pack(">IH", 5, 9) + b"x" * 8)),
    "endless error": (READ, lambda asked: chunk(asked.cookie, 0x8001)[:-4] + b"\xff\xff\xff\xff"),
    "data for a write": (WRITE, lambda asked: data_chunk(asked, 1000, 100)),
    "statuses for a write": (WRITE, lambda asked: chunk(asked.cookie, 5, struct.pack(">III", CONTEXT_ID, 8, 0))),
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


def test_structured_reply_that_was_not_agreed_on_costs_the_connection(far: FarServer) -> None:
    far.structured = False
    far.behave = once(lambda asked: data_chunk(asked, 0, 100), READ)
    with opened(far) as device:
        assert device.pread(100, 0) == bytes(100)
    assert far.handshakes == 2


@pytest.mark.parametrize("form", FORMS)
def test_disconnect_at_every_byte_of_a_reply_is_mended(far: FarServer, form: str) -> None:
    agree(far, form)
    far.data[:50] = PATTERN[:50]
    whole = far.read_reply(Asked(1, 0, READ, 1, 0, 50), PATTERN[:50])

    def cut_to(length: int) -> Callable[[Asked], bytes]:
        return lambda asked: far.cut_short(far.reply(asked)[:length])

    for length in range(len(whole)):
        far.behave = once(cut_to(length), READ)
        with opened(far) as device:
            assert device.pread(50, 0) == PATTERN[:50], length
    assert far.handshakes == 2 * len(whole)


# --- what the server does not offer is done another way ---


def test_zeroes_are_written_out_where_the_server_does_not_know_them(far: FarServer) -> None:
    far.flags = ALL & ~SEND_WRITE_ZEROES & ~SEND_FAST_ZERO & ~SEND_TRIM
    far.data[:] = PATTERN[:SIZE]
    with opened(far) as device:
        with pytest.raises(OSError) as refused:
            device.write_zeroes(0, 100, fast_only=True)
        assert refused.value.errno == errno.ENOTSUP
        device.discard(0, SIZE)
        device.write_zeroes(100, 1000)
    assert far.data == PATTERN[:100] + bytes(1000) + PATTERN[1100:SIZE]
    assert far.commands() == [WRITE]


def test_zeroing_says_whether_holes_may_be_made_and_whether_haste_is_all(far: FarServer) -> None:
    with opened(far) as device:
        device.write_zeroes(0, 10)
        device.write_zeroes(0, 10, may_unmap=False)
        device.write_zeroes(0, 10, fast_only=True)
    assert [asked.flags for asked in far.asked] == [0, NO_HOLE, FAST_ZERO]
    assert set(far.commands()) == {WRITE_ZEROES}


def test_zeroes_that_the_server_offers_and_cannot_do_are_written_out(far: FarServer) -> None:
    far.block_sizes = (512, 512, 4096)
    far.data[:] = PATTERN[:SIZE]
    far.behave = lambda server, asked: (
        simple(asked.cookie, ENOTSUP) if asked.command == WRITE_ZEROES else None
    )
    with opened(far) as device:
        device.write_zeroes(100, 10_000)
        with pytest.raises(OSError) as refused:
            device.write_zeroes(SIZE - 4096, 4096, fast_only=True)
    assert refused.value.errno == errno.ENOTSUP
    assert far.data == PATTERN[:100] + bytes(10_000) + PATTERN[10_100:SIZE]


def test_fast_zeroing_is_refused_unasked_where_the_server_does_not_know_it(far: FarServer) -> None:
    far.flags = ALL & ~SEND_FAST_ZERO
    with opened(far) as device, pytest.raises(OSError) as refused:
        device.write_zeroes(0, 10, fast_only=True)
    assert (refused.value.errno, far.asked) == (errno.ENOTSUP, [])


@pytest.mark.parametrize("refusal", [EINVAL, EOVERFLOW])
@pytest.mark.parametrize(
    "change",
    [
        NbdDevice.write_zeroes,
        partial(NbdDevice.write_zeroes, fast_only=True),
        NbdDevice.discard,
    ],
    ids=["zeroes", "fast zeroes", "discard"],
)
def test_request_that_is_too_long_is_cut_up(
    far: FarServer, refusal: int, change: Callable[[NbdDevice, int, int], None]
) -> None:
    far.block_sizes = (1, 512, 20_000)
    far.data[:] = PATTERN[:SIZE]

    def at_most_20000(server: FarServer, asked: Asked) -> bytes | None:
        return simple(asked.cookie, refusal) if asked.length > 20_000 else None

    far.behave = at_most_20000
    with opened(far) as device:
        change(device, 0, SIZE)
    assert far.data == bytes(SIZE)
    assert [asked.length for asked in far.asked] == [SIZE, 20_000, 20_000, 20_000, SIZE - 60_000]


def test_discard_that_the_server_cannot_do_is_dropped(far: FarServer) -> None:
    far.behave = once(lambda asked: simple(asked.cookie, ENOTSUP), TRIM)
    with opened(far) as device:
        device.discard(0, 10)
    assert far.commands() == [TRIM]


def test_server_that_writes_through_is_asked_to_and_needs_no_flush(far: FarServer) -> None:
    far.flags = ALL & ~SEND_FLUSH
    with opened(far) as device:
        device.pwrite(b"x", 0)
        device.write_zeroes(0, 10)
        device.discard(0, 10)
        device.pwrite_many([(0, b"y")])
        device.flush()
    assert far.commands() == [WRITE, WRITE_ZEROES, TRIM, WRITE]
    assert all(asked.flags & FUA for asked in far.asked)


# --- block sizes ---


def test_requests_keep_to_the_servers_block_sizes(far: FarServer) -> None:
    far.block_sizes = (512, 4096, 8192)
    model = bytearray(PATTERN[:SIZE])
    far.data[:] = model
    with opened(far) as device:
        for offset, length in ((0, 30_000), (100, 1), (511, 2), (5000, 20_000), (1024, 512), (3, 0)):
            device.pwrite(b"\xff" * length, offset)
            model[offset : offset + length] = b"\xff" * length
            device.write_zeroes(offset + 9, length)
            model[offset + 9 : offset + 9 + length] = bytes(length)
            assert device.pread(length + 50, offset) == model[offset : offset + length + 50]
        device.discard(700, 700)
        list(device.allocation(700, 700))
    assert far.asked
    for asked in far.asked:
        assert (asked.offset % 512, asked.length % 512) == (0, 0)
        assert asked.command not in (READ, WRITE) or 0 < asked.length <= 8192


def test_nothing_at_all_is_not_asked_for_within_a_block_either(far: FarServer) -> None:
    """A block that is read and written back is not clean, and whoever tracks a write of nothing marks nothing."""
    far.block_sizes, far.statuses = (512, 4096, 8192), [(SIZE, 0)]
    with opened(far) as device:
        device.pwrite(b"", 3)
        assert device.pwrite_many([(5, b"")]) == {}
        device.write_zeroes(7, 0)
        device.discard(7, 0)
        assert device.pread(0, 9) == b""
        assert list(device.allocation(9, 0)) == []
    assert far.asked == []


@pytest.mark.parametrize("block_sizes", [None, (512, 4096, 8192)])
def test_many_reads_in_one_call_are_what_they_are_one_by_one(
    far: FarServer, block_sizes: tuple[int, int, int] | None
) -> None:
    far.block_sizes = block_sizes
    far.data[:] = PATTERN[:SIZE]
    places = [(number * 64, number % 90) for number in range(500)] + [(0, 30_000), (512, 1024)]
    buffers = [bytearray(length) for _, length in places]
    with opened(far) as device:
        device.pread_many([(memoryview(into), at) for into, (at, _) in zip(buffers, places, strict=True)])
        with pytest.raises(InvalidArgument):
            device.pread_many([(memoryview(bytearray(2)), SIZE - 1)])
        far.behave = once(lambda asked: simple(asked.cookie, EIO), READ)
        with pytest.raises(OSError, match="Input/output error"):
            device.pread_many([(memoryview(bytearray(512)), at) for at in (0, 512)])
    assert buffers == [PATTERN[at : at + length] for at, length in places]


def test_parts_of_one_block_may_be_written_at_once(far: FarServer) -> None:
    far.block_sizes = (4096, 4096, 65536)
    with opened(far) as device, ThreadPoolExecutor(8) as pool:
        writes = [(number * 37, bytes([number % 255 + 1]) * 37) for number in range(400)]
        whole = [pool.submit(device.pwrite, b"\xaa" * 4096, 16384) for _ in range(20)]
        done = [pool.submit(device.pwrite, data, offset) for offset, data in writes]
        for future in whole + done:
            future.result()
    assert far.data[: 400 * 37] == b"".join(data for _, data in writes)
    assert far.data[16384:20480] == b"\xaa" * 4096


# --- allocation ---


def test_allocation_is_what_the_server_says(far: FarServer) -> None:
    far.statuses = [(10_000, 0), (10_000, 3), (20_000, 1), (5_000, 2), (2_000_000_000, 3)]
    with opened(far) as device:
        assert list(device.allocation(0, SIZE)) == [
            Allocation(10_000, hole=False, zero=False),
            Allocation(10_000, hole=True, zero=True),
            Allocation(20_000, hole=True, zero=False),
            Allocation(5_000, hole=False, zero=True),
            Allocation(SIZE - 45_000, hole=True, zero=True),
        ]


def test_allocation_goes_on_where_the_server_stopped_and_joins_what_is_alike(far: FarServer) -> None:
    far.statuses = [(1000, 3), (1000, 3 | 1 << 31)]
    with opened(far) as device:
        assert list(device.allocation(500, 10_000)) == [Allocation(10_000, hole=True, zero=True)]
    assert [asked.offset for asked in far.asked] == [500, 2500, 4500, 6500, 8500]


def test_what_the_server_does_not_say_is_data(far: FarServer) -> None:
    with opened(far) as device:
        assert list(device.allocation(5, 100)) == [Allocation(100, hole=False, zero=False)]
    assert far.asked == []
    far.statuses = [(SIZE, 3)]
    far.behave = once(lambda asked: error_chunk(asked.cookie, EIO), BLOCK_STATUS)
    with opened(far) as device:
        assert list(device.allocation(5, 100)) == [Allocation(100, hole=False, zero=False)]


def test_a_server_that_stops_within_a_block_tells_of_no_more_than_was_asked(far: FarServer) -> None:
    """The rest of the block lies behind the range, whose length must not shrink by it."""

    def say_no_more(_: FarServer, asked: Asked) -> bytes | None:
        return error_chunk(asked.cookie, EIO) if asked.command == BLOCK_STATUS and asked.offset else None

    far.block_sizes, far.statuses, far.behave = (512, 4096, 8192), [(600, 3)], say_no_more
    with opened(far) as device:
        assert list(device.allocation(0, 550)) == [Allocation(550, hole=True, zero=True)]


STATUS_LIES: dict[str, Callable[[Asked], bytes]] = {
    "none": lambda asked: chunk(asked.cookie, 0),
    "no descriptor": lambda asked: chunk(asked.cookie, 5, struct.pack(">I", CONTEXT_ID)),
    "half a descriptor": lambda asked: chunk(asked.cookie, 5, struct.pack(">II", CONTEXT_ID, 5)),
    "an empty extent": lambda asked: chunk(asked.cookie, 5, struct.pack(">III", CONTEXT_ID, 0, 3)),
    "another context": lambda asked: chunk(asked.cookie, 5, struct.pack(">III", CONTEXT_ID + 1, SIZE, 3)),
    "two lists": lambda asked: 2 * chunk(asked.cookie, 5, struct.pack(">III", CONTEXT_ID, 9, 3), done=False),
    "too long": lambda asked: chunk(asked.cookie, 5)[:-4] + struct.pack(">I", 4 + 8 * (1 << 20) + 8),
    "simple": lambda asked: simple(asked.cookie),
}


@pytest.mark.parametrize("lie", STATUS_LIES)
def test_lie_about_holes_is_never_believed(far: FarServer, lie: str) -> None:
    far.statuses = [(SIZE, 0)]
    far.behave = once(STATUS_LIES[lie], BLOCK_STATUS)
    with opened(far) as device:
        assert list(device.allocation(0, SIZE)) == [Allocation(SIZE, hole=False, zero=False)]
    assert far.handshakes == 2


# --- many at once ---


def test_answers_in_another_order_reach_those_who_asked(far: FarServer) -> None:
    far.data[:] = PATTERN[:SIZE]
    held: list[Asked] = []

    def backwards(server: FarServer, asked: Asked) -> bytes | None:
        held.append(asked)
        if len(held) < 5:
            return b""
        return b"".join(server.reply(held.pop()) for _ in range(5))

    far.behave = backwards
    with opened(far) as device, ThreadPoolExecutor(5) as pool:
        for turn in range(20):
            offsets = [turn * 1000 + number for number in range(5)]
            assert list(pool.map(lambda offset: device.pread(100, offset), offsets)) == [
                PATTERN[offset : offset + 100] for offset in offsets
            ]
    assert far.handshakes == 1


def test_large_reads_and_writes_at_once_do_not_block_each_other(tmp_path: Path) -> None:
    """A server of one thread sends nothing while it receives: whoever waits for it must not keep it waiting."""
    mib = 1 << 20
    with far_server(tmp_path, 8 * mib) as far, opened(far) as device, ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(device.pread, 2 * mib, 6 * mib) for _ in range(20)]
        writes = [pool.submit(device.pwrite, b"w" * mib, number % 6 * mib) for number in range(20)]
        assert all(read.result(PATIENCE_SECONDS) == bytes(2 * mib) for read in reads)
        assert all(write.result(PATIENCE_SECONDS) is None for write in writes)
        assert far.data[: 6 * mib] == b"w" * 6 * mib


def test_many_writes_in_one_call_fail_one_by_one(far: FarServer) -> None:
    def no_room_at_700(server: FarServer, asked: Asked) -> bytes | None:
        return simple(asked.cookie, 28) if asked.offset == 700 else None

    far.behave = no_room_at_700
    writes = [(number, bytes([number % 255 + 1])) for number in range(1000)]
    with opened(far) as device:
        failed = device.pwrite_many([*writes, (SIZE, b"x"), (5, b"")])
        assert (len(failed), type(failed[1000])) == (2, InvalidArgument)
        assert isinstance(failed[700], OSError)
        assert failed[700].errno == errno.ENOSPC
        expected = bytearray(b"".join(data for _, data in writes))
        expected[700] = 0
        assert far.data[:1000] == expected


@pytest.mark.parametrize("connections", [1, 2], ids=["at once", "when it is connected again"])
def test_caller_that_is_interrupted_leaves_the_others_alone(far: FarServer, connections: int) -> None:
    """A connection that nobody parted from would be warned of, which is an error here."""

    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    def never(asked: Asked) -> bytes:
        os.kill(os.getpid(), signal.SIGUSR1)
        return b""

    def behave(server: FarServer, asked: Asked) -> bytes | None:
        if server.handshakes < connections:
            raise HangUp
        return kill_once(server, asked)

    far.data[:4] = b"data"
    kill_once = once(never, READ)
    far.behave = behave
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with opened(far) as device:
            with pytest.raises(Interrupted):
                device.pread(4, 0)
            assert device.pread(4, 0) == b"data"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert far.handshakes == connections + 1
    gc.collect()


@pytest.mark.parametrize("connection", [1, 2], ids=["at once", "when it is connected again"])
def test_reader_of_a_server_that_hangs_can_be_interrupted(far: FarServer, connection: int) -> None:
    """Also while what was in flight is asked for once more, on a connection that nobody else uses yet."""
    hangs, over = threading.Event(), threading.Event()

    def behave(server: FarServer, asked: Asked) -> None:
        if server.handshakes < connection:
            raise HangUp
        hangs.set()
        over.wait(PATIENCE_SECONDS)

    far.behave = behave
    with opened(far, read_only=True) as device, ThreadPoolExecutor() as threads:
        read = threads.submit(device.pread, 4, 0)
        assert hangs.wait(PATIENCE_SECONDS)
        device.interrupt()
        try:
            assert read.exception(PATIENCE_SECONDS) is not None
        finally:
            over.set()


def test_closed_device_says_so(far: FarServer) -> None:
    device = opened(far)
    device.close()
    for use in (lambda: device.pread(1, 0), lambda: device.pwrite(b"x", 0), device.flush):
        with pytest.raises(OSError) as refused:
            use()
        assert refused.value.errno == errno.EBADF


# --- when the server goes away ---


def test_what_was_in_flight_is_done_on_the_next_connection(far: FarServer) -> None:
    with opened(far) as device:
        far.behave = once(hang_up, WRITE)
        device.pwrite(b"x", 0)
        far.behave = once(hang_up, FLUSH)
        device.flush()
        far.behave = once(hang_up, READ)
        assert device.pread(2, 0) == b"x\0"
    assert far.handshakes == 4


def test_server_that_says_it_is_shutting_down_is_left_for_the_next(far: FarServer) -> None:
    far.behave = once(lambda asked: simple(asked.cookie, ESHUTDOWN), WRITE)
    with opened(far) as device:
        device.pwrite(b"x", 0)
    assert (far.handshakes, bytes(far.data[:1])) == (2, b"x")


def test_acknowledged_writes_survive_a_server_that_forgot_them(far: FarServer) -> None:
    with opened(far) as device:
        device.pwrite(b"flushed", 0)
        device.flush()
        device.pwrite(b"kept", 100)
        device.pwrite(b"KEPT", 102)
        device.write_zeroes(0, 2)
        far.crash()
        device.flush()
        assert far.stable[:110] == b"\0\0ushed" + bytes(93) + b"keKEPT" + bytes(4)


def test_flush_that_dies_with_the_server_still_promises_what_it_should(far: FarServer) -> None:
    def die(asked: Asked) -> bytes:
        raise Crash

    with opened(far) as device:
        device.pwrite(b"kept", 0)
        far.behave = once(die, FLUSH)
        device.flush()
        assert far.stable[:4] == b"kept"


def test_what_was_flushed_is_not_written_again(far: FarServer) -> None:
    with opened(far) as device:
        device.pwrite(b"a", 0)
        device.flush()
        device.pwrite(b"b", 1)
        far.crash()
        assert device.pread(2, 0) == b"ab"
    assert [asked.data for asked in far.asked if asked.command == WRITE] == [b"a", b"b", b"b"]


def test_flush_promises_nothing_of_writes_that_were_acknowledged_after_it(far: FarServer) -> None:
    flushes: list[Asked] = []

    def flush_before_and_answer_after_the_write(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == FLUSH:
            server.reply(asked)
            flushes.append(asked)
            return b""
        return server.reply(asked) + b"".join(simple(flushes.pop().cookie) for _ in range(len(flushes)))

    far.behave = flush_before_and_answer_after_the_write
    with opened(far) as device, ThreadPoolExecutor(1) as pool:
        flush = pool.submit(device.flush)
        far.await_requests(1)
        device.pwrite(b"late", 0)
        flush.result(PATIENCE_SECONDS)
        far.crash()
        assert device.pread(4, 0) == b"late"


def test_what_is_written_again_is_what_was_written_and_not_what_the_buffer_holds_by_then(
    far: FarServer,
) -> None:
    buffer = bytearray(b"what was written")
    with opened(far) as device:
        device.pwrite(memoryview(buffer), 0)
        device.pwrite_many([(100, memoryview(buffer))])
        buffer[:] = b"something else.."
        far.crash()
        assert device.pread(16, 0) == device.pread(16, 100) == b"what was written"


def test_answer_to_what_was_not_asked_on_this_connection_is_not_believed(far: FarServer) -> None:
    """A read and a write are in flight when the connection breaks; on the next one the write goes first."""

    def answer_the_read_instead(server: FarServer, asked: Asked) -> bytes | None:
        if asked.connection == 1:
            if len(server.asked) == 2:
                raise HangUp
            return b""
        if asked.connection == 2 and asked.command == WRITE:
            [read] = [old for old in server.asked if old.command == READ]
            return data_chunk(read, read.offset, read.length)
        return None

    far.data[:10] = b"true bytes"
    far.behave = answer_the_read_instead
    with opened(far) as device, ThreadPoolExecutor(2) as pool:
        reading = pool.submit(device.pread, 10, 0)
        writing = pool.submit(device.pwrite, b"x", 100)
        assert reading.result(PATIENCE_SECONDS) == b"true bytes"
        writing.result(PATIENCE_SECONDS)
    assert far.handshakes == 3


def test_writes_to_one_place_are_written_again_one_after_another(far: FarServer) -> None:
    """A server may do what is in flight in any order: the second one is sent when the first is answered."""
    alone: list[bool] = []

    def look(server: FarServer, asked: Asked) -> bytes | None:
        alone.append(not server.has_more())
        return None

    with opened(far) as device:
        device.pwrite(b"first", 0)
        device.pwrite(b"SECOND", 4)
        device.write_zeroes(3, 2)
        far.crash()
        far.behave = look
        assert device.pread(10, 0) == b"fir\0\0ECOND"
    assert alone == [True] * 4


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write many", "zero", "flush", "read", "crash", "crash after"]),
        st.integers(0, 4095),
        st.integers(1, 500),
        st.integers(1, 255),
    ),
    min_size=4,
    max_size=20,
)


@settings(max_examples=60)
@given(steps=steps)
def test_no_crash_of_the_server_takes_back_what_was_promised(steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever was read or written stays so, and what was written before a flush survives the next crash."""
    with quick_folder() as folder, far_server(folder, 8192) as far, opened(far) as device:
        model, promised, crash_in = bytearray(8192), bytearray(8192), [0]

        def sometimes_die(server: FarServer, asked: Asked) -> bytes | None:
            crash_in[0] -= 1
            if crash_in[0] == 0:
                raise Crash
            return None

        far.behave = sometimes_die
        for step, offset, length, value in steps:
            data = bytes([value]) * length
            if step == "write":
                device.pwrite(data, offset)
                model[offset : offset + length] = data
            elif step == "write many":
                assert device.pwrite_many([(offset + n * 600, data) for n in range(4)]) == {}
                for n in range(4):
                    model[offset + n * 600 : offset + n * 600 + length] = data
            elif step == "zero":
                device.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            elif step == "flush":
                device.flush()
                promised[:] = model
                assert far.stable == promised
            elif step == "read":
                assert device.pread(8192, 0) == model
            elif step == "crash":
                far.crash()
            else:
                crash_in[0] = value % 6 + 1
        far.crash()
        assert device.pread(8192, 0) == model


def test_threads_at_work_do_not_notice_crashes(far: FarServer) -> None:
    """Each owns a part of the disk, and the server dies at every 150th request, with all it had not flushed.

    What is kept at any time is less than 150 requests: else no server would live to see the end of it.
    """
    count = [0]

    def die_at_times(server: FarServer, asked: Asked) -> bytes | None:
        count[0] += 1
        if count[0] % 150 == 0:
            raise Crash
        return None

    far.behave = die_at_times

    def work(number: int) -> int:
        base, rounds = number * 4096, 0
        for turn in range(40):
            data = bytes([turn % 255 + 1]) * 900
            device.pwrite(data, base + turn * 70)
            if turn % 3 == 0:
                device.flush()
            rounds += device.pread(900, base + turn * 70) == data
        return rounds

    with opened(far) as device, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [40] * 8
    assert far.handshakes > 4


def test_server_that_stays_away_fails_requests_and_is_used_again_when_it_is_back(far: FarServer) -> None:
    with opened(far, reconnect_s=AT_ONCE) as device:
        device.pwrite(b"before", 0)
        far.stop_listening()
        far.crash()
        for use in (lambda: device.pread(1, 0), lambda: device.pwrite(b"x", 50), device.flush):
            with pytest.raises(OSError) as refused:
                use()
            assert refused.value.errno == errno.ETIMEDOUT
        far.listen()
        until_it_works(device.flush)
        assert far.stable[:6] == b"before"
        assert device.pread(6, 0) == b"before"


def test_many_callers_fail_together_when_the_server_stays_away(far: FarServer) -> None:
    with opened(far, reconnect_s=AT_ONCE) as device, ThreadPoolExecutor(8) as pool:
        everyone = threading.Barrier(8)

        def leave(server: FarServer, asked: Asked) -> bytes | None:
            return b""

        far.behave = leave

        def use(number: int) -> int | None:
            everyone.wait()
            try:
                device.pread(10, number)
            except OSError as refusal:
                return refusal.errno
            return 0

        answers = [pool.submit(use, number) for number in range(8)]
        far.await_requests(8)
        far.stop_listening()
        far.crash()
        assert [answer.result(PATIENCE_SECONDS) for answer in answers] == [errno.ETIMEDOUT] * 8


def test_request_that_kills_the_server_each_time_fails_in_the_end(far: FarServer) -> None:
    def poisoned(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == READ and asked.offset == 666:
            raise Crash
        return None

    far.behave = poisoned
    with opened(far, reconnect_s=2) as device, ThreadPoolExecutor(2) as pool:
        poison = pool.submit(device.pread, 1, 666)
        rounds = 0
        while not poison.done():
            device.pwrite(b"x", 0)
            rounds += 1
        assert rounds > 0
        with pytest.raises(OSError):
            poison.result()


def changed_size(far: FarServer) -> None:
    far.size = SIZE // 2


def now_read_only(far: FarServer) -> None:
    far.flags |= READ_ONLY


def without_flush(far: FarServer) -> None:
    far.flags &= ~SEND_FLUSH


def larger_blocks(far: FarServer) -> None:
    far.block_sizes = (4096, 4096, 1 << 20)


def no_statuses(far: FarServer) -> None:
    far.statuses = None


def another_disk(far: FarServer) -> None:
    far.description = "sda, writable" + of_disk(UUID(int=2))


@pytest.mark.parametrize(
    "change", [changed_size, now_read_only, without_flush, larger_blocks, no_statuses, another_disk]
)
def test_server_that_comes_back_as_another_is_not_used(
    far: FarServer, change: Callable[[FarServer], None]
) -> None:
    far.statuses = [(SIZE, 0)]
    far.description = "sda, writable" + of_disk(UUID(int=1))
    with opened(far, reconnect_s=0.1) as device:
        change(far)
        far.crash()
        with pytest.raises(OSError) as refused:
            device.pwrite(b"x", 0)
        assert refused.value.errno == errno.ETIMEDOUT
    assert far.asked == []


@pytest.mark.parametrize(
    ("before", "after"),
    [("", of_disk(UUID(int=1))), (of_disk(UUID(int=1)), ""), ("one, disk 1", "another, disk 2")],
)
def test_server_that_may_have_the_same_disk_is_used_again(far: FarServer, before: str, after: str) -> None:
    far.description = before
    with opened(far, reconnect_s=0.1) as device:
        far.description = after
        far.crash()
        device.pwrite(b"x", 0)
    assert far.handshakes == 2


# --- what is kept is bounded ---


def test_what_is_kept_is_bounded_by_flushes_of_our_own(far: FarServer) -> None:
    kept: list[int] = []
    unflushed = [0]

    def count(server: FarServer, asked: Asked) -> bytes | None:
        unflushed[0] = 0 if asked.command == FLUSH else unflushed[0] + asked.length
        kept.append(unflushed[0])
        return None

    far.behave = count
    with NbdDevice.open(far.uri, keep_bytes=100_000) as device:
        for number in range(200):
            device.pwrite(b"x" * 5000, number)
    assert 40_000 < max(kept) < 110_000
    assert far.commands().count(FLUSH) > 5


def test_writes_fail_when_no_more_can_be_kept_and_the_server_cannot_flush(far: FarServer) -> None:
    def no_flush(server: FarServer, asked: Asked) -> bytes | None:
        return simple(asked.cookie, EIO) if asked.command == FLUSH else None

    far.behave = no_flush
    with NbdDevice.open(far.uri, keep_bytes=100_000) as device:
        for _ in range(100_000 // (5000 + 512) + 1):
            device.pwrite(b"x" * 5000, 0)
        with pytest.raises(OSError) as refused:
            device.pwrite(b"x", 0)
    assert refused.value.errno == errno.EIO


def test_nothing_is_kept_of_a_server_that_writes_through(far: FarServer) -> None:
    far.flags = ALL & ~SEND_FLUSH
    with opened(far) as device:
        device.pwrite(b"x", 0)
        far.crash()
        assert device.pread(1, 0) == b"x"
    assert far.commands() == [WRITE, READ]


def test_program_that_is_no_nbd_server_is_told_apart(far: FarServer) -> None:
    far.greeting = b"SSH-2.0-OpenSSH_9.2p1"
    with pytest.raises(FormatError, match="greeting"):
        opened(far)
